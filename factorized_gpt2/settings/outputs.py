"""Settings for publishing on the Hub and for results in JSON, which several commands share."""

from dataclasses import dataclass, field
from typing import Annotated

from .setting_values import OUTPUT_FILE


@dataclass
class PublishArguments:
    """Whether and where the models that are made are published on the Hub."""

    _argument_group_name = "Publishing"

    push_to_hub: str | None = field(
        default=None,
        metadata={
            "help": "USER/NAME: publish the model in this repository of the Hub. Of several models, each gets a "
            "repository of its own: NAME-k64 for rank 64, NAME-b1.75 for 1.75 bits per weight."
        },
    )
    private: bool = field(default=False, metadata={"help": "Publish in a private repository."})


@dataclass
class JsonArguments:
    """The result as JSON for other programs. It goes to a file, because stdout also holds progress messages."""

    _argument_group_name = "Result as JSON"

    json: Annotated[str, OUTPUT_FILE] | None = field(
        default=None,
        metadata={
            "help": "Also write the result table into this JSON file: unrounded figures, sizes in bytes, versions of "
            "the libraries."
        },
    )

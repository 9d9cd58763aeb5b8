"""Where a command leaves what it makes, beside its folder."""

from dataclasses import dataclass, field
from typing import Annotated

from .setting_values import OUTPUT_FILE


@dataclass
class PublishArguments:
    """Where on the Hub what is made goes, if anywhere."""

    _argument_group_name = "Publishing"

    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME; of several, each becomes NAME-k and its rank, or -b and its bits."}
    )
    private: bool = field(default=False, metadata={"help": "Let no one else see it."})


@dataclass
class JsonArguments:
    """The result for programs to read. It is a file: on stdout, what a command says as it works would be between."""

    _argument_group_name = "Result for programs"

    json: Annotated[str, OUTPUT_FILE] | None = field(
        default=None,
        metadata={"help": "File to write the table into: figures unrounded, sizes in bytes, versions of libraries."},
    )

"""Where a command publishes what it makes."""

from dataclasses import dataclass, field


@dataclass
class PublishArguments:
    """Where on the Hub what is made goes, if anywhere."""

    _argument_group_name = "Publishing"

    push_to_hub: str | None = field(
        default=None, metadata={"help": "USER/NAME; of several, each becomes NAME-k and its rank, or -b and its bits."}
    )
    private: bool = field(default=False, metadata={"help": "Let no one else see it."})

"""Names of a GPT-2's weights, as wrappers of models leave them in files, and as they are."""

import re
from collections.abc import Iterable

# `DistributedDataParallel`, `torch.compile`, FSDP and activation checkpointing each put a word before what they wrap,
# be it the model or a block of it; other people's trainers keep the model as a part of something.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_PARTS = {"model", "transformer"}
_TRUNK = {"wte", "wpe", "h", "ln_f", "scale_up", "scale_down"}


def plain_name(name: str) -> str:
    """Take from a weight's name what wrappers left in it.

    Returns:
        The name in an unwrapped language model: the trunk's weights begin with `transformer.`, no other does.
    """
    words = [word for word in name.split(".") if word not in _WRAPPERS]
    while len(words) > 1 and words[0] in _PARTS:
        del words[0]
    is_trunk = words[0] in _TRUNK or (name.startswith("transformer.") and words[0] != "lm_head")
    return ".".join(["transformer", *words] if is_trunk else words)


def wrapped_name(name: str) -> str:
    """Write the regular expression of all names that `plain_name` takes to a plain one."""
    first, *others = map(re.escape, name.removeprefix("transformer.").split("."))
    before, between = "|".join(_WRAPPERS | _PARTS), "|".join(_WRAPPERS)
    return rf"^(?:(?:{before})\.)*{first}" + "".join(rf"(?:\.(?:{between}))*\.{word}" for word in others) + "$"


def some_names(names: Iterable[str]) -> str:
    """List names in one line; of many the first."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")

"""The device that a command computes on."""

from dataclasses import dataclass, field

import torch

from ..common.errors import UserError


def present_devices() -> list[str]:
    """Name the devices of this machine that models can run on, such as `["cpu", "cuda:0"]`."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def find_device(name: str) -> torch.device:
    """Find a device by its name.

    Args:
        name: `cpu`, `cuda` (the first GPU), `cuda:N`, `mps`, or `auto`: the first GPU where there is one, else the
            CPU. MPS is taken only by name.

    Raises:
        UserError: This machine has no such device. The message lists those it has.
    """
    present = present_devices()
    wanted = name
    if name == "auto":
        wanted = "cuda:0" if "cuda:0" in present else "cpu"
    elif name == "cuda":
        wanted = "cuda:0"
    if wanted not in present:
        raise UserError(f"device={name} is not there: this machine has {', '.join(present)}.")
    return torch.device(wanted)


@dataclass
class DeviceArguments:
    """Where a command computes."""

    _argument_group_name = "Device"

    device: str = field(
        default="auto",
        metadata={"help": "cpu, cuda, cuda:N or mps. auto: the first GPU of CUDA if there is one, else the CPU."},
    )

    def __post_init__(self) -> None:
        find_device(self.device)

    @property
    def found(self) -> torch.device:
        """The device of that name."""
        return find_device(self.device)

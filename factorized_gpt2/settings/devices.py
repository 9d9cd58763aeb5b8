"""The device that a command computes on, and the numbers it computes with. Torch is imported where it is asked."""

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..common.errors import UserError

if TYPE_CHECKING:
    import torch


def launched_processes() -> int:
    """Count the processes that a launcher started together with this one, itself included."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def present_devices() -> list[str]:
    """Name the devices of this machine that models can run on, such as `["cpu", "cuda:0"]`."""
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]


def find_device(name: str) -> "torch.device":
    """Find a device by its name.

    Args:
        name: `cpu`, `cuda` (the first GPU), `cuda:N`, `mps`, or `auto`: the first GPU where there is one, else the
            CPU. MPS is taken only by name.

    Raises:
        UserError: This machine has no such device. The message lists those it has.
    """
    import torch

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

    @property
    def found(self) -> "torch.device":
        """The device of that name.

        Raises:
            UserError: As `find_device` does.
        """
        return find_device(self.device)


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DtypeArguments:
    """In which numbers a model is."""

    _argument_group_name = "Numbers"

    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights. None: as the model has them.", "choices": list(DTYPES)}
    )

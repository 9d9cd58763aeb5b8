"""The device and the number type that a command computes with. Torch is imported only where it is needed."""

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
        raise UserError(f"device={name} is not available: this machine has {', '.join(present)}.")
    return torch.device(wanted)


@dataclass
class DeviceArguments:
    """Which device a command computes on."""

    _argument_group_name = "Device"

    device: str = field(
        default="auto",
        metadata={
            "help": "Device to compute on: cpu, cuda, cuda:N, mps or auto. auto takes the first CUDA GPU, or the CPU "
            "if there is none."
        },
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
    """Number type of a model's weights."""

    _argument_group_name = "Number type"

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Round the weights to this type. Default: keep the model's own type.",
            "choices": list(DTYPES),
        },
    )

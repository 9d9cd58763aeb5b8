"""What a result came from: code, libraries, machine."""

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_REPORTED_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn")


def versions() -> dict[str, str]:
    """Name the versions of Python and of those libraries that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _REPORTED_LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def git_commit() -> str | None:
    """Name the commit of this code, followed by `-dirty` where files differ from it; `None` outside a checkout."""
    folder = Path(__file__).parent
    try:
        # An installed copy may lie inside some other project's checkout, which does not track it.
        _git("ls-files", "--error-unmatch", Path(__file__).name, folder=folder)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*", folder=folder)
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str, folder: Path) -> str:
    finished = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return finished.stdout.strip()


def device_name(device: "torch.device") -> str:
    """Name what a model runs on: "cpu", or a GPU's name."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory_bytes(device: "torch.device") -> int:
    """Measure the most that this process has held: tensors on the GPU, elsewhere resident memory."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

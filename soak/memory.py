"""Whether memory is flat: how fast it grows, a step, once a process is warm."""

import ctypes
from collections.abc import Sequence

import numpy as np
import psutil


class Memory:
    """This process's memory, looked at after every step.

    Resident memory is all there is, but creeps by itself: an allocator touches new pages while it reuses old ones.
    What `malloc` has handed out and not got back (glibc's `mallinfo2`) does not, and shows a few tensors at once.
    """

    def __init__(self):
        self._process = psutil.Process()
        self.resident: list[int] = []
        self.allocated: list[int] = []  # stays empty where libc does not tell

    def look(self) -> None:
        """Take a sample."""
        self.resident.append(self._process.memory_info().rss)
        if _MALLINFO is not None:
            info = _MALLINFO()
            self.allocated.append(info.uordblks + info.hblkhd)


def growth(samples: Sequence[int]) -> float:
    """Fit a line to the second half of samples of memory, the first being for warming up.

    Args:
        samples: Bytes, one a step; at least four.

    Returns:
        The line's slope, bytes a step.
    """
    half = np.asarray(samples[len(samples) // 2 :], np.float64)
    return float(np.polyfit(np.arange(len(half)), half, 1)[0])


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later; in use are `uordblks` and, in mappings of their own, `hblkhd`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


_MALLINFO = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _MALLINFO is not None:
    _MALLINFO.restype = _MallocInfo

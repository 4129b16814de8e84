"""What the C library does with freed memory."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's `malloc.h`."""
LARGEST, KEPT = 1 << 30, (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step instead of giving it back to the kernel at once.

    Every step frees and takes the same large buffers. On a thread that is not the main one glibc maps most of them
    anew each time, and a CPU engine spends a twentieth of its time on fresh pages. It holds for the whole process,
    so it is for processes that do nothing but run engines. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)

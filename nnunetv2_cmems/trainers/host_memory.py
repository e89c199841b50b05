"""The C library's memory, kept between the steps of a training on a CPU."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names in glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that a training step frees, for the next step.

    By default it gives large blocks back to the system, which hands them out again page by page, filled with zeros: each step then
    pays for all of its memory anew. No variable that is set for glibc's malloc is overruled but for these two.

    Returns:
        Whether there is a glibc that took the setting; elsewhere nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))

"""Freed memory stays with the process, which saves a small model on a CPU a third of its time.

A training step frees its activations, tens of megabytes at a time. glibc gives such blocks back
to the system, which clears every page of them anew for the next step.
"""

import ctypes
import sys

# The parameters of glibc's mallopt, and values for them.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
MIB = 2**20


def keep_freed() -> None:
    """Tell the allocator, where it is glibc's; before threads are started."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return
    mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # the most that it takes
    mallopt(M_TRIM_THRESHOLD, 2047 * MIB)
    mallopt(M_TOP_PAD, 256 * MIB)
    mallopt(M_ARENA_MAX, 1)  # the other arenas, those of threads, keep to their own rules

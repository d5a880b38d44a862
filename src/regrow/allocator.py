"""Keep the C library from giving memory back between training steps.

With glibc's defaults an array of 32 MB or more is mapped anew, page by page, at every use and unmapped after it: a
forward pass can spend more time in page faults than in arithmetic. The command line calls :func:`keep_freed_memory`
at its start. A library does not change its host's allocator: call it yourself, first thing, or preload jemalloc or
tcmalloc.
"""

from __future__ import annotations

import ctypes
import sys

# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_GROW_BY = 64 * 2**20


def keep_freed_memory() -> bool:
    """Serve large arrays from the heap and never shrink it; returns whether the C library understood.

    Memory stays with the process at its peak, which is what a training loop needs anyway. No effect outside glibc.

    Reference: mallopt(3), M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl has none
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER_TRIM), (_M_TOP_PAD, _GROW_BY))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)

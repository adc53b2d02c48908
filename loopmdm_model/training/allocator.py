"""Keep freed memory in the process, so that activation buffers are not faulted in again at every step.

glibc hands buffers of activations back to the system when they are freed and faults them in again at
the next step: up to a fifth of a one-thread training step where this was measured. Raising its trim
and mmap thresholds keeps them; other platforms are left alone.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, 32 * 2**20))

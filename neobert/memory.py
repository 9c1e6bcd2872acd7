"""Host memory of a process that is ours: what is freed stays, to be taken again."""

import ctypes
import sys


def keep_freed_memory() -> None:
    """Makes glibc keep freed blocks of up to 1 GiB instead of returning them to the system.

    By default every tensor above 32 MiB is mapped when it is made and unmapped when it is dropped,
    and its pages are cleared by the system once more each time: a seventh of a forward pass of
    4,096 tokens and of a training step went there. For the whole process, so a library must not:
    the commands do. Nothing happens where the C library is another.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3
        # Older ones refuse more than 32 MiB, and then must not be told the other.
        if libc.mallopt(m_mmap_threshold, 2**30) or libc.mallopt(m_mmap_threshold, 2**25):
            libc.mallopt(m_trim_threshold, 2**31 - 1)

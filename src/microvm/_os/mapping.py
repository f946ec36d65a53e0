"""Private file mappings, mapping over part of one, and which of its pages were written.

A private mapping of a file is how a snapshot becomes memory without being read: the kernel shows the file's pages and
copies each the first time it is written.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
import re
import sys
from typing import Final

PAGE_SIZE: Final = 4096

# Bits 56 to 63 of a pagemap entry: present, swapped out, page of a file. [Linux Documentation/admin-guide/mm/pagemap]
_PRESENT: Final = 0x80
_SWAPPED: Final = 0x40
_FILE: Final = 0x20
_PRIVATE: Final = bytes(int(bool(top & (_PRESENT | _SWAPPED)) and not top & _FILE) for top in range(256))
_RUN: Final = re.compile(b"\x01+")
_PAGEMAP: Final = "/proc/self/pagemap"
_FLAGS_OVER: Final = 0x02 | 0x10 | 0x4000  # MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE on Linux
_ANONYMOUS: Final = 0x20
_READ_WRITE: Final = 3


def map_private(fd: int, offset: int, size: int) -> mmap.mmap:
    """``size`` bytes of the file from ``offset`` as private writable memory; the file never changes by it.

    Hosts without private mappings get a copy, which costs the time to read it. Raises OSError.
    """
    if sys.platform == "win32":
        memory = mmap.mmap(-1, size)
        with io.FileIO(fd, "rb", closefd=False) as file, memoryview(memory) as view:
            file.seek(offset)
            done = 0
            while done < size:
                count = file.readinto(view[done : done + (64 << 20)])
                if not count:
                    break
                done += count
        return memory
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(fd, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)


def can_map_over() -> bool:
    """Whether `map_over` works on this system."""
    return sys.platform == "linux"


def map_over(hva: int, size: int, fd: int = -1, offset: int = 0) -> bool:
    """Replace whole pages at ``hva``, which must lie in a mapping of ours, by the file's, or by zeroes without ``fd``.

    Returns False where the kernel has no room for one more mapping. Raises OSError.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.mmap
    call.restype = ctypes.c_void_p
    call.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    flags = _FLAGS_OVER | (_ANONYMOUS if fd < 0 else 0)
    if call(hva, size, _READ_WRITE, flags, fd, offset) == hva:
        return True
    code = ctypes.get_errno()
    if code == errno.ENOMEM:
        return False
    raise OSError(code, os.strerror(code))


def private_pages(hva: int, size: int) -> list[tuple[int, int]] | None:
    """Pages of a mapping that are this process's own: written, if it is a private mapping of a file.

    Ascending pairs of first page and number of pages, counted from ``hva``. None where the system does not tell. The
    cost is a small part of a millisecond for 100 MiB.
    """
    if sys.platform != "linux":
        return None
    length = size // PAGE_SIZE * 8
    try:
        fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        raw = bytearray()
        while len(raw) < length:
            piece = os.pread(fd, min(length - len(raw), 1 << 20), hva // PAGE_SIZE * 8 + len(raw))
            if not piece:
                return None
            raw += piece
    except OSError:
        return None
    finally:
        os.close(fd)
    return [(run.start(), run.end() - run.start()) for run in _RUN.finditer(raw[7::8].translate(_PRIVATE))]

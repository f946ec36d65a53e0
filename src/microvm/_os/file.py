"""Positioned vectored file I/O, and giving file blocks back, where the system has them."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import Final

_FALLOC_PUNCH_HOLE: Final = 0x01 | 0x02  # KEEP_SIZE | PUNCH_HOLE, linux/falloc.h
_UNSUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)
_seek_lock: Final = threading.Lock()


def read_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Fill ``views`` from ``offset``. Returns the bytes read, which may be short. Raises OSError.

    Without ``preadv`` the file position moves, under one lock for all files; nobody else may use it.
    """
    if sys.platform != "win32":
        return os.preadv(fd, views, offset)
    with _seek_lock, io.FileIO(fd, "rb", closefd=False) as file:
        file.seek(offset)
        done = 0
        for view in views:
            count = file.readinto(view) or 0
            done += count
            if count < len(view):
                break
        return done


def write_at(fd: int, views: Sequence[memoryview], offset: int) -> int:
    """Write ``views`` at ``offset``. Returns the bytes written, which may be short. Raises OSError."""
    if sys.platform != "win32":
        return os.pwritev(fd, views, offset)
    with _seek_lock, io.FileIO(fd, "wb", closefd=False) as file:
        file.seek(offset)
        done = 0
        for view in views:
            count = file.write(view) or 0
            done += count
            if count < len(view):
                break
        return done


def sync_data(fd: int) -> None:
    """Make what was written durable. Raises OSError."""
    if sys.platform == "linux":
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def punch_hole(fd: int, offset: int, size: int) -> bool:
    """Free the blocks of a range, which then reads as zeroes; the file keeps its size.

    Returns False, and does nothing, where the system or the file system cannot. Raises OSError.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _FALLOC_PUNCH_HOLE, offset, size) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))

"""A raw disk: byte n of the disk is byte n of a file or block device."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Final

from .._os.file import punch_hole, read_at, sync_data, write_at
from ..errors import ConfigError
from ..spec.virtio_blk import SECTOR_SIZE

_IOV_MAX: Final = 1024  # what Linux and macOS take in one call
_ZEROES: Final = memoryview(bytes(1 << 20))

_Call = Callable[[int, Sequence[memoryview], int], int]


class RawDisk:
    """A disk in the open file ``fd``, which becomes ours; ``size`` is in bytes and fixed when it is opened.

    Every method may be called from any thread and raises OSError if the host fails it. Offsets and sizes are bytes
    and inside the disk: the caller has checked them.
    """

    def __init__(self, fd: int, name: str = "disk") -> None:
        self.size = os.lseek(fd, 0, os.SEEK_END)
        if not self.size or self.size % SECTOR_SIZE:
            raise ConfigError(name, self.size, "a raw disk is a positive multiple of 512 bytes long")
        self._fd = fd
        self._can_punch = True

    @property
    def sectors(self) -> int:
        """Size in sectors of 512 bytes."""
        return self.size // SECTOR_SIZE

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        """Fill ``views`` from ``offset``."""
        total = 0
        for view in views:
            total += view.nbytes
        if len(views) <= _IOV_MAX and read_at(self._fd, views, offset) == total:
            return
        self._transfer(read_at, views, offset)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        """Write ``views`` at ``offset``; durable after `flush`."""
        total = 0
        for view in views:
            total += view.nbytes
        if len(views) <= _IOV_MAX and write_at(self._fd, views, offset) == total:
            return
        self._transfer(write_at, views, offset)

    def _transfer(self, call: _Call, views: Sequence[memoryview], offset: int) -> None:
        """The long way: pieces of at most `_IOV_MAX`, going on after a short count. Starts over at the beginning."""
        left = [view for view in views if view.nbytes]
        while left:
            done = call(self._fd, left[:_IOV_MAX], offset)
            if done <= 0:
                raise OSError(errno.EIO, "the disk image is shorter than it was")
            offset += done
            taken = 0
            while taken < len(left) and done >= left[taken].nbytes:
                done -= left[taken].nbytes
                taken += 1
            del left[:taken]
            if done:
                left[0] = left[0][done:]

    def flush(self) -> None:
        """Make all completed writes durable."""
        sync_data(self._fd)

    def discard(self, offset: int, size: int) -> None:
        """The contents do not matter any more. Frees the blocks where the host can, else does nothing."""
        self._punch(offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        """Make the range read as zeroes, freeing its blocks if ``unmap`` and the host can."""
        if unmap and self._punch(offset, size):
            return
        while size:
            piece = min(size, len(_ZEROES))
            self.write([_ZEROES[:piece]], offset)
            offset += piece
            size -= piece

    def _punch(self, offset: int, size: int) -> bool:
        if self._can_punch:
            self._can_punch = punch_hole(self._fd, offset, size)
        return self._can_punch

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

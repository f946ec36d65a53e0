"""Kernel and initrd images as the loaders read them: bytes in memory, or a file read straight into the guest.

Files are read, not mapped: a mapped file that somebody truncates meanwhile would kill the host process with SIGBUS.
Reading into a view of guest memory is the same one copy.
"""

from __future__ import annotations

import io
import mmap
from typing import BinaryIO, Final, Protocol

from ..errors import BootError

# A stream that cannot seek (a pipe) is read into memory first; this bounds an endless one.
STREAM_MAX: Final = 1 << 30

ImageSource = bytes | bytearray | memoryview | mmap.mmap | BinaryIO


class Image(Protocol):
    """Random access to the bytes of one image. ``name`` is what error messages call it."""

    name: str
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """A private copy of exactly ``size`` bytes. Raises BootError if they are not all there."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill ``view`` from ``offset``. Raises BootError if the image ends before."""


class BytesImage:
    """An image that is in memory already."""

    def __init__(self, name: str, data: bytes | bytearray | memoryview | mmap.mmap) -> None:
        self.name = name
        self._view = memoryview(data).cast("B")
        self.size = self._view.nbytes

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._checked(offset, size))

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self._checked(offset, view.nbytes)

    def _checked(self, offset: int, size: int) -> memoryview:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BootError(f"the {self.name} is truncated: {offset + size} bytes needed, {self.size} there")
        return self._view[offset : offset + size]


class FileImage:
    """An image in a seekable file, opened for binary reading. The file stays the caller's."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        self.name = name
        self._file = file
        self.size = file.seek(0, io.SEEK_END)

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise BootError(f"the {self.name} is truncated: {offset + size} bytes needed, {self.size} there")
        data = bytearray(size)
        self.read_into(offset, memoryview(data))
        return bytes(data)

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        try:
            self._file.seek(offset)
            while done < view.nbytes:
                count = self._file.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise BootError(
                        f"the {self.name} is truncated: {offset + view.nbytes} bytes needed, {offset + done} there"
                    )
                done += count
        except OSError as error:
            raise BootError(f"the {self.name} cannot be read: {error.strerror or error}") from error


def open_image(name: str, source: ImageSource) -> Image:
    """Wrap whatever the caller has. Raises BootError if it cannot be read."""
    if isinstance(source, (bytes, bytearray, memoryview, mmap.mmap)):
        return BytesImage(name, source)
    try:
        if source.seekable() and hasattr(source, "readinto"):
            return FileImage(name, source)
        data = source.read(STREAM_MAX + 1)
    except OSError as error:
        raise BootError(f"the {name} cannot be read: {error.strerror or error}") from error
    if len(data) > STREAM_MAX:
        raise BootError(f"the {name} is larger than {STREAM_MAX >> 20} MiB")
    return BytesImage(name, data)

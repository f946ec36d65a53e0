"""Decompressing kernel payloads on the host: by the standard library, and LZ4 and zstd where the host has them.

A kernel that unpacks itself does it on the guest's processor, which is slow when that is software. Whatever cannot be
decoded here is no error: the kernel then does unpack itself. Every decoder is told the size the payload claims and
stops there, so a payload that expands without end costs at most `UNPACKED_MAX`.
"""

from __future__ import annotations

import bz2
import ctypes
import lzma
import zlib
from collections.abc import Callable
from functools import cache
from struct import Struct
from typing import Final

from ..errors import BootError

# The largest vmlinux believed: distribution kernels are 40 to 100 MB, allyesconfig without symbols stays below this.
UNPACKED_MAX: Final = 256 << 20
# XZ dictionaries of kernels reach 128 MiB; the decoder needs a little more than one.
LZMA_MEMORY_MAX: Final = 256 << 20
_LZ4_BLOCK: Final = 8 << 20  # the legacy frame's block size, unpacked
_LZ4_LEGACY: Final = b"\x02\x21\x4c\x18"
_U32: Final = Struct("<I")

Decoder = Callable[[memoryview, int], "bytes | bytearray"]


class Unsupported(Exception):
    """This host has no decoder for the format."""


def _gzip(packed: memoryview, size: int) -> bytes:
    return zlib.decompressobj(31).decompress(packed, size)


def _bzip2(packed: memoryview, size: int) -> bytes:
    return bz2.BZ2Decompressor().decompress(packed, size)


def _xz(packed: memoryview, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, LZMA_MEMORY_MAX).decompress(packed, size)


def _lzma(packed: memoryview, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_ALONE, LZMA_MEMORY_MAX).decompress(packed, size)


def _zstd(packed: memoryview, size: int) -> bytes | bytearray:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
    except ImportError:
        pass
    else:
        data: bytes = zstd.ZstdDecompressor().decompress(packed, size)
        return data
    library = _library("libzstd.so.1", "libzstd.1.dylib", "libzstd.dll")
    out = bytearray(size)
    length = library.ZSTD_decompress
    length.restype = ctypes.c_size_t
    length.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t)
    # A failure is a huge number, so any other result than the claimed size is one.
    if length(_address(out), size, bytes(packed), len(packed)) != size:
        raise ValueError("zstd")
    return out


def _lz4(packed: memoryview, size: int) -> bytearray:
    library = _library("liblz4.so.1", "liblz4.1.dylib", "liblz4.dll")
    decode = library.LZ4_decompress_safe
    decode.restype = ctypes.c_int
    decode.argtypes = (ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    out = bytearray(size)
    address = _address(out)
    position, filled, end = len(_LZ4_LEGACY), 0, len(packed)
    while filled < size and position + 4 <= end:
        (length,) = _U32.unpack_from(packed, position)
        position += 4
        if bytes(packed[position - 4 : position]) == _LZ4_LEGACY:
            continue
        if length == 0 or length > end - position:
            raise ValueError("lz4")
        room = min(_LZ4_BLOCK, size - filled)
        count = decode(bytes(packed[position : position + length]), address + filled, length, room)
        if count <= 0:
            raise ValueError("lz4")
        position += length
        filled += count
    return out if filled == size else out[:filled]


def _address(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))


@cache
def _library(*names: str) -> ctypes.CDLL:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise Unsupported(names[0])


_FORMATS: Final[tuple[tuple[bytes, str, Decoder], ...]] = (
    (b"\x1f\x8b\x08", "gzip", _gzip),
    (b"\xfd7zXZ\x00", "xz", _xz),
    (b"BZh", "bzip2", _bzip2),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (_LZ4_LEGACY, "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def unpack(packed: memoryview) -> bytes | bytearray | None:
    """The payload of a bzImage, unpacked, or None if its format has no decoder on this host.

    Every format ends with the unpacked size: gzip by definition, the others because the kernel's build appends it.
    Raises BootError for a payload that is corrupt or claims more than `UNPACKED_MAX`.
    """
    head = bytes(packed[:8])
    for magic, name, decode in _FORMATS:
        if not head.startswith(magic):
            continue
        if len(packed) < 12:
            raise BootError("the kernel's payload is truncated")
        (size,) = _U32.unpack_from(packed, len(packed) - 4)
        if not 0 < size <= UNPACKED_MAX:
            raise BootError(f"the kernel claims to unpack to {size} bytes, at most {UNPACKED_MAX >> 20} MiB are taken")
        try:
            data = decode(packed if name == "gzip" else packed[:-4], size)
        except Unsupported:
            return None
        except (zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, MemoryError) as error:
            raise BootError(f"the kernel's {name} payload is corrupt") from error
        if len(data) != size:
            raise BootError(f"the kernel's {name} payload is truncated")
        return data
    return None

"""Take the uncompressed kernel out of a bzImage, on the host, once.

[linux] Documentation/arch/x86/boot.rst: ``payload_offset`` and ``payload_length`` of protocol 2.08 say where it is. The
kernel's own decompressor does the same in the guest at ten times the price, and on the software CPU at a hundred.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Final, Protocol

from microvm.errors import BootError
from microvm.images import lz4

VMLINUX_MAX: Final = 512 << 20  # more than any kernel; a hostile payload could inflate without end
_SETUP_SECTS: Final = 0x1F1
_MAGIC: Final = 0x202
_VERSION: Final = 0x206
_PAYLOAD: Final = 0x248
_ELF_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER: Final = struct.Struct("<IIQQQQQQ")


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


_FORMATS: Final[tuple[tuple[bytes, Callable[[], _Decompressor]], ...]] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(31)),
    (b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)),
    (b"\x5d\0\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE)),
    (b"BZh", bz2.BZ2Decompressor),
)


def extract_vmlinux(image: bytes) -> bytes | None:
    """The ELF kernel in a bzImage, or None when its compression is not known here.

    Raises BootError for what is no bzImage or a damaged one.
    """
    if len(image) < _PAYLOAD + 8 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        raise BootError("not a bzImage: it has no Linux boot header")
    if int.from_bytes(image[_VERSION : _VERSION + 2], "little") < 0x208:
        return None
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    start = ((image[_SETUP_SECTS] or 4) + 1) * 512 + offset
    payload = image[start : start + length]
    if not length or len(payload) < length:
        raise BootError("the bzImage is truncated: its payload is not all there")
    if payload.startswith(lz4.MAGIC):
        try:
            return trim_elf(lz4.unpack_legacy(payload, VMLINUX_MAX))
        except ValueError as error:
            raise BootError(f"the bzImage is damaged: {error}") from error
    for magic, decompressor in _FORMATS:
        if payload.startswith(magic):
            return trim_elf(_inflate(payload, decompressor()))
    return trim_elf(payload) if payload.startswith(b"\x7fELF") else None


def _inflate(payload: bytes, decompressor: _Decompressor) -> bytes:
    try:
        out = decompressor.decompress(payload, VMLINUX_MAX + 1)
    except (zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise BootError(f"the bzImage is damaged: {error}") from error
    if len(out) > VMLINUX_MAX:
        raise BootError(f"the bzImage unpacks to more than {VMLINUX_MAX >> 20} MiB")
    if not decompressor.eof:
        raise BootError("the bzImage is damaged: its payload is cut off")
    return out


def trim_elf(data: bytes) -> bytes:
    """The ELF file without what follows it (the relocations of a movable kernel, which nobody needs who does not move
    it). Raises BootError when it is not a sound ELF file for x86-64."""
    if len(data) < _ELF_HEADER.size or data[:6] != b"\x7fELF\x02\x01":
        raise BootError("the payload of the bzImage is not a 64-bit ELF kernel")
    header = _ELF_HEADER.unpack_from(data)
    phoff, shoff, phentsize, phnum, shentsize, shnum = header[5], header[6], *header[9:13]
    if phentsize != _PROGRAM_HEADER.size or not phnum or phoff + phnum * phentsize > len(data):
        raise BootError("the ELF kernel has damaged program headers")
    end = max(phoff + phnum * phentsize, shoff + shnum * shentsize)
    for index in range(phnum):
        segment = _PROGRAM_HEADER.unpack_from(data, phoff + index * phentsize)
        end = max(end, segment[2] + segment[5])
    if end > len(data):
        raise BootError("the ELF kernel is truncated")
    return data[:end]

"""A small encoder for ACPI Machine Language: enough for a DSDT of devices, resources and event methods. [acpi-6.4] 20

Each function returns the encoding of one term, so a table reads like its source:

    device("COM1", name("_HID", eisa_id("PNP0501")), name("_CRS", resources(io(0x3F8, 8), interrupt(4))))
"""

from __future__ import annotations

import re
from struct import pack
from typing import Final

ARG0: Final = b"\x68"
_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_EISA: Final = re.compile(r"[A-Z]{3}[0-9A-F]{4}")
_END_TAG: Final = b"\x79\x00"  # a checksum of zero means: not checked


def integer(value: int) -> bytes:
    """A constant in its shortest form. 20.2.3"""
    if value < 0 or value >> 64:
        raise ValueError(f"no AML integer: {value}")
    if value < 2:
        return bytes([value])
    if value < 1 << 8:
        return b"\x0a" + pack("<B", value)
    if value < 1 << 16:
        return b"\x0b" + pack("<H", value)
    if value < 1 << 32:
        return b"\x0c" + pack("<I", value)
    return b"\x0e" + pack("<Q", value)


def string(value: str) -> bytes:
    """An ASCII string constant. 20.2.3"""
    data = value.encode("ascii")
    if b"\0" in data:
        raise ValueError("an AML string holds no NUL")
    return b"\x0d" + data + b"\0"


def path(value: str) -> bytes:
    r"""A name such as ``_CRS``, ``\_SB.PWRB`` or ``^GED``; segments are padded with underscores. 20.2.2"""
    bare = value.lstrip("\\^")
    prefix = value[: len(value) - len(bare)].encode("ascii")
    if b"\\" in prefix and len(prefix) > 1:
        raise ValueError(f"no AML name: {value}")
    if not bare:
        return prefix + b"\0"
    segments = bare.split(".")
    if len(segments) > 255 or not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(f"no AML name: {value}")
    joined = b"".join(segment.ljust(4, "_").encode("ascii") for segment in segments)
    if len(segments) == 1:
        return prefix + joined
    if len(segments) == 2:
        return prefix + b"\x2e" + joined
    return prefix + b"\x2f" + bytes([len(segments)]) + joined


def _packaged(opcode: bytes, body: bytes) -> bytes:
    """``opcode``, the package length, which counts its own bytes, and ``body``. 20.2.4"""
    length = len(body) + 1
    if length <= 0x3F:
        return opcode + bytes([length]) + body
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return opcode + bytes([extra << 6 | length & 0xF]) + (length >> 4).to_bytes(extra, "little") + body
    raise ValueError("an AML package is at most 256 MiB")


def name(identifier: str, value: bytes) -> bytes:
    return b"\x08" + path(identifier) + value


def scope(identifier: str, *terms: bytes) -> bytes:
    return _packaged(b"\x10", path(identifier) + b"".join(terms))


def device(identifier: str, *terms: bytes) -> bytes:
    return _packaged(b"\x5b\x82", path(identifier) + b"".join(terms))


def method(identifier: str, arguments: int, *terms: bytes, serialized: bool = False) -> bytes:
    flags = arguments | (8 if serialized else 0)
    return _packaged(b"\x14", path(identifier) + bytes([flags]) + b"".join(terms))


def when(predicate: bytes, *terms: bytes) -> bytes:
    """``If (predicate) { terms }``."""
    return _packaged(b"\xa0", predicate + b"".join(terms))


def equal(left: bytes, right: bytes) -> bytes:
    return b"\x93" + left + right


def notify(target: str, value: int) -> bytes:
    return b"\x86" + path(target) + integer(value)


def package(*elements: bytes) -> bytes:
    if len(elements) > 255:
        raise ValueError("an AML package has at most 255 elements")
    return _packaged(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    return _packaged(b"\x11", integer(len(data)) + data)


def eisa_id(value: str) -> bytes:
    """A seven-character id such as ``PNP0501``, packed into 32 bits. 19.3.4"""
    if not _EISA.fullmatch(value):
        raise ValueError(f"no EISA id: {value}")
    vendor = 0
    for letter in value[:3]:
        vendor = vendor << 5 | ord(letter) - 0x40
    return b"\x0c" + pack(">HH", vendor, int(value[3:], 16))


def resources(*descriptors: bytes) -> bytes:
    """A resource template. 6.4"""
    return buffer(b"".join(descriptors) + _END_TAG)


def memory32_fixed(gpa: int, size: int) -> bytes:
    """``size`` bytes of writable device memory at ``gpa``. 6.4.3.4"""
    return pack("<BHBII", 0x86, 9, 1, gpa, size)


def io(port: int, count: int) -> bytes:
    """``count`` ports from ``port``, 16 address bits decoded. 6.4.2.5"""
    return pack("<BBHHBB", 0x47, 1, port, port, 1, count)


def interrupt(*gsis: int) -> bytes:
    """Edge-triggered, active high, exclusive interrupts of a consumer. 6.4.3.6"""
    flags = 0b0011
    return pack(f"<BHBB{len(gsis)}I", 0x89, 2 + 4 * len(gsis), flags, len(gsis), *gsis)

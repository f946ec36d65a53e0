"""Unpack LZ4's legacy frames, which is how Debian compresses its kernels and what the standard library lacks.

[lz4] doc/lz4_Block_format.md, and "Legacy frame" in doc/lz4_Frame_format.md. A few seconds for a kernel, once.
"""

from __future__ import annotations

from typing import Final

MAGIC: Final = b"\x02\x21\x4c\x18"
BLOCK_MAX: Final = 8 << 20  # a legacy block unpacks to no more


def unpack_legacy(data: bytes, limit: int) -> bytes:
    """The content of a legacy frame; what follows its last block (a kernel appends its length) is left alone.

    Raises ValueError when it is damaged or unpacks to more than ``limit`` bytes.
    """
    if not data.startswith(MAGIC):
        raise ValueError("no legacy frame")
    out: list[bytes] = []
    total, at = 0, len(MAGIC)
    while at + 4 < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if size > len(data) - at:
            # The last four bytes of the payload are the kernel's length, not a block.
            raise ValueError("a block is cut off")
        block = unpack_block(data[at : at + size], BLOCK_MAX)
        at += size
        total += len(block)
        if total > limit:
            raise ValueError("it unpacks to too much")
        out.append(block)
    return b"".join(out)


def unpack_block(block: bytes, limit: int) -> bytes:
    """One block's content. Raises ValueError when it is damaged or longer than ``limit`` bytes unpacked."""
    out = bytearray()
    at, end = 0, len(block)
    try:
        while at < end:
            token = block[at]
            at += 1
            length = token >> 4
            if length == 15:
                more = 255
                while more == 255:
                    more = block[at]
                    at += 1
                    length += more
            if length:
                if length > end - at:
                    raise ValueError("literals are cut off")
                out += block[at : at + length]
                at += length
            if at >= end:
                break
            distance = block[at] | block[at + 1] << 8
            at += 2
            length = (token & 15) + 4
            if length == 19:
                more = 255
                while more == 255:
                    more = block[at]
                    at += 1
                    length += more
            start = len(out) - distance
            if start < 0 or not distance:
                raise ValueError("a match before the beginning")
            if length > limit:
                raise ValueError("a block unpacks to too much")
            if distance >= length:
                out += out[start : start + length]
            else:
                # An overlapping match repeats the last bytes.
                out += (out[start:] * (length // distance + 1))[:length]
            if len(out) > limit:
                raise ValueError("a block unpacks to too much")
    except IndexError:
        raise ValueError("a block is cut off") from None
    return bytes(out)

from __future__ import annotations

import pytest

from microvm.images import lz4

from . import builders


@pytest.mark.parametrize("size", [0, 1, 14, 15, 16, 269, 270, 271, 1000])
def test_stored_data_reads_back(size: int) -> None:
    data = bytes(index * 7 & 255 for index in range(size))
    assert lz4.unpack_legacy(builders.lz4_stored(data), 4096) == data


def test_matches_copy_what_was_written() -> None:
    # "abcd" as literals, then 4 bytes from 4 back, then the last literal.
    assert lz4.unpack_block(b"\x40abcd\x04\x00\x10x", 100) == b"abcdabcdx"


def test_an_overlapping_match_repeats() -> None:
    # One literal, then 4 + 15 + 3 bytes from 1 back.
    assert lz4.unpack_block(b"\x1fa\x01\x00\x03\x10b", 100) == b"a" * 23 + b"b"
    assert lz4.unpack_block(b"\x33abc\x03\x00\x00", 100) == b"abc" + b"abcabca"


def test_output_of_the_lz4_tool_reads_back() -> None:
    # lz4 1.9.4, `lz4 -l -9`
    frame = bytes.fromhex(
        "02214c18470000008f6d6963726f766d20080045fe1d656e642e000102030405060708090a0b0c0d"
        "0e0f101112131415161718191a1b1c1d1e1f20212223242526278c000f0800ff1750726f766d20"
    )
    assert lz4.unpack_legacy(frame, 4096) == b"microvm " * 12 + b"end." + bytes(range(40)) + b"microvm " * 40


@pytest.mark.parametrize(
    "block",
    [b"\x40abc", b"\x40abcd\x05\x00\x00", b"\x40abcd\x00\x00\x00", b"\xf0", b"\x4fabcd\x04\x00", b"\x40abcd\x04"],
    ids=["literals", "before the start", "distance 0", "length", "match length", "distance"],
)
def test_damage_is_found(block: bytes) -> None:
    with pytest.raises(ValueError, match=r"cut off|before"):
        lz4.unpack_block(block, 100)


def test_a_bomb_stops_at_the_limit() -> None:
    bomb = b"\x1fa\x01\x00" + b"\xff" * 1000 + b"\x00" + b"\x10b"
    with pytest.raises(ValueError, match="too much"):
        lz4.unpack_block(bomb, 10_000)
    with pytest.raises(ValueError, match="too much"):
        lz4.unpack_legacy(builders.lz4_stored(b"x" * 100), 99)

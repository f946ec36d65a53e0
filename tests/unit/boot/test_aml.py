"""AML against encodings known from iasl."""

from __future__ import annotations

import pytest

from microvm.boot import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integer_takes_its_shortest_form(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


def test_names_are_padded_and_prefixed() -> None:
    assert aml.path("GED") == b"GED_"
    assert aml.path("\\_SB.PWRB") == b"\\\x2e_SB_PWRB"
    assert aml.path("^^A.B.C") == b"^^\x2f\x03A___B___C___"
    assert aml.path("\\") == b"\\\0"


@pytest.mark.parametrize("bad", ["lower", "TOOLONG", "1ABC", "A..B", "^\\A", "\\\\A"])
def test_bad_name_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="no AML name"):
        aml.path(bad)


def test_eisa_id_is_packed() -> None:
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.eisa_id("PNP0C0C").hex() == "0c41d00c0c"


@pytest.mark.parametrize("body", [0, 0x3C, 0x3D, 0x3E, 0xFFA, 0xFFB, 0xFFC, 0x1000, 0xFFFFA, 0x100000])
def test_package_length_counts_itself(body: int) -> None:
    encoded = aml.scope("\\", b"\x00" * body)
    lead = encoded[1]
    extra = lead >> 6
    length = lead & 0x3F if not extra else (lead & 0xF) | int.from_bytes(encoded[2 : 2 + extra], "little") << 4
    assert length == len(encoded) - 1
    assert (extra == 0) == (length <= 0x3F)


def test_resources_match_the_specification() -> None:
    assert aml.io(0x3F8, 8).hex() == "4701f803f8030108"
    assert aml.interrupt(4).hex() == "890600030104000000"
    assert aml.memory32_fixed(0xC0000000, 0x1000).hex() == "86090001000000c000100000"
    assert aml.resources(aml.io(0x3F8, 8)).hex() == "110d0a0a" + "4701f803f8030108" + "7900"


def test_string_holds_ascii_only() -> None:
    assert aml.string("LNRO0005") == b"\x0dLNRO0005\0"
    with pytest.raises(ValueError):
        aml.string("é")
    with pytest.raises(ValueError):
        aml.string("a\0b")

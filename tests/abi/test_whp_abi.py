"""Every size, offset, bit and number of `hypervisor/whp` against Microsoft's headers.

``whp_abi.json`` was taken with libclang (x86_64-windows) from the headers that Microsoft publishes under the MIT
licence (MicrosoftDocs/Virtualization-Documentation, commit 77e0742a); it holds data only. Offsets and widths are bits.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import pytest

from microvm.hypervisor.whp import abi, api, codes

DATA = json.loads((Path(__file__).parent / "whp_abi.json").read_text())
TYPES: dict[str, Any] = DATA["types"]


def layout(kind: Any, base: int = 0) -> dict[str, tuple[int, int]]:
    """Offset and width in bits of every field, nested ones by dotted names; anonymous members are transparent."""
    found: dict[str, tuple[int, int]] = {}
    anonymous = getattr(kind, "_anonymous_", ())
    for name, field_type, *width in kind._fields_:
        descriptor = getattr(kind, name)
        at = base + 8 * descriptor.offset
        bits = 8 * ctypes.sizeof(field_type)
        if width:
            bits, at = descriptor.size >> 16, at + (descriptor.size & 0xFFFF)
        inner = layout(field_type, at) if hasattr(field_type, "_fields_") else {}
        if name in anonymous:
            found |= inner
        else:
            found[name] = (at, bits)
            found |= {f"{name}.{key}": value for key, value in inner.items()}
    return found


@pytest.mark.parametrize("name", sorted(TYPES))
def test_type_is_laid_out_as_in_the_headers(name: str) -> None:
    ours = getattr(abi, name)
    expected = TYPES[name]
    assert ctypes.sizeof(ours) == expected["size"]
    found = layout(ours)
    for field, offset, width in expected["fields"]:
        assert found.pop(field) == (offset, width), field
    assert not found, "fields the headers do not have"


@pytest.mark.parametrize("name", sorted(DATA["enums"]))
def test_number_is_that_of_the_headers(name: str) -> None:
    assert getattr(codes, name) == DATA["enums"][name]


def test_result_codes_are_those_of_the_headers() -> None:
    for name, value in DATA["hresult"].items():
        assert getattr(codes, name) == value & 0xFFFF_FFFF
    ours = {name for name in vars(codes) if name.startswith(("WHV_E_", "ERROR_HV_"))}
    assert ours == set(DATA["hresult"])


def test_no_number_of_ours_is_made_up() -> None:
    ours = {name for name in vars(codes) if name.startswith("WHv")}
    assert ours == set(DATA["enums"])


@pytest.mark.parametrize("size", [1, 16, 160, 4096])
@pytest.mark.parametrize("alignment", [16, 4096])
def test_buffers_are_aligned_and_zeroed(size: int, alignment: int) -> None:
    for _ in range(20):
        buffer = api.aligned(size, alignment)
        assert ctypes.addressof(buffer) % alignment == 0
        assert bytes(buffer) == bytes(size)


def test_ctypes_alone_would_not_align() -> None:
    """Why `api.aligned` exists: the declared alignment of 16 cannot be told to ctypes."""
    assert TYPES["WHV_REGISTER_VALUE"]["align"] == 16
    assert ctypes.alignment(abi.WHV_REGISTER_VALUE) < 16

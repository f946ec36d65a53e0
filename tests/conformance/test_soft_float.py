"""Floating point done by the shim gives the library's own result and flags, for every kind of operand."""

from __future__ import annotations

import ctypes
import itertools
import random

import pytest

from microvm.errors import BackendUnavailable
from microvm.hypervisor.soft import library

INEXACT = 0x20
SPECIAL64 = [0, 1, 0xF_FFFF_FFFF_FFFF, 0x10_0000_0000_0000, 0x10_0000_0000_0001, 0x3FF0_0000_0000_0000]
SPECIAL64 += [0x3CA0_0000_0000_0000, 0x7FE0_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000]
SPECIAL64 += [0x7FF0_0000_0000_0001, 0x7FF8_0000_0000_0000, 0x4340_0000_0000_0001, 0x3FF5_5555_5555_5555]
SPECIAL32 = [0, 1, 0x7F_FFFF, 0x80_0000, 0x80_0001, 0x3F80_0000, 0x7F00_0000, 0x7F7F_FFFF, 0x7F80_0000, 0x7F80_0001]
SPECIAL32 += [0x7FC0_0000, 0x3FAA_AAAA, 0x3300_0000]


def libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The shim, and the library it stands before; a name found in the second by handle is the original."""
    try:
        shim = library.load()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return shim, ctypes.CDLL(library.engine_path())


def operands(bits: int) -> list[int]:
    sign = 1 << (bits - 1)
    special = SPECIAL64 if bits == 64 else SPECIAL32
    generator = random.Random(bits)
    return [*special, *(value | sign for value in special), *(generator.getrandbits(bits) for _ in range(40))]


@pytest.mark.parametrize("bits", [64, 32])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "compare", "compare_quiet", "sqrt"])
def test_result_and_flags_are_the_librarys_own(bits: int, name: str) -> None:
    if (bits, name) == (32, "sqrt"):
        pytest.skip("left to the library")
    shim, engine = libraries()
    word = ctypes.c_uint64 if bits == 64 else ctypes.c_uint32
    symbol = f"float{bits}_{name}_x86_64"
    count = 1 if name == "sqrt" else 2
    ours, theirs = getattr(shim, symbol), getattr(engine, symbol)
    assert ctypes.cast(ours, ctypes.c_void_p).value != ctypes.cast(theirs, ctypes.c_void_p).value
    for function in (ours, theirs):
        function.restype = ctypes.c_int if "compare" in name else word
        function.argtypes = [word] * count + [ctypes.c_void_p]
    for flags, rounding, flush in itertools.product((0, INEXACT), (0, 1, 3), (0, 1)):
        start = bytes([0, rounding, flags, 80, flush, flush, 0, 0])
        for values in itertools.product(operands(bits), repeat=count):
            status = [ctypes.create_string_buffer(start, 8) for _ in range(2)]
            results = [f(*values, s) for f, s in zip((ours, theirs), status, strict=True)]
            assert (results[0], status[0].raw) == (results[1], status[1].raw), [hex(v) for v in values]

from __future__ import annotations

import struct
import sys

import pytest

from microvm.errors import ConfigError, GuestMemoryError
from microvm.memory import GuestMemory
from microvm.memory.guest import HOLE_END, HOLE_START

SIZE = 1 << 20
TOP = 1 << 64


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.allocate(SIZE)


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (SIZE, 1),
        (SIZE - 1, 2),
        (0, SIZE + 1),
        (TOP - 1, 1),
        (TOP - 8, 16),
        (TOP, 8),
        (16, TOP - 8),
        (SIZE, TOP - SIZE),
        (-1, 2),
        (8, -4),
    ],
)
def test_ranges_outside_memory_are_guest_errors(memory: GuestMemory, gpa: int, size: int) -> None:
    for access in (memory.region_of, memory.view, memory.read):
        with pytest.raises(GuestMemoryError):
            access(gpa, size)


def test_records_and_words_outside_memory_are_guest_errors(memory: GuestMemory) -> None:
    with pytest.raises(GuestMemoryError):
        memory.unpack(struct.Struct("<QQ"), SIZE - 8)
    with pytest.raises(GuestMemoryError):
        memory.write(SIZE - 2, b"abc")
    for access in (memory.load_u16, memory.load_u32, memory.load_u64):
        with pytest.raises(GuestMemoryError):
            access(SIZE - 1)
        with pytest.raises(GuestMemoryError):
            access(1)
    assert memory.read(SIZE - 2, 2) == b"\0\0"


def test_a_range_over_the_hole_is_a_guest_error() -> None:
    memory = GuestMemory.allocate(HOLE_START + SIZE)
    try:
        memory.region_of(HOLE_START - 4, 4)
        memory.region_of(HOLE_END, SIZE)
        for gpa, size in ((HOLE_START - 4, 8), (HOLE_START, 1), (HOLE_END - 1, 1), (HOLE_START - 4, SIZE + (1 << 30))):
            with pytest.raises(GuestMemoryError):
                memory.region_of(gpa, size)
    finally:
        memory.close()


def test_a_copy_does_not_change_with_the_guest(memory: GuestMemory) -> None:
    memory.write(64, b"before")
    copy = memory.read(64, 6)
    memory.write(64, b"after!")
    assert copy == b"before"


def test_only_whole_pages_are_given_back(memory: GuestMemory) -> None:
    memory.write(0, b"x" * 8192)
    memory.discard(4096, 4096)
    assert memory.read(4095, 2) == b"x\0"
    for gpa, size in ((1, 4096), (0, 100)):
        with pytest.raises(GuestMemoryError):
            memory.discard(gpa, size)


@pytest.mark.skipif(sys.platform == "win32", reason="there the pages go with the last view")
def test_closing_frees_the_pages_even_under_a_view_that_is_left() -> None:
    memory = GuestMemory.allocate(SIZE)
    memory.write(0, b"secret")
    view = memory.view(0, 6)
    memory.close()
    assert bytes(view) == bytes(6)


@pytest.mark.parametrize("size", [0, -4096, 4095])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        GuestMemory.allocate(size)

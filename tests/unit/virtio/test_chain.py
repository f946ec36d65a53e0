from __future__ import annotations

from struct import Struct

import pytest

from microvm.errors import VirtqueueError
from microvm.memory import GuestMemory
from microvm.virtio import Chain, Queue

A, B, C = 0x1000, 0x2000, 0x3000


def chain_of(readable: list[tuple[int, int]], writable: list[tuple[int, int]]) -> tuple[Chain, GuestMemory]:
    memory = GuestMemory.allocate(1 << 20)
    queue = Queue(memory, 0, "test", 8)
    total_readable, total_writable = sum(size for _, size in readable), sum(size for _, size in writable)
    return Chain(queue, memory, 0, readable, total_readable, writable, total_writable), memory


def test_read_goes_on_across_segments() -> None:
    chain, memory = chain_of([(A, 4), (B, 4)], [])
    memory.write(A, b"abcd")
    memory.write(B, b"efgh")
    assert [chain.read(3), chain.read(3), chain.read(3), chain.read(3)] == [b"abc", b"def", b"gh", b""]


def test_a_header_may_be_split_over_segments() -> None:
    chain, memory = chain_of([(A, 1), (B, 7)], [])
    memory.write(A, b"\1")
    memory.write(B, b"\2\3\4\5\0\0\0")
    assert chain.unpack(Struct("<II")) == (0x04030201, 5)
    assert chain.unread == 0


def test_a_short_header_is_a_guest_error() -> None:
    chain, _ = chain_of([(A, 7)], [])
    with pytest.raises(VirtqueueError, match="header of 8"):
        chain.unpack(Struct("<II"))


def test_read_all_refuses_more_than_its_cap() -> None:
    chain, _ = chain_of([(A, 8), (B, 8)], [])
    with pytest.raises(VirtqueueError, match="at most 15"):
        chain.read_all(15)
    assert len(chain.read_all(16)) == 16


def test_write_goes_on_across_segments_and_drops_the_excess() -> None:
    chain, memory = chain_of([], [(A, 4), (B, 4)])
    assert chain.write(b"abc") == 3
    assert chain.write(b"defghi") == 8
    assert chain.written == 8
    assert memory.read(A, 4) + memory.read(B, 5) == b"abcdefgh\0"


def test_write_at_leaves_the_cursor_alone() -> None:
    chain, memory = chain_of([], [(A, 4), (B, 4)])
    assert chain.write_at(3, b"xyz") == 3
    assert chain.write_at(7, b"12") == 1
    assert chain.write_at(8, b"3") == 0
    assert chain.written == 0
    assert memory.read(A, 4) + memory.read(B, 4) == b"\0\0\0xyz\0" + b"1"


def test_write_last_stores_the_status_byte() -> None:
    chain, memory = chain_of([], [(A, 4), (B, 4)])
    chain.write_last(7)
    assert memory.read(B, 4) == b"\0\0\0\7"


def test_write_last_without_room_is_a_guest_error() -> None:
    chain, _ = chain_of([(A, 4)], [])
    with pytest.raises(VirtqueueError):
        chain.write_last(0)


@pytest.mark.parametrize(
    ("offset", "size", "expected"),
    [
        (0, None, [4, 4, 4]),
        (0, 4, [4]),
        (0, 0, []),
        (4, None, [4, 4]),
        (2, 4, [2, 2]),
        (3, 9, [1, 4, 4]),
        (12, None, []),
        (0, 99, [4, 4, 4]),
    ],
)
def test_views_cover_exactly_what_was_asked(offset: int, size: int | None, expected: list[int]) -> None:
    chain, _ = chain_of([(A, 4), (B, 4), (C, 4)], [(A, 4), (B, 4), (C, 4)])
    assert [len(view) for view in chain.readable_views(offset, size)] == expected
    assert [len(view) for view in chain.writable_views(offset, size)] == expected

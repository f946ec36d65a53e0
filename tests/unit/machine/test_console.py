"""A console keeps a bounded past and gives output out once."""

from __future__ import annotations

import pytest

from microvm.machine.console import Console


def test_read_gives_each_byte_once() -> None:
    console = Console()
    console.feed(b"one ")
    console.feed(b"two")
    assert console.read() == b"one two"
    assert console.read(0) == b""
    console.feed(b"three")
    assert console.read() == b"three"


def test_tail_keeps_what_was_read() -> None:
    console = Console()
    console.feed(b"hello")
    console.read()
    assert console.tail() == b"hello"
    assert console.tail(2) == b"lo"
    assert console.tail(0) == b""


def test_flood_is_bounded_and_counted() -> None:
    console = Console(scrollback=10)
    for _ in range(1000):
        console.feed(b"0123456789abcdef")
    assert console.tail() == b"6789abcdef"
    assert console.dropped == 16000 - 10
    assert console.read() == b"6789abcdef"


def test_dropping_what_was_read_is_no_loss() -> None:
    console = Console(scrollback=4)
    console.feed(b"abcd")
    console.read()
    console.feed(b"efg")
    assert console.dropped == 0
    assert console.read() == b"efg"


def test_read_until_stops_after_the_text() -> None:
    console = Console()
    console.feed(b"login: rest")
    assert console.read_until(b"login: ") == b"login: "
    assert console.read() == b"rest"


def test_read_until_finds_text_only_once() -> None:
    console = Console()
    console.feed(b"$ ")
    console.read_until(b"$ ")
    with pytest.raises(TimeoutError):
        console.read_until(b"$ ", 0.01)


def test_closed_console_ends_readers() -> None:
    console = Console()
    console.feed(b"last")
    console.close()
    with pytest.raises(EOFError):
        console.read_until(b"more")
    assert console.read() == b"last"
    assert console.read() == b""


def test_listener_hears_past_and_future_until_it_leaves() -> None:
    heard: list[bytes] = []
    console = Console()
    console.feed(b"past")
    leave = console.on_output(heard.append, replay=True)
    console.feed(b"now")
    leave()
    leave()
    console.feed(b"later")
    assert heard == [b"past", b"now"]


def test_typing_goes_to_the_device() -> None:
    typed: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    console = Console()
    assert console.write(b"nobody there") == 0

    def take(data: bytes) -> int:
        typed.append(data)
        return len(data)

    console.connect(take, lambda columns, rows: sizes.append((columns, rows)))
    assert console.write(b"ls\n") == 3
    assert console.write(b"") == 0
    console.resize(80, 24)
    assert typed == [b"ls\n"]
    assert sizes == [(80, 24)]


def test_typing_waits_for_room() -> None:
    typed = bytearray()
    console = Console()

    def take(data: bytes) -> int:
        typed.extend(data[:3])
        console.room()
        return min(3, len(data))

    console.connect(take)
    assert console.write(b"0123456789") == 10
    assert typed == b"0123456789"


def test_typing_to_a_guest_that_does_not_read_ends_in_time() -> None:
    console = Console()
    console.connect(lambda data: 0)
    assert console.write(b"abc", timeout_s=0.01) == 0


def test_typing_ends_with_the_machine() -> None:
    console = Console()

    def take(data: bytes) -> int:
        console.close()
        return 0

    console.connect(take)
    assert console.write(b"abc") == 0

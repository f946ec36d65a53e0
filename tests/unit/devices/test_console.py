from __future__ import annotations

import dataclasses

import pytest

from microvm.devices.console import INPUT_MAX, OUTPUT_MAX, Console
from microvm.errors import SnapshotError
from microvm.memory import GuestMemory
from microvm.spec.virtio import InterruptBit
from microvm.testing import FakeDriver


class Terminal:
    def __init__(self) -> None:
        self.printed = b""
        self.rooms = 0
        self.console = Console(self.output, self.room)
        self.driver = FakeDriver(self.console)

    def output(self, data: bytes) -> None:
        self.printed += data

    def room(self) -> None:
        self.rooms += 1

    def received(self) -> bytes:
        return b"".join(used.data for used in self.driver.collect("receive"))


@pytest.fixture
def terminal() -> Terminal:
    terminal = Terminal()
    terminal.driver.start()
    return terminal


def test_output_arrives_in_order(terminal: Terminal) -> None:
    for line in (b"one\n", b"two\n"):
        terminal.driver.request("transmit", line)
    terminal.driver.request("transmit", [b"thr", b"ee\n"])
    assert terminal.printed == b"one\ntwo\nthree\n"


def test_an_output_request_beyond_the_cap_needs_a_reset() -> None:
    terminal = Terminal()
    terminal.driver = FakeDriver(Console(terminal.output), memory=GuestMemory.allocate(8 << 20)).start()
    terminal.driver.request("transmit", bytes(OUTPUT_MAX))
    assert len(terminal.printed) == OUTPUT_MAX
    terminal.driver.add("transmit", bytes(OUTPUT_MAX + 1))
    terminal.driver.notify("transmit")
    assert terminal.driver.needs_reset
    assert len(terminal.printed) == OUTPUT_MAX


def test_input_fills_the_buffers_that_wait(terminal: Terminal) -> None:
    for _ in range(3):
        terminal.driver.add("receive", writable=4)
    assert terminal.console.feed(b"hello world") == 11
    assert terminal.received() == b"hello world"
    assert terminal.driver.irq.pulses == 1


def test_input_waits_for_buffers(terminal: Terminal) -> None:
    terminal.console.feed(b"typed ahead")
    terminal.driver.add("receive", writable=64)
    terminal.driver.notify("receive")
    assert terminal.received() == b"typed ahead"


def test_input_typed_before_the_driver_is_up_is_delivered() -> None:
    terminal = Terminal()
    terminal.console.feed(b"early")
    terminal.driver.start()
    terminal.driver.add("receive", writable=64)
    terminal.driver.notify("receive")
    assert terminal.received() == b"early"


def test_input_is_bounded_and_room_is_announced_once(terminal: Terminal) -> None:
    assert terminal.console.feed(bytes(INPUT_MAX - 1)) == INPUT_MAX - 1
    assert terminal.console.feed(b"abc") == 1
    assert terminal.console.feed(b"bc") == 0
    assert terminal.rooms == 0
    for _ in range(2):
        terminal.driver.add("receive", writable=16)
        terminal.driver.notify("receive")
    assert terminal.rooms == 1
    assert terminal.console.feed(bytes(64)) == 32


def test_a_buffer_without_room_does_not_stop_input(terminal: Terminal) -> None:
    terminal.driver.add("receive", b"not writable")
    terminal.driver.add("receive", writable=16)
    terminal.console.feed(b"hello")
    assert terminal.received() == b"hello"


def test_resizing_is_announced(terminal: Terminal) -> None:
    assert terminal.driver.config(0, 4) == 25 << 16 | 80
    terminal.console.resize(132, 50)
    assert terminal.driver.take_interrupts() == InterruptBit.CONFIG_CHANGE
    assert (terminal.driver.config(0, 2), terminal.driver.config(2, 2)) == (132, 50)
    terminal.console.resize(1 << 20, -1)
    assert (terminal.driver.config(0, 2), terminal.driver.config(2, 2)) == (0xFFFF, 0)


def test_a_broken_receive_ring_is_contained(terminal: Terminal) -> None:
    terminal.driver.offer("receive", 500)
    terminal.console.feed(b"x")
    assert terminal.driver.needs_reset


def test_undelivered_input_and_size_survive_a_restore(terminal: Terminal) -> None:
    terminal.console.feed(b"pending")
    terminal.console.resize(100, 40)
    terminal.driver.move_to(Console(terminal.output))
    terminal.driver.add("receive", writable=64)
    terminal.driver.notify("receive")
    assert terminal.received() == b"pending"
    assert terminal.driver.config(0, 4) == 40 << 16 | 100


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"input": "text", "columns": 1, "rows": 1},
        {"input": bytes(INPUT_MAX + 1), "columns": 1, "rows": 1},
        {"input": b"", "columns": None, "rows": 1},
    ],
)
def test_a_saved_state_that_is_not_one_is_refused(terminal: Terminal, extra: dict[str, object]) -> None:
    state = dataclasses.replace(terminal.console.save(), extra=extra)
    with pytest.raises(SnapshotError):
        terminal.console.restore(state)

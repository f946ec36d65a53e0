"""The 16550A, driven as Linux's 8250 driver drives it."""

from __future__ import annotations

import pytest

from microvm.devices.serial import INPUT_MAX, Serial
from microvm.irq import NullIrq

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
DTR_RTS_OUT2 = 0x0B


class EdgeIrq(NullIrq):
    """Counts rising edges, as an edge-triggered pin does."""

    def set_level(self, level: bool) -> None:
        self.pulses += level and not self.level
        self.level = level


class Port(Serial):
    def __init__(self) -> None:
        self.sent = bytearray()
        self.line = EdgeIrq()
        self.latched: list[tuple[int, int]] = []
        super().__init__(self.sent.extend, self.line, lambda offset, value: self.latched.append((offset, value)))

    def get(self, offset: int) -> int:
        return self.pio_read(offset, 1)

    def put(self, offset: int, value: int) -> None:
        self.pio_write(offset, 1, value)

    def open(self) -> None:
        """What serial8250_do_startup and uart_set_mctrl do."""
        self.put(IIR, 1)
        self.put(IIR, 7)
        self.put(IIR, 0)
        for register in (LSR, DATA, IIR, MSR):
            self.get(register)
        self.put(LCR, 3)
        self.put(MCR, 8)
        self.put(IIR, 1)
        self.put(IER, 5)
        self.put(MCR, DTR_RTS_OUT2)


@pytest.fixture
def port() -> Port:
    return Port()


def test_output_goes_out_byte_by_byte(port: Port) -> None:
    for value in b"hi\n":
        assert port.get(LSR) == 0x60
        port.put(DATA, value)
    assert port.sent == b"hi\n"


def test_divisor_hides_behind_dlab(port: Port) -> None:
    port.put(LCR, 0x83)
    port.put(DATA, 0x34)
    port.put(IER, 0x12)
    assert (port.get(DATA), port.get(IER)) == (0x34, 0x12)
    port.put(LCR, 3)
    assert port.get(IER) == 0
    assert port.sent == b""


def test_driver_finds_a_16550a(port: Port) -> None:
    port.put(SCR, 0x5A)
    assert port.get(SCR) == 0x5A
    port.put(IER, 0xFF)
    assert port.get(IER) == 0x0F
    port.put(IER, 0)
    port.put(MCR, 0x10 | 0x0A)
    assert port.get(MSR) & 0xF0 == 0x90
    port.put(MCR, 0)
    port.put(IIR, 1)
    assert port.get(IIR) >> 6 == 3
    port.put(IIR, 0)
    assert port.get(IIR) >> 6 == 0


def test_enabling_the_transmit_interrupt_reports_an_empty_transmitter_each_time(port: Port) -> None:
    for _ in range(2):  # serial8250_THRE_test
        port.put(IER, 2)
        assert port.line.level
        assert port.get(IIR) == 2
        assert port.get(IIR) == 1
        assert not port.line.level
        port.put(IER, 0)
    assert port.line.pulses == 2


def test_writing_a_byte_raises_the_transmit_interrupt_again(port: Port) -> None:
    port.put(IER, 2)
    port.get(IIR)
    port.put(DATA, 65)
    assert port.line.level
    assert port.get(IIR) & 0xF == 2


def test_printing_without_interrupts_touches_no_line(port: Port) -> None:
    for value in b"x" * 100:
        port.put(DATA, value)
    assert port.line.pulses == 0


def test_input_arrives_with_an_interrupt(port: Port) -> None:
    port.open()
    assert port.feed(b"ls\n") == 3
    assert port.line.level
    assert port.get(IIR) & 0xF == 4
    received = bytearray()
    while port.get(LSR) & 1:
        received.append(port.get(DATA))
    assert received == b"ls\n"
    assert port.get(IIR) & 0xF == 1
    assert not port.line.level
    assert port.get(DATA) == 0


def test_fifo_reports_its_trigger_level(port: Port) -> None:
    port.open()
    port.put(IIR, 0x81)
    port.feed(b"1234567")
    assert port.get(IIR) & 0xF == 0xC
    port.feed(b"8")
    assert port.get(IIR) & 0xF == 4


def test_input_waits_for_rts_and_survives_the_driver_starting(port: Port) -> None:
    port.feed(b"typed ahead")
    assert port.get(LSR) & 1 == 0
    port.open()
    assert bytes(port.get(DATA) for _ in range(11)) == b"typed ahead"


def test_dropping_rts_holds_input_back(port: Port) -> None:
    port.open()
    port.put(MCR, 9)
    port.feed(b"x")
    assert port.get(LSR) & 1 == 0
    port.put(MCR, 11)
    assert port.get(LSR) & 1
    assert port.line.level


def test_more_input_than_the_fifo_holds_keeps_its_order(port: Port) -> None:
    port.open()
    data = bytes(range(200))
    assert port.feed(data) == 200
    received = bytearray()
    while port.get(LSR) & 1:
        received.append(port.get(DATA))
    assert received == data


def test_input_is_bounded_and_says_when_there_is_room(port: Port) -> None:
    rooms: list[int] = []
    port.on_room = lambda: rooms.append(1)
    assert port.feed(bytes(INPUT_MAX + 5)) == INPUT_MAX
    assert port.feed(b"x") == 0
    port.open()
    for _ in range(INPUT_MAX):
        port.get(DATA)
    assert rooms == [1]
    assert port.feed(b"x") == 1


def test_line_status_is_latched_on_change_only(port: Port) -> None:
    assert port.latched == [(LSR, 0x60)]
    port.open()
    for value in b"console output":
        port.put(DATA, value)
    port.get(LSR)
    assert len(port.latched) == 1
    port.feed(b"ab")
    port.get(DATA)
    port.get(DATA)
    assert port.latched == [(LSR, 0x60), (LSR, 0x61), (LSR, 0x60)]


def test_loopback_returns_what_is_sent(port: Port) -> None:
    port.put(IIR, 1)
    port.put(MCR, 0x12)
    port.feed(b"outside")
    for value in b"0123456789abcdefgh":
        port.put(DATA, value)
    received = bytes(port.get(DATA) for _ in range(16))
    assert received == b"0123456789abcdef"
    assert port.get(LSR) & 1 == 0
    assert port.sent == b""


def test_modem_changes_are_reported_once(port: Port) -> None:
    port.put(IER, 8)
    port.put(MCR, 0x10)
    assert port.get(IIR) == 0
    assert port.get(MSR) == 0x0B
    assert port.get(IIR) == 1
    assert port.get(MSR) == 0
    port.put(MCR, 0x14)
    assert port.get(MSR) == 0x40
    port.put(MCR, 0x10)
    assert port.get(MSR) == 0x04


def test_fifo_reset_empties_the_fifo_only(port: Port) -> None:
    port.open()
    port.feed(bytes(range(20)))
    port.put(IIR, 3)
    assert bytes(port.get(DATA) for _ in range(4)) == bytes(range(16, 20))


def test_wide_access_is_split(port: Port) -> None:
    port.pio_write(LCR, 2, 0x1203)
    assert port.pio_read(LCR, 2) == 0x1203
    port.pio_write(SCR, 4, 0xFFFFFF77)
    assert port.pio_read(SCR, 4) == 0x77


def test_state_survives_a_save(port: Port) -> None:
    port.open()
    port.put(SCR, 0x77)
    port.put(IER, 7)
    port.feed(bytes(range(40)))
    state = port.save()
    other = Port()
    other.restore(state)
    assert other.save() == state
    assert other.line.level
    assert other.latched[-1] == (LSR, 0x61)
    assert bytes(other.get(DATA) for _ in range(40)) == bytes(range(40))

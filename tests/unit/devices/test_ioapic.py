"""The I/O APIC, driven as Linux drives it."""

from __future__ import annotations

import pytest

from microvm.devices.ioapic import PINS, IoApic, IoApicState

MASK = 1 << 16
LEVEL = 1 << 15
IRR = 1 << 14


class Sink:
    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []

    def signal_msi(self, address: int, data: int) -> None:
        self.sent.append((address, data))


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture
def ioapic(sink: Sink) -> IoApic:
    return IoApic(sink)


def read(ioapic: IoApic, register: int) -> int:
    ioapic.mmio_write(0, 4, register)
    return ioapic.mmio_read(0x10, 4)


def write(ioapic: IoApic, register: int, value: int) -> None:
    ioapic.mmio_write(0, 4, register)
    ioapic.mmio_write(0x10, 4, value)


def program(ioapic: IoApic, pin: int, low: int, dest: int = 0) -> None:
    write(ioapic, 0x11 + 2 * pin, dest << 24)
    write(ioapic, 0x10 + 2 * pin, low)


def test_version_says_24_pins(ioapic: IoApic) -> None:
    assert read(ioapic, 1) == 0x170011


def test_id_is_kept_in_four_bits(ioapic: IoApic) -> None:
    write(ioapic, 0, 0xFFFFFFFF)
    assert read(ioapic, 0) == read(ioapic, 2) == 0x0F000000


def test_pins_start_masked(ioapic: IoApic, sink: Sink) -> None:
    for pin in range(PINS):
        assert read(ioapic, 0x10 + 2 * pin) == MASK
        ioapic.line(pin).pulse()
    assert sink.sent == []


def test_edge_becomes_the_message_of_its_entry(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 6, 0x31, dest=3)
    program(ioapic, 7, 0x132 | 1 << 11, dest=0xFF)
    ioapic.line(6).pulse()
    ioapic.line(7).pulse()
    assert sink.sent == [(0xFEE03000, 0x31), (0xFEEFF004, 0x132)]


def test_held_edge_line_sends_once_per_rise(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 4, 0x34)
    line = ioapic.line(4)
    for level in (True, True, False, False, True):
        line.set_level(level)
    assert len(sink.sent) == 2


def test_edge_while_masked_is_forgotten(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 6, 0x31 | MASK)
    ioapic.line(6).pulse()
    program(ioapic, 6, 0x31)
    assert sink.sent == []
    ioapic.line(6).pulse()
    assert len(sink.sent) == 1


def test_level_line_sends_again_only_after_eoi(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 9, 0x41 | LEVEL)
    line = ioapic.line(9)
    line.set_level(True)
    assert sink.sent == [(0xFEE00000, 0xC041)]
    assert read(ioapic, 0x10 + 18) & IRR
    line.set_level(False)
    line.set_level(True)
    assert len(sink.sent) == 1
    ioapic.on_eoi(0x42)
    assert len(sink.sent) == 1
    ioapic.on_eoi(0x41)
    assert len(sink.sent) == 2
    line.set_level(False)
    ioapic.on_eoi(0x41)
    assert len(sink.sent) == 2
    assert not read(ioapic, 0x10 + 18) & IRR


def test_level_line_that_rose_while_masked_sends_when_unmasked(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 9, 0x41 | LEVEL | MASK)
    ioapic.line(9).set_level(True)
    assert sink.sent == []
    program(ioapic, 9, 0x41 | LEVEL)
    assert len(sink.sent) == 1


def test_pulse_on_a_level_pin_sends_once(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 9, 0x41 | LEVEL)
    ioapic.line(9).pulse()
    ioapic.on_eoi(0x41)
    assert len(sink.sent) == 1


def test_switching_to_edge_and_back_clears_remote_irr(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 9, 0x41 | LEVEL)
    ioapic.line(9).set_level(True)
    write(ioapic, 0x10 + 18, 0x41 | MASK)
    write(ioapic, 0x10 + 18, 0x41 | LEVEL)
    assert len(sink.sent) == 2


def test_remote_irr_and_delivery_status_cannot_be_written(ioapic: IoApic) -> None:
    write(ioapic, 0x10, 0xFFFFFFFF)
    assert read(ioapic, 0x10) == 0x1AFFF
    write(ioapic, 0x11, 0xFFFFFFFF)
    assert read(ioapic, 0x11) == 0xFF000000


def test_registers_that_do_not_exist_read_zero(ioapic: IoApic) -> None:
    before = ioapic.save()
    for register in (3, 0xF, 0x40, 0xFF):
        write(ioapic, register, 0xFFFFFFFF)
        assert read(ioapic, register) == 0
    assert ioapic.mmio_read(0x40, 4) == 0
    ioapic.mmio_write(0x40, 4, 0x41)
    assert ioapic.save().entries == before.entries


def test_route_hook_hears_of_every_message(sink: Sink) -> None:
    routes: list[tuple[int, int, int, bool]] = []
    ioapic = IoApic(sink, lambda *route: routes.append(route))
    program(ioapic, 6, 0x31, dest=1)
    assert routes[-1] == (6, 0xFEE01000, 0x31, False)
    program(ioapic, 6, 0x31 | MASK, dest=1)
    assert routes[-1] == (6, 0xFEE01000, 0x31, True)
    program(ioapic, 6, 0x31 | LEVEL, dest=1)
    assert routes[-1] == (6, 0xFEE01000, 0xC031, True)


def test_state_survives_a_save(ioapic: IoApic, sink: Sink) -> None:
    program(ioapic, 6, 0x31, dest=2)
    program(ioapic, 9, 0x41 | LEVEL)
    ioapic.line(9).set_level(True)
    ioapic.line(4).set_level(True)
    state = ioapic.save()
    other_sink = Sink()
    other = IoApic(other_sink)
    other.restore(state)
    assert other.save() == state
    assert other_sink.sent == []
    other.line(6).pulse()
    other.on_eoi(0x41)
    assert other_sink.sent == [(0xFEE02000, 0x31), (0xFEE00000, 0xC041)]


def test_restore_bounds_what_it_takes(ioapic: IoApic) -> None:
    ioapic.restore(IoApicState(0x1234, 0x99, (-1,) * 2, -1))
    state = ioapic.save()
    assert state.select == 0x34
    assert len(state.entries) == PINS
    assert state.levels == (1 << PINS) - 1
    assert all(0 <= entry < 1 << 64 for entry in state.entries)


def test_message_is_sent_without_the_lock() -> None:
    class Reentrant:
        def signal_msi(self, address: int, data: int) -> None:
            ioapic.on_eoi(0x99)

    ioapic = IoApic(Reentrant())
    program(ioapic, 9, 0x41 | LEVEL)
    ioapic.line(9).set_level(True)
    ioapic.on_eoi(0x41)

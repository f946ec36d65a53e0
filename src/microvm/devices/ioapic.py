"""The I/O APIC: 24 interrupt lines in, messages to the local APICs out. [82093AA]

A line that changes becomes a message by its redirection entry. The message is worked out when the guest writes the
entry, so that a device's pulse costs an attribute look-up and one call. An edge-triggered pin sends on every rising
edge and forgets edges while masked, as the datasheet says. A level-triggered pin sends once, sets remote IRR, and sends
again at the end of the interrupt if the line is still up.

Messages are sent after the lock is released: the local APIC may call `IoApic.on_eoi` while it holds a lock of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..irq import MsiSink
from ..spec import x86

PINS: Final = 24
VERSION: Final = 0x0017_0011  # 24 entries, no EOI register
_SELECT: Final = 0x00
_WINDOW: Final = 0x10
_REG_ID: Final = 0
_REG_VERSION: Final = 1
_REG_ARBITRATION: Final = 2
_REG_TABLE: Final = 0x10

_VECTOR: Final = 0xFF
_DELIVERY_SHIFT: Final = 8
_DELIVERY: Final = 7
_LOGICAL: Final = 1 << 11
_REMOTE_IRR: Final = 1 << 14
_LEVEL: Final = 1 << 15
_MASKED: Final = 1 << 16
_DEST_SHIFT: Final = 56
_WRITABLE: Final = 0xFF00_0000_0001_AFFF  # all but delivery status and remote IRR

RouteHook = Callable[[int, int, int, bool], None]


@dataclass(frozen=True, slots=True)
class IoApicState:
    """What a snapshot keeps. ``levels`` has a bit for each line that is up."""

    select: int
    id: int
    entries: tuple[int, ...]
    levels: int


class _Line:
    """One pin. ``edge_msi`` is the message an edge sends, or None while masked or level-triggered."""

    __slots__ = ("_ioapic", "edge_msi", "pin")

    def __init__(self, ioapic: IoApic, pin: int) -> None:
        self._ioapic = ioapic
        self.pin = pin
        self.edge_msi: tuple[int, int] | None = None

    def pulse(self) -> None:
        msi = self.edge_msi
        if msi is not None:
            self._ioapic.signal(*msi)
        else:
            self._ioapic.pulse_slowly(self.pin)

    def set_level(self, level: bool) -> None:
        self._ioapic.set_level(self.pin, level)


class IoApic:
    """One I/O APIC with GSIs 0 to 23. An `MmioDevice` of one page; thread-safe.

    ``on_route_change(gsi, address, data, masked)`` is told of every new message, for a backend that delivers without
    entering Python (`Partition.route_irq`); ``masked`` is true as well while a pin is level-triggered, because such a
    pin cannot be delivered without the remote IRR kept here. It is called with the lock held and must not call back.
    """

    def __init__(self, sink: MsiSink, on_route_change: RouteHook | None = None) -> None:
        self.signal = sink.signal_msi
        self.on_route_change = on_route_change
        self._lock = threading.Lock()
        self._select = 0
        self._id = 0
        self._entries = [_MASKED] * PINS
        self._levels = 0
        self._lines = tuple(_Line(self, pin) for pin in range(PINS))

    def line(self, gsi: int) -> _Line:
        """The `IrqLine` of ``gsi``, 0 to 23: the same object on every call."""
        return self._lines[gsi]

    def mmio_read(self, offset: int, size: int) -> int:
        if offset == _SELECT:
            return self._select
        if offset != _WINDOW:
            return 0
        with self._lock:
            register = self._select
            if register in (_REG_ID, _REG_ARBITRATION):
                return self._id << 24
            if register == _REG_VERSION:
                return VERSION
            pin = (register - _REG_TABLE) >> 1
            if not 0 <= pin < PINS:
                return 0
            return self._entries[pin] >> (32 if register & 1 else 0) & 0xFFFF_FFFF

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECT:
            self._select = value & 0xFF
            return
        if offset != _WINDOW:
            return
        messages = []
        with self._lock:
            register = self._select
            if register == _REG_ID:
                self._id = value >> 24 & 0xF
                return
            pin = (register - _REG_TABLE) >> 1
            if not 0 <= pin < PINS:
                return
            entry = self._entries[pin]
            value &= 0xFFFF_FFFF
            new = (entry & 0xFFFF_FFFF) | value << 32 if register & 1 else (entry & ~0xFFFF_FFFF) | value
            new = (new & _WRITABLE) | (entry & _REMOTE_IRR)
            if not new & _LEVEL:
                new &= ~_REMOTE_IRR  # how Linux ends a level interrupt by hand on this version: edge and back
            self._entries[pin] = new
            self._reroute(pin)
            if self._level_due(pin):
                messages.append(self._take_level(pin))
        for message in messages:
            self.signal(*message)

    def on_eoi(self, vector: int) -> None:
        """A local APIC ended the level-triggered interrupt ``vector``. vCPU thread."""
        messages = []
        with self._lock:
            for pin, entry in enumerate(self._entries):
                if entry & _REMOTE_IRR and entry & _VECTOR == vector:
                    self._entries[pin] = entry & ~_REMOTE_IRR
                    if self._level_due(pin):
                        messages.append(self._take_level(pin))
        for message in messages:
            self.signal(*message)

    def set_level(self, pin: int, level: bool) -> None:
        """Hold ``pin`` at ``level``. Any thread."""
        bit = 1 << pin
        if bool(self._levels & bit) == level:
            return
        message = None
        with self._lock:
            if not level:
                self._levels &= ~bit
            elif not self._levels & bit:
                self._levels |= bit
                message = self._lines[pin].edge_msi
                if self._level_due(pin):
                    message = self._take_level(pin)
        if message is not None:
            self.signal(*message)

    def pulse_slowly(self, pin: int) -> None:
        """A pulse on a pin without an edge message: lost while masked, sent once when level-triggered."""
        self.set_level(pin, True)
        self.set_level(pin, False)

    def save(self) -> IoApicState:
        with self._lock:
            return IoApicState(self._select, self._id, tuple(self._entries), self._levels)

    def restore(self, state: IoApicState) -> None:
        """Take a saved state over, whatever it holds. Sends nothing: what was sent is in the local APICs' state."""
        with self._lock:
            self._select = state.select & 0xFF
            self._id = state.id & 0xF
            entries = [entry & (_WRITABLE | _REMOTE_IRR) for entry in state.entries[:PINS]]
            self._entries = entries + [_MASKED] * (PINS - len(entries))
            self._levels = state.levels & ((1 << PINS) - 1)
            for pin in range(PINS):
                self._reroute(pin)

    def _reroute(self, pin: int) -> None:
        entry = self._entries[pin]
        message = _message(entry)
        deaf = bool(entry & (_MASKED | _LEVEL))
        self._lines[pin].edge_msi = None if deaf else message
        if self.on_route_change is not None:
            self.on_route_change(pin, *message, deaf)

    def _level_due(self, pin: int) -> bool:
        """Whether a level-triggered pin has something to send."""
        entry = self._entries[pin]
        return entry & (_LEVEL | _MASKED | _REMOTE_IRR) == _LEVEL and bool(self._levels >> pin & 1)

    def _take_level(self, pin: int) -> tuple[int, int]:
        self._entries[pin] |= _REMOTE_IRR
        return _message(self._entries[pin])


def _message(entry: int) -> tuple[int, int]:
    """Address and data of the message an entry stands for. [SDM] 3A 11.11"""
    address = x86.MSI_ADDRESS | (entry >> _DEST_SHIFT & 0xFF) << x86.MSI_DEST_SHIFT
    if entry & _LOGICAL:
        address |= x86.MSI_DEST_LOGICAL
    data = entry & _VECTOR | (entry >> _DELIVERY_SHIFT & _DELIVERY) << x86.MSI_DATA_DELIVERY_SHIFT
    if entry & _LEVEL:
        data |= x86.MSI_DATA_LEVEL | x86.MSI_DATA_ASSERT
    return address, data

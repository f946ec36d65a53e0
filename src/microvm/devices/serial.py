"""The 16550A serial port. [PC16550D]

Transmitting takes no time, so the transmitter is always empty; what varies in the line status is only whether input
waits. The interrupt is a level: up while the identification register has something to report. Linux's handler reads
that register until it is quiet, which brings the line down before the next edge, so the same level works on an
edge-triggered and on a level-triggered pin.

Input waits in a backlog and enters the 16-byte FIFO only while the driver asserts RTS, as a peer with hardware flow
control would send it. So nothing is lost to overruns, nor to the FIFO resets of a driver that is starting.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..irq import IrqLine
from ..spec import uart16550 as uart

PORTS: Final = 8
INPUT_MAX: Final = 64 << 10  # input waiting for the guest; more is refused until it reads
_IDLE: Final = uart.LSR_THRE | uart.LSR_TEMT
_BYTES: Final = tuple(bytes([value]) for value in range(256))


@dataclass(frozen=True, slots=True)
class SerialState:
    """What a snapshot keeps: the registers, the FIFO and the input that waits behind it."""

    ier: int
    lcr: int
    mcr: int
    scr: int
    fcr: int
    divisor: int
    msr_deltas: int
    transmit_pending: bool
    fifo: bytes
    backlog: bytes


class Serial:
    """A 16550A on eight ports. A `PioDevice`.

    ``output(data)`` gets what the guest sends, a byte a call, on the vCPU thread. ``latch(LSR, value)`` is told the
    line status whenever it changes, for a backend that answers polls itself (`Partition.latch_pio`): reading it has
    no side effect, because there are no receive errors. ``on_room`` is called without the lock, on the vCPU thread,
    when the backlog has become empty after `feed` took less than it was given.
    """

    def __init__(
        self,
        output: Callable[[bytes], object],
        irq: IrqLine,
        latch: Callable[[int, int], object] | None = None,
        on_room: Callable[[], object] | None = None,
    ) -> None:
        self.output = output
        self.on_room = on_room
        self._irq = irq
        self._latch = latch
        self._lock = threading.Lock()
        self._fifo: deque[int] = deque()
        self._backlog: deque[int] = deque()
        self._starved = False
        self._latched = -1
        self._reset()

    def _reset(self) -> None:
        self._ier = 0
        self._lcr = 0
        self._mcr = 0
        self._scr = 0
        self._fcr = 0
        self._divisor = 12  # 9600 baud
        self._msr_deltas = 0
        self._transmit_pending = False
        self._lsr = _IDLE
        self._update()

    def feed(self, data: bytes) -> int:
        """Queue input for the guest. Returns how many bytes were taken. Any thread."""
        with self._lock:
            room = INPUT_MAX - len(self._backlog)
            taken = min(len(data), room)
            self._backlog.extend(data[:taken])
            if taken < len(data):
                self._starved = True
            self._refill()
            self._update()
            return taken

    def pio_read(self, offset: int, size: int) -> int:
        if size == 1:
            return self._read(offset)
        value = 0
        for index in range(min(size, PORTS - offset)):
            value |= self._read(offset + index) << 8 * index
        return value

    def pio_write(self, offset: int, size: int, value: int) -> None:
        if size == 1:
            self._write(offset, value & 0xFF)
            return
        for index in range(min(size, PORTS - offset)):
            self._write(offset + index, value >> 8 * index & 0xFF)

    def save(self) -> SerialState:
        with self._lock:
            return SerialState(
                self._ier,
                self._lcr,
                self._mcr,
                self._scr,
                self._fcr,
                self._divisor,
                self._msr_deltas,
                self._transmit_pending,
                bytes(self._fifo),
                bytes(self._backlog),
            )

    def restore(self, state: SerialState) -> None:
        """Take a saved state over; the line and the latch follow it."""
        with self._lock:
            self._ier = state.ier & 0xF
            self._lcr = state.lcr & 0xFF
            self._mcr = state.mcr & 0x1F
            self._scr = state.scr & 0xFF
            self._fcr = state.fcr & 0xFF
            self._divisor = state.divisor & 0xFFFF
            self._msr_deltas = state.msr_deltas & uart.MSR_DELTAS
            self._transmit_pending = bool(state.transmit_pending)
            self._fifo = deque(state.fifo[: uart.FIFO_SIZE])
            self._backlog = deque(state.backlog[:INPUT_MAX])
            self._latched = -1
            self._update()

    def _read(self, offset: int) -> int:
        if offset == uart.LSR:
            return self._lsr
        if offset == uart.DATA and not self._lcr & uart.LCR_DLAB:
            return self._receive()
        with self._lock:
            if offset == uart.DATA:
                return self._divisor & 0xFF
            if offset == uart.IER:
                return self._divisor >> 8 if self._lcr & uart.LCR_DLAB else self._ier
            if offset == uart.IIR:
                cause = self._cause()
                if cause == uart.IIR_THRI:
                    self._transmit_pending = False
                    self._update()
                return cause | (uart.IIR_FIFO_ENABLED if self._fcr & uart.FCR_ENABLE else 0)
            if offset == uart.LCR:
                return self._lcr
            if offset == uart.MCR:
                return self._mcr
            if offset == uart.MSR:
                status = self._modem_lines() | self._msr_deltas
                self._msr_deltas = 0
                self._update()
                return status
            return self._scr

    def _receive(self) -> int:
        with self._lock:
            if not self._fifo:
                return 0
            value = self._fifo.popleft()
            self._refill()
            self._update()
            hungry = self._starved and not self._backlog
            if hungry:
                self._starved = False
        if hungry and self.on_room is not None:
            self.on_room()
        return value

    def _write(self, offset: int, value: int) -> None:
        if offset == uart.DATA and not self._lcr & uart.LCR_DLAB:
            self._transmit(value)
            return
        with self._lock:
            if offset == uart.DATA:
                self._divisor = self._divisor & 0xFF00 | value
            elif offset == uart.IER:
                self._write_ier(value)
            elif offset == uart.IIR:
                self._write_fcr(value)
            elif offset == uart.LCR:
                self._lcr = value
            elif offset == uart.MCR:
                before = self._modem_lines()
                self._mcr = value & 0x1F
                self._note_modem_change(before)
                self._refill()
            elif offset == uart.SCR:
                self._scr = value
            self._update()

    def _transmit(self, value: int) -> None:
        if self._mcr & uart.MCR_LOOP:
            with self._lock:
                # The sender is slower than the FIFO on a real port; here a full one makes it wait, so to speak.
                if len(self._fifo) < self._fifo_room():
                    self._fifo.append(value)
                self._transmit_pending = True
                self._update()
            return
        self.output(_BYTES[value])
        if self._ier & uart.IER_THRI:
            with self._lock:
                self._transmit_pending = True
                self._update()

    def _write_ier(self, value: int) -> None:
        if self._lcr & uart.LCR_DLAB:
            self._divisor = self._divisor & 0xFF | value << 8
            return
        if value & ~self._ier & uart.IER_THRI:
            self._transmit_pending = True  # enabling it with the transmitter empty reports that at once
        self._ier = value & 0xF

    def _write_fcr(self, value: int) -> None:
        if value & uart.FCR_CLEAR_RX or (value ^ self._fcr) & uart.FCR_ENABLE:
            self._fifo.clear()
        self._fcr = value & ~(uart.FCR_CLEAR_RX | uart.FCR_CLEAR_TX)
        self._refill()

    def _fifo_room(self) -> int:
        return uart.FIFO_SIZE if self._fcr & uart.FCR_ENABLE else 1

    def _refill(self) -> None:
        """Let input in while the driver is ready to receive."""
        if self._mcr & (uart.MCR_RTS | uart.MCR_LOOP) != uart.MCR_RTS:
            return
        room = self._fifo_room()
        while self._backlog and len(self._fifo) < room:
            self._fifo.append(self._backlog.popleft())

    def _modem_lines(self) -> int:
        """The peer is always there and ready; in loopback the port hears its own outputs."""
        mcr = self._mcr
        if not mcr & uart.MCR_LOOP:
            return uart.MSR_CTS | uart.MSR_DSR | uart.MSR_DCD
        return (
            (uart.MSR_CTS if mcr & uart.MCR_RTS else 0)
            | (uart.MSR_DSR if mcr & uart.MCR_DTR else 0)
            | (uart.MSR_RI if mcr & uart.MCR_OUT1 else 0)
            | (uart.MSR_DCD if mcr & uart.MCR_OUT2 else 0)
        )

    def _note_modem_change(self, before: int) -> None:
        changed = before ^ self._modem_lines()
        if changed & uart.MSR_RI and not before & uart.MSR_RI:
            changed &= ~uart.MSR_RI  # the ring delta marks the end of a ring only
        self._msr_deltas |= changed >> 4

    def _cause(self) -> int:
        """The highest pending cause, as the identification register shows it."""
        if self._ier & uart.IER_RDI and self._fifo:
            trigger = uart.FCR_TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & uart.FCR_ENABLE else 1
            # Below the trigger level the FIFO reports a timeout after four characters' time: here at once.
            return uart.IIR_RDI if len(self._fifo) >= trigger else uart.IIR_RX_TIMEOUT
        if self._ier & uart.IER_THRI and self._transmit_pending:
            return uart.IIR_THRI
        if self._ier & uart.IER_MSI and self._msr_deltas:
            return uart.IIR_MSI
        return uart.IIR_NO_INT

    def _update(self) -> None:
        """Bring line status, latch and interrupt line up to date."""
        self._lsr = _IDLE | (uart.LSR_DR if self._fifo else 0)
        if self._lsr != self._latched:
            self._latched = self._lsr
            if self._latch is not None:
                self._latch(uart.LSR, self._lsr)
        self._irq.set_level(self._cause() != uart.IIR_NO_INT)

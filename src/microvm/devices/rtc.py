"""The CMOS clock: time of day and 114 bytes of memory behind ports 0x70 and 0x71. [MC146818]

The time is the host's, always; what the guest writes into it is accepted and forgotten, so a guest cannot move the
clock of its next boot. There is no interrupt.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PORTS: Final = 2
_SIZE: Final = 128
_SECONDS: Final = 0x00
_MINUTES: Final = 0x02
_HOURS: Final = 0x04
_WEEKDAY: Final = 0x06
_DAY: Final = 0x07
_MONTH: Final = 0x08
_YEAR: Final = 0x09
_A: Final = 0x0A
_B: Final = 0x0B
_C: Final = 0x0C
_D: Final = 0x0D
_CENTURY: Final = 0x32
_CLOCK: Final = frozenset((_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, _CENTURY))

_A_UPDATING: Final = 0x80
_A_DEFAULT: Final = 0x26  # 32.768 kHz time base, 1024 Hz rate
_B_BINARY: Final = 0x04
_B_24H: Final = 0x02
_D_VALID: Final = 0x80
_PM: Final = 0x80
# A guest reads the fields one by one: they come from one moment as long as it takes no longer than this.
_HOLD_S: Final = 0.010


@dataclass(frozen=True, slots=True)
class RtcState:
    """What a snapshot keeps: the selected register and the memory. The time is not in it."""

    index: int
    memory: bytes


class Rtc:
    """The clock as a `PioDevice` of two ports. ``clock`` gives UTC in seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._index = 0
        self._memory = bytearray(_SIZE)
        self._memory[_A] = _A_DEFAULT
        self._memory[_B] = _B_24H
        self._moment = float("-inf")

    def pio_read(self, offset: int, size: int) -> int:
        if offset == 0:
            return 0xFF  # the index cannot be read back
        with self._lock:
            return self._read(self._index)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        with self._lock:
            if offset == 0:
                self._index = value & 0x7F  # the top bit masks NMI
                if size > 1:
                    self._write(self._index, value >> 8 & 0xFF)
            else:
                self._write(self._index, value & 0xFF)

    def save(self) -> RtcState:
        with self._lock:
            return RtcState(self._index, bytes(self._memory))

    def restore(self, state: RtcState) -> None:
        with self._lock:
            self._index = state.index & 0x7F
            self._memory = bytearray(state.memory[:_SIZE].ljust(_SIZE, b"\0"))

    def _read(self, index: int) -> int:
        if index == _A:
            # Never updating: a guest that waits for the end of an update must not depend on how fast it runs.
            self._moment = self._clock()
            return self._memory[_A] & ~_A_UPDATING
        if index in _CLOCK:
            return self._field(index)
        if index == _C:
            return 0
        if index == _D:
            return _D_VALID
        return self._memory[index]

    def _write(self, index: int, value: int) -> None:
        if index not in _CLOCK and index not in (_C, _D):
            self._memory[index] = value

    def _field(self, index: int) -> int:
        now = self._clock()
        if index == _SECONDS or not 0 <= now - self._moment < _HOLD_S:
            self._moment = now
        moment = time.gmtime(self._moment)
        if index == _HOURS:
            return self._hours(moment.tm_hour)
        fields = {
            _SECONDS: moment.tm_sec,
            _MINUTES: moment.tm_min,
            _WEEKDAY: (moment.tm_wday + 1) % 7 + 1,  # Sunday is 1
            _DAY: moment.tm_mday,
            _MONTH: moment.tm_mon,
            _YEAR: moment.tm_year % 100,
            _CENTURY: moment.tm_year // 100,
        }
        return self._encode(fields[index])

    def _hours(self, hour: int) -> int:
        if self._memory[_B] & _B_24H:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (_PM if hour >= 12 else 0)

    def _encode(self, value: int) -> int:
        if self._memory[_B] & _B_BINARY:
            return value
        return value // 10 << 4 | value % 10

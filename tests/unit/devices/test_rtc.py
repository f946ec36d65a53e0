"""The CMOS clock as Linux reads it."""

from __future__ import annotations

import calendar

import pytest

from microvm.devices.rtc import Rtc, RtcState

WHEN = calendar.timegm((2026, 11, 29, 23, 59, 58))  # a Sunday


class Clock:
    now = float(WHEN)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rtc(clock: Clock) -> Rtc:
    return Rtc(clock)


def get(rtc: Rtc, index: int) -> int:
    rtc.pio_write(0, 1, index)
    return rtc.pio_read(1, 1)


def put(rtc: Rtc, index: int, value: int) -> None:
    rtc.pio_write(0, 1, index)
    rtc.pio_write(1, 1, value)


FIELDS = (0, 2, 4, 6, 7, 8, 9, 0x32)


def test_time_is_bcd_and_24_hours_by_default(rtc: Rtc) -> None:
    assert [get(rtc, index) for index in FIELDS] == [0x58, 0x59, 0x23, 1, 0x29, 0x11, 0x26, 0x20]


def test_time_is_binary_on_request(rtc: Rtc) -> None:
    put(rtc, 0xB, 0x06)
    assert [get(rtc, index) for index in FIELDS] == [58, 59, 23, 1, 29, 11, 26, 20]


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_hours_come_in_twelves_on_request(rtc: Rtc, clock: Clock, hour: int, shown: int) -> None:
    clock.now = WHEN - (23 - hour) * 3600
    put(rtc, 0xB, 0)
    assert get(rtc, 4) == shown


def test_fields_come_from_one_moment(rtc: Rtc, clock: Clock) -> None:
    clock.now = WHEN + 1.999
    assert get(rtc, 0) == 0x59
    clock.now = WHEN + 2.001
    assert (get(rtc, 2), get(rtc, 4), get(rtc, 7)) == (0x59, 0x23, 0x29)
    clock.now = WHEN + 3
    assert (get(rtc, 2), get(rtc, 4), get(rtc, 7), get(rtc, 8)) == (0, 0, 0x30, 0x11)


def test_update_is_never_in_progress(rtc: Rtc, clock: Clock) -> None:
    put(rtc, 0xA, 0xFF)
    for step in range(100):
        clock.now = WHEN + step / 100
        assert get(rtc, 0xA) & 0x80 == 0


def test_status_registers_read_as_a_working_clock(rtc: Rtc) -> None:
    assert get(rtc, 0xA) == 0x26
    assert get(rtc, 0xB) == 0x02
    assert get(rtc, 0xC) == 0
    assert get(rtc, 0xD) == 0x80


def test_guest_cannot_set_the_time(rtc: Rtc) -> None:
    for index in (*FIELDS, 0xC, 0xD):
        put(rtc, index, 0x11)
    assert get(rtc, 9) == 0x26
    assert get(rtc, 0x32) == 0x20
    assert get(rtc, 0xD) == 0x80


def test_memory_is_kept_and_the_nmi_bit_ignored(rtc: Rtc) -> None:
    put(rtc, 0x80 | 0x40, 0x5A)
    assert get(rtc, 0x40) == 0x5A
    assert rtc.pio_read(0, 1) == 0xFF


def test_state_survives_a_save(rtc: Rtc, clock: Clock) -> None:
    put(rtc, 0x40, 0x5A)
    put(rtc, 0xB, 0x06)
    rtc.pio_write(0, 1, 0x40)
    other = Rtc(clock)
    other.restore(rtc.save())
    assert other.pio_read(1, 1) == 0x5A
    assert get(other, 0) == 58
    other.restore(RtcState(0xFFFF, b"x"))
    assert len(other.save().memory) == 128

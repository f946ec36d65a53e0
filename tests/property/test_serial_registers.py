"""The serial port under any sequence of accesses."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from microvm.devices.serial import INPUT_MAX, Serial
from microvm.irq import NullIrq

OFFSET = st.integers(0, 7)
STEP = st.one_of(
    st.tuples(st.just("read"), OFFSET, st.sampled_from([1, 2, 4])),
    st.tuples(st.just("write"), OFFSET, st.integers(0, 0xFFFF_FFFF)),
    st.tuples(st.just("feed"), st.just(0), st.binary(max_size=40)),
)


@given(st.lists(STEP, max_size=60))
def test_any_accesses_keep_line_latch_and_status_together(steps: list[tuple[str, int, int | bytes]]) -> None:
    latched = []
    irq = NullIrq()
    port = Serial(lambda data: None, irq, lambda offset, value: latched.append(value))
    for kind, offset, argument in steps:
        if kind == "feed":
            assert isinstance(argument, bytes)
            assert port.feed(argument) == len(argument)
        elif kind == "read":
            assert isinstance(argument, int)
            assert 0 <= port.pio_read(offset, argument) < 1 << 8 * argument
        else:
            assert isinstance(argument, int)
            port.pio_write(offset, 4 if argument > 0xFF else 1, argument)
        assert latched[-1] == port.pio_read(5, 1)
        assert all(before != after for before, after in pairwise(latched))
        state = port.save()
        assert len(state.fifo) <= 16
        assert len(state.backlog) <= INPUT_MAX
        twin_irq = NullIrq()
        twin = Serial(lambda data: None, twin_irq)
        twin.restore(state)
        assert twin.save() == state
        assert twin_irq.level == irq.level


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=10), st.booleans())
def test_input_arrives_whole_and_in_order(pieces: list[bytes], fifo: bool) -> None:
    irq = NullIrq()
    port = Serial(lambda data: None, irq)
    port.pio_write(2, 1, 1 if fifo else 0)
    port.pio_write(4, 1, 2)
    port.pio_write(1, 1, 1)
    received = bytearray()
    for piece in pieces:
        port.feed(piece)
        assert irq.level
        while port.pio_read(2, 1) & 1 == 0:
            received.append(port.pio_read(0, 1))
        assert not irq.level
    assert received == b"".join(pieces)

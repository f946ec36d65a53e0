"""The I/O APIC against a slow, obvious model of its pins."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microvm.devices.ioapic import PINS, IoApic

LEVEL, MASK, IRR = 1 << 15, 1 << 16, 1 << 14
PIN = st.integers(0, 3)
STEP = st.one_of(
    st.tuples(st.just("program"), PIN, st.sampled_from([0x31, 0x32, 0x31 | LEVEL, 0x31 | MASK, 0x32 | LEVEL | MASK])),
    st.tuples(st.just("level"), PIN, st.integers(0, 1)),
    st.tuples(st.just("pulse"), PIN, st.just(0)),
    st.tuples(st.just("eoi"), PIN, st.sampled_from([0x31, 0x32])),
)


class Model:
    """The datasheet, pin by pin."""

    def __init__(self) -> None:
        self.entry = [MASK] * PINS
        self.level = [0] * PINS
        self.sent: list[int] = []

    def settle(self, pin: int) -> None:
        if self.level[pin] and self.entry[pin] & (LEVEL | MASK | IRR) == LEVEL:
            self.entry[pin] |= IRR
            self.sent.append(self.entry[pin] & 0xFF)

    def set_level(self, pin: int, level: int) -> None:
        rising = level and not self.level[pin]
        self.level[pin] = level
        if rising and not self.entry[pin] & (LEVEL | MASK):
            self.sent.append(self.entry[pin] & 0xFF)
        self.settle(pin)

    def step(self, kind: str, pin: int, value: int) -> None:
        if kind == "program":
            self.entry[pin] = value | (self.entry[pin] & IRR if value & LEVEL else 0)
            self.settle(pin)
        elif kind == "level":
            self.set_level(pin, value)
        elif kind == "pulse":
            if self.entry[pin] & (LEVEL | MASK):
                self.set_level(pin, 1)
                self.set_level(pin, 0)
            else:
                self.sent.append(self.entry[pin] & 0xFF)
        else:
            for each in range(PINS):
                if self.entry[each] & IRR and self.entry[each] & 0xFF == value:
                    self.entry[each] &= ~IRR
                    self.settle(each)


class Sink:
    def __init__(self) -> None:
        self.vectors: list[int] = []

    def signal_msi(self, address: int, data: int) -> None:
        self.vectors.append(data & 0xFF)


@given(st.lists(STEP, max_size=60))
def test_pins_follow_the_model(steps: list[tuple[str, int, int]]) -> None:
    sink, model = Sink(), Model()
    ioapic = IoApic(sink)
    for kind, pin, value in steps:
        model.step(kind, pin, value)
        if kind == "program":
            ioapic.mmio_write(0, 4, 0x10 + 2 * pin)
            ioapic.mmio_write(0x10, 4, value)
        elif kind == "level":
            ioapic.line(pin).set_level(bool(value))
        elif kind == "pulse":
            ioapic.line(pin).pulse()
        else:
            ioapic.on_eoi(value)
        assert sink.vectors == model.sent
        assert list(ioapic.save().entries) == model.entry


@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFF), st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1)), max_size=50
    )
)
def test_any_register_access_is_harmless(accesses: list[tuple[int, int, int]]) -> None:
    ioapic = IoApic(Sink())
    for offset, size, value in accesses:
        for target in (0, 0x10, offset):
            ioapic.mmio_write(target, size, value)
            assert 0 <= ioapic.mmio_read(target, size) < 1 << 32
        assert all(0 <= entry < 1 << 64 for entry in ioapic.save().entries)

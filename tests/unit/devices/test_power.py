from __future__ import annotations

import pytest

from microvm.devices.power import Power, PowerButton
from microvm.irq import NullIrq


class Machine:
    def __init__(self) -> None:
        self.heard: list[str] = []
        self.power = Power(lambda: self.heard.append("off"), lambda: self.heard.append("reset"))


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_s5_powers_off(machine: Machine) -> None:
    machine.power.pio_write(1, 1, 0x80)  # Linux clears the wake status first
    machine.power.pio_write(0, 1, 5 << 2 | 1 << 5)
    assert machine.heard == ["off"]


@pytest.mark.parametrize("value", [0, 5 << 2, 1 << 5, 3 << 2 | 1 << 5])
def test_other_sleep_writes_are_ignored(machine: Machine, value: int) -> None:
    machine.power.pio_write(0, 1, value)
    assert machine.heard == []


def test_reset_value_resets(machine: Machine) -> None:
    machine.power.pio_write(2, 1, 0)
    assert machine.heard == []
    machine.power.pio_write(2, 1, 6)
    assert machine.heard == ["reset"]


def test_registers_read_as_zero(machine: Machine) -> None:
    assert [machine.power.pio_read(offset, 1) for offset in range(3)] == [0, 0, 0]


def test_button_pulses_its_line() -> None:
    irq = NullIrq()
    PowerButton(irq).press()
    assert irq.pulses == 1

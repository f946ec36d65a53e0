"""Power off, reset and the power button, as hardware-reduced ACPI does them. [acpi-6.4] 4.8.3.6, 4.8.3.7"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..irq import IrqLine
from ..spec import acpi

PORTS: Final = 3  # sleep control, sleep status, reset
_SLEEP_CONTROL: Final = 0
_RESET: Final = 2


class Power:
    """The sleep control, sleep status and reset registers: a `PioDevice` of three ports.

    ``on_power_off()`` and ``on_reset()`` are called on the vCPU thread that wrote the register, as often as it does;
    they ask for the machine to stop and return. Writing ``reset_value`` to the reset register resets. The only sleep
    state is S5: other types are ignored.
    """

    def __init__(
        self, on_power_off: Callable[[], object], on_reset: Callable[[], object], reset_value: int = 0x06
    ) -> None:
        self._on_power_off = on_power_off
        self._on_reset = on_reset
        self._reset_value = reset_value

    def pio_read(self, offset: int, size: int) -> int:
        return 0  # nothing to wake from, and control reads as zero

    def pio_write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == _SLEEP_CONTROL:
            sleep_type = value >> acpi.SLEEP_TYPE_SHIFT & acpi.SLEEP_TYPE_MASK
            if value & acpi.SLEEP_ENABLE and sleep_type == acpi.SLEEP_TYPE_S5:
                self._on_power_off()
        elif offset == _RESET and value == self._reset_value:
            self._on_reset()


class PowerButton:
    """The button on the case. A guest with ACPI and somebody who listens shuts down in order when it is pressed.

    ``irq`` is the line on which the generic event device reports the button (`boot/acpi.py`).
    """

    def __init__(self, irq: IrqLine) -> None:
        self._irq = irq

    def press(self) -> None:
        """Press and release. Any thread. The guest may ignore it."""
        self._irq.pulse()

"""What is left of the keyboard controller: its line to the processor's reset pin, for kernels told ``reboot=k``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

_COMMAND_RESET: Final = 0xFE
# Output full, input empty. A kernel that drains the output before probing gives up after 16 bytes and says that there
# is no controller, without waiting for time-outs; and one that waits to send the reset command can do so at once.
_STATUS: Final = 0x01


class I8042:
    """The command and status port: a `PioDevice` of one port (0x64). The data port stays unclaimed.

    ``on_reset()`` is called on the vCPU thread; it asks for a reset and returns.
    """

    def __init__(self, on_reset: Callable[[], object]) -> None:
        self._on_reset = on_reset

    def pio_read(self, offset: int, size: int) -> int:
        return _STATUS

    def pio_write(self, offset: int, size: int, value: int) -> None:
        if value & 0xFF == _COMMAND_RESET:
            self._on_reset()

"""How a machine ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


class End:
    """The ways a machine ends."""

    POWERED_OFF: Final = "powered off"
    RESET: Final = "reset"
    HALTED: Final = "halted"
    CRASHED: Final = "crashed"
    STOPPED: Final = "stopped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a machine ended.

    ``kind``: POWERED_OFF and RESET were asked for by the guest (Linux told ``reboot=t`` resets by a triple fault, and
    with ``panic=-1`` a panic resets too); HALTED: every vCPU stands still with interrupts off; CRASHED: a vCPU could
    not go on; STOPPED: `MicroVM.stop` or `close` was called. ``detail`` is one sentence or empty.
    """

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind} ({self.detail})" if self.detail else self.kind

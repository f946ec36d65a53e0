"""Interrupt lines: what a device holds to get the driver's attention."""

from __future__ import annotations

from typing import Protocol


class IrqLine(Protocol):
    """One input of an interrupt controller. Thread-safe."""

    def pulse(self) -> None:
        """Raise and lower the line once (edge-triggered devices; every virtio device here)."""

    def set_level(self, level: bool) -> None:
        """Hold the line at ``level`` (level-triggered devices). Setting the present level again does nothing."""


class MsiSink(Protocol):
    """Where message-signalled interrupts go: the partition's local APICs. Thread-safe."""

    def signal_msi(self, address: int, data: int) -> None:
        """Deliver one message. [SDM] 3A 11.11; the address selects the APIC, the data the vector and mode."""


class NullIrq:
    """A line that leads nowhere, and counts what it was told: for tests and for machines without a controller."""

    def __init__(self) -> None:
        self.pulses = 0
        self.level = False

    def pulse(self) -> None:
        self.pulses += 1

    def set_level(self, level: bool) -> None:
        self.level = level

"""The bus: which device answers at which port or guest-physical address.

Backends call it from inside their run loop, one call an exit; what nobody answers reads as all ones and swallows
writes, as on a PC. Lookup is one dict access: ports by number, MMIO by 4 KiB page, so that an exit costs the
same however many devices there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from .errors import ConfigError

PAGE_SHIFT: Final = 12
_ALL_ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


class PioDevice(Protocol):
    """A device on x86 ports. ``offset`` counts from the first port it was mapped at; ``size`` is 1, 2 or 4.

    Called on a vCPU thread.
    """

    def pio_read(self, offset: int, size: int) -> int: ...
    def pio_write(self, offset: int, size: int, value: int) -> None: ...


class MmioDevice(Protocol):
    """A device in guest-physical memory. ``offset`` counts from its base; ``size`` is 1, 2, 4 or 8.

    Called on a vCPU thread.
    """

    def mmio_read(self, offset: int, size: int) -> int: ...
    def mmio_write(self, offset: int, size: int, value: int) -> None: ...


class Bus:
    """Port and MMIO dispatch for one partition.

    Map devices before the vCPUs run; reads and writes then take no lock. ``unclaimed`` counts accesses nobody
    answered.
    """

    def __init__(self) -> None:
        self._ports: dict[int, tuple[PioDevice, int]] = {}
        self._pages: dict[int, tuple[MmioDevice, int]] = {}
        self._eoi: list[Callable[[int], None]] = []
        self.unclaimed = 0

    def map_pio(self, first: int, count: int, device: PioDevice) -> None:
        """Give ``device`` the ports ``first`` to ``first + count - 1``. Raises ConfigError where one is taken."""
        for port in range(first, first + count):
            if not 0 <= port <= 0xFFFF:
                raise ConfigError("port", hex(port), "a port is 0 to 0xffff")
            if port in self._ports:
                raise ConfigError("port", hex(port), "already taken by another device")
        for port in range(first, first + count):
            self._ports[port] = (device, first)

    def map_mmio(self, base_gpa: int, size: int, device: MmioDevice) -> None:
        """Give ``device`` whole 4 KiB pages at ``base_gpa``. Raises ConfigError on overlap or misalignment."""
        if base_gpa & 0xFFF or size & 0xFFF or size <= 0:
            raise ConfigError("mmio range", hex(base_gpa), "MMIO is mapped in whole 4 KiB pages")
        pages = range(base_gpa >> PAGE_SHIFT, (base_gpa + size) >> PAGE_SHIFT)
        for page in pages:
            if page in self._pages:
                raise ConfigError("mmio range", hex(base_gpa), "already taken by another device")
        for page in pages:
            self._pages[page] = (device, base_gpa)

    def on_eoi(self, handler: Callable[[int], None]) -> None:
        """Call ``handler(vector)`` when a vCPU ends a level-triggered interrupt."""
        self._eoi.append(handler)

    def port(self, port: int) -> tuple[PioDevice, int] | None:
        """Who answers at ``port`` and its first port there. Once taken, a port stays taken: the answer can be kept."""
        return self._ports.get(port)

    def page(self, gpa: int) -> tuple[MmioDevice, int] | None:
        """Who answers in the page of ``gpa`` and its base there. Once taken, a page stays taken."""
        return self._pages.get(gpa >> PAGE_SHIFT)

    def pio_read(self, port: int, size: int) -> int:
        """Read ``size`` bytes (1, 2, 4) from a port. vCPU thread."""
        entry = self._ports.get(port)
        if entry is None:
            self.unclaimed += 1
            return _ALL_ONES[size]
        return entry[0].pio_read(port - entry[1], size) & _ALL_ONES[size]

    def pio_write(self, port: int, size: int, value: int) -> None:
        """Write ``size`` bytes (1, 2, 4) to a port. vCPU thread."""
        entry = self._ports.get(port)
        if entry is None:
            self.unclaimed += 1
            return
        entry[0].pio_write(port - entry[1], size, value)

    def mmio_read(self, gpa: int, size: int) -> int:
        """Read ``size`` bytes (1, 2, 4, 8) of device memory. vCPU thread."""
        entry = self._pages.get(gpa >> PAGE_SHIFT)
        if entry is None:
            self.unclaimed += 1
            return _ALL_ONES[size]
        return entry[0].mmio_read(gpa - entry[1], size) & _ALL_ONES[size]

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Write ``size`` bytes (1, 2, 4, 8) of device memory. vCPU thread."""
        entry = self._pages.get(gpa >> PAGE_SHIFT)
        if entry is None:
            self.unclaimed += 1
            return
        entry[0].mmio_write(gpa - entry[1], size, value)

    def apic_eoi(self, vector: int) -> None:
        """A local APIC saw the end of a level-triggered interrupt. vCPU thread. [SDM] 3A 11.8.5."""
        for handler in self._eoi:
            handler(vector)

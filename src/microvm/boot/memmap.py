"""The memory map a guest is told: which addresses are RAM."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import ConfigError
from ..memory import GuestMemory
from ..spec import bootparam
from . import layout


class MapEntry(NamedTuple):
    """One stretch of the map; ``kind`` is an e820 type, which PVH shares."""

    gpa: int
    size: int
    kind: int


def low_ram_end(memory: GuestMemory) -> int:
    """Where the RAM that starts at address 0 ends: at most `layout.RAM_HOLE_START`. Raises ConfigError."""
    low = memory.regions[0]
    if low.gpa != 0 or low.end <= layout.HIGH_RAM:
        raise ConfigError("memory", f"of {memory.size} bytes", "RAM must start at 0 and reach beyond 1 MiB")
    return min(low.end, layout.RAM_HOLE_START)


def memory_map(memory: GuestMemory) -> list[MapEntry]:
    """All RAM, less the legacy area between `layout.EBDA_START` and 1 MiB, where the ACPI tables are.

    Raises ConfigError if the first mebibyte is not RAM, or for more regions than a zero page has room for.
    """
    end = low_ram_end(memory)
    entries = [
        MapEntry(0, layout.EBDA_START, bootparam.E820_RAM),
        MapEntry(layout.EBDA_START, layout.HIGH_RAM - layout.EBDA_START, bootparam.E820_RESERVED),
        MapEntry(layout.HIGH_RAM, end - layout.HIGH_RAM, bootparam.E820_RAM),
    ]
    entries += [MapEntry(region.gpa, region.size, bootparam.E820_RAM) for region in memory.regions[1:]]
    if len(entries) > bootparam.E820_MAX:
        raise ConfigError("memory", f"in {len(memory.regions)} regions", f"at most {bootparam.E820_MAX - 2}")
    return entries

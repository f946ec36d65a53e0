"""A walk through the guest's page tables, as WHvTranslateGva makes it. [SDM] 3A 4.3-4.5"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...hypervisor.whp import codes

PG, PAE, LMA, PSE = 1 << 31, 1 << 5, 1 << 10, 1 << 4
_PRESENT, _WRITABLE, _USER, _LARGE = 1, 2, 4, 1 << 7
_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
Load = Callable[[int, int], int | None]  # (gpa, size): the value, None where there is no memory


def walk(load: Load, cr0: int, cr3: int, cr4: int, efer: int, gva: int, write: bool, user: bool) -> tuple[int, int]:
    """The result code of the translation and the guest-physical address."""
    if not cr0 & PG:
        return codes.WHvTranslateGvaResultSuccess, gva & 0xFFFF_FFFF
    shifts: tuple[int, ...]
    if efer & LMA:
        table, shifts, size = cr3 & _ADDRESS, (39, 30, 21, 12), 8
    elif cr4 & PAE:
        table, shifts, size = cr3 & 0xFFFF_FFE0, (30, 21, 12), 8
    else:
        table, shifts, size = cr3 & 0xFFFF_F000, (22, 12), 4
    index_mask = 0x1FF if size == 8 else 0x3FF
    rights = _WRITABLE | _USER
    for level, shift in enumerate(shifts):
        entry = load(table + size * (gva >> shift & index_mask), size)
        if entry is None:
            return codes.WHvTranslateGvaResultGpaUnmapped, 0
        if not entry & _PRESENT:
            return codes.WHvTranslateGvaResultPageNotPresent, 0
        if not (size == 8 and shift == 30 and not efer & LMA):  # a PAE directory pointer has no rights
            rights &= entry
        last = level == len(shifts) - 1
        if last or (entry & _LARGE and shift <= 30 and (size == 8 or cr4 & PSE) and shift != 39):
            offset = (1 << shift) - 1
            if (write and not rights & _WRITABLE) or (user and not rights & _USER):
                return codes.WHvTranslateGvaResultPrivilegeViolation, 0
            return codes.WHvTranslateGvaResultSuccess, (entry & _ADDRESS & ~offset) | gva & offset
        table = entry & _ADDRESS
    raise AssertionError("the last level returns")

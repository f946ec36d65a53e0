"""The part of Hyper-V's interface to guests that Linux uses to keep time. [TLFS] 2.4, 12.4, 12.6"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from ...hypervisor.soft import cpuid
from .profiles import APIC_HZ, TSC_HZ

GUEST_OS_ID: Final = 0x4000_0000
HYPERCALL: Final = 0x4000_0001
VP_INDEX: Final = 0x4000_0002
TIME_REFERENCE: Final = 0x4000_0020
REFERENCE_TSC: Final = 0x4000_0021
TSC_FREQUENCY: Final = 0x4000_0022
APIC_FREQUENCY: Final = 0x4000_0023
VP_ASSIST_PAGE: Final = 0x4000_0073
PAGE_ENABLED: Final = 1
_PAGE: Final = 4096
# mov eax, 2 (HV_STATUS_INVALID_HYPERCALL_CODE); xor edx, edx; ret
_HYPERCALL_CODE: Final = bytes.fromhex("b8 02 00 00 00 31 d2 c3")
_TSC_SCALE: Final = (10_000_000 << 64) // TSC_HZ

# synthetic feature bit: privilege bit of leaf 0x40000003
_PRIVILEGES: Final = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 9, 10: 10, 11: 11}
_FREQUENCY_REGISTERS: Final = 1 << 11
_FREQUENCY_MSRS: Final = 1 << 8


def leaves(synthetic: int) -> list[cpuid.Leaf]:
    """CPUID 0x40000000 on for the synthetic features set; without any, the signature alone."""
    ebx, ecx, edx = (int.from_bytes(b"Microsoft Hv"[i : i + 4], "little") for i in (0, 4, 8))
    table: list[cpuid.Leaf] = [(0x4000_0000, cpuid.ANY, 0x4000_0006, ebx, ecx, edx)]
    table.append((0x4000_0001, cpuid.ANY, 0x3123_7648 if synthetic & 2 else 0, 0, 0, 0))  # Hv#1
    privileges = sum(1 << target for source, target in _PRIVILEGES.items() if synthetic >> source & 1)
    misc = _FREQUENCY_MSRS if synthetic & _FREQUENCY_REGISTERS else 0
    table.append((0x4000_0003, cpuid.ANY, privileges, 0, 0, misc))
    return table


class Enlightenments:
    """The synthetic MSRs of one partition. ``store(gpa, data)`` writes guest memory, ``time()`` is in nanoseconds."""

    def __init__(self, store: Callable[[int, bytes], bool], time: Callable[[], int]) -> None:
        self.values: dict[int, int] = {GUEST_OS_ID: 0, HYPERCALL: 0, REFERENCE_TSC: 0}
        self.assist: dict[int, int] = {}
        self._store = store
        self._time = time

    def read(self, msr: int, vp: int) -> int | None:
        if msr in self.values:
            return self.values[msr]
        if msr == VP_ASSIST_PAGE:
            return self.assist.get(vp, 0)
        fixed = {VP_INDEX: vp, TSC_FREQUENCY: TSC_HZ, APIC_FREQUENCY: APIC_HZ}
        return self._time() // 100 if msr == TIME_REFERENCE else fixed.get(msr)

    def write(self, msr: int, vp: int, value: int, tsc: int) -> bool:
        """Returns whether the MSR takes writes. ``tsc`` is the processor's at this moment."""
        if msr == VP_ASSIST_PAGE:
            self.assist[vp] = value
            return True
        if msr not in self.values:
            return False
        self.values[msr] = value
        gpa = value & ~(_PAGE - 1)
        if msr == HYPERCALL and value & PAGE_ENABLED:
            return self._store(gpa, _HYPERCALL_CODE.ljust(_PAGE, b"\xcc"))
        if msr == REFERENCE_TSC and value & PAGE_ENABLED:
            offset = self._time() // 100 - (tsc * _TSC_SCALE >> 64)
            return self._store(gpa, struct.pack("<IIQq", 1, 0, _TSC_SCALE, offset).ljust(_PAGE, b"\0"))
        return True

    def restore(self, msr: int, vp: int, value: int) -> None:
        """Put a saved value back; the pages it points to are in guest memory already."""
        if msr == VP_ASSIST_PAGE:
            self.assist[vp] = value
        else:
            self.values[msr] = value

"""Starting a kernel by PVH: 32-bit protected mode, paging off, RBX at a start info structure. [xen-pvh]"""

from __future__ import annotations

from struct import Struct

from ..errors import ConfigError
from ..hypervisor.base import Registers, Segment, Table
from ..memory import GuestMemory
from ..spec import pvh, x86
from . import layout
from .initrd import Initrd
from .memmap import MapEntry

_CODE = x86.SEG_CODE | x86.SEG_S | x86.SEG_P | x86.SEG_DB | x86.SEG_G
_DATA = x86.SEG_DATA | x86.SEG_S | x86.SEG_P | x86.SEG_DB | x86.SEG_G
_CODE_SELECTOR = 0x10
_DATA_SELECTOR = 0x18
# The same flat segments as descriptors, for a kernel that reloads a segment register before it has a GDT of its own.
_GDT = Struct("<4Q").pack(0, 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


def write_start_info(memory: GuestMemory, entries: list[MapEntry], initrd: Initrd | None, rsdp_gpa: int) -> None:
    """Write the start info, the module list and the memory map at `layout.PVH_START_INFO`. Raises ConfigError."""
    modules_gpa = layout.PVH_START_INFO + pvh.START_INFO.size
    map_gpa = modules_gpa + pvh.MODULE.size
    blob = pvh.START_INFO.pack(
        pvh.START_MAGIC,
        pvh.START_VERSION,
        0,
        1 if initrd else 0,
        modules_gpa if initrd else 0,
        layout.CMDLINE,
        rsdp_gpa,
        map_gpa,
        len(entries),
        0,
    )
    blob += pvh.MODULE.pack(initrd.gpa, initrd.size, 0, 0) if initrd else bytes(pvh.MODULE.size)
    blob += b"".join(pvh.MEMMAP_ENTRY.pack(entry.gpa, entry.size, entry.kind, 0) for entry in entries)
    if len(blob) > layout.BOOT_PARAMS - layout.PVH_START_INFO:
        raise ConfigError("memory", f"in {len(entries)} pieces", "more than the start info has room for")
    memory.write(layout.PVH_START_INFO, blob)
    memory.write(layout.GDT, _GDT)


def registers(entry: int) -> Registers:
    """The state of vCPU 0 at a PVH ``entry``."""
    return Registers(
        rip=entry,
        rbx=layout.PVH_START_INFO,
        rflags=x86.RFLAGS_RESERVED,
        cs=Segment(_CODE_SELECTOR, 0, 0xFFFF_FFFF, _CODE),
        ds=Segment(_DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA),
        es=Segment(_DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA),
        fs=Segment(_DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA),
        gs=Segment(_DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA),
        ss=Segment(_DATA_SELECTOR, 0, 0xFFFF_FFFF, _DATA),
        tr=Segment(0, 0, 0x67, x86.SEG_TSS_BUSY | x86.SEG_P),
        gdtr=Table(layout.GDT, len(_GDT) - 1),
        idtr=Table(0, 0),
        cr0=x86.CR0_PE | x86.CR0_ET,
    )

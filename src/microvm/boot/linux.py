"""Starting Linux by its 64-bit boot protocol: long mode on identity page tables, RSI at the zero page. [linux-boot]"""

from __future__ import annotations

from struct import Struct, pack_into

from ..hypervisor.base import Registers, Segment, Table
from ..memory import GuestMemory
from ..spec import bootparam, x86
from . import layout
from .initrd import Initrd
from .memmap import MapEntry

_CODE = x86.SEG_CODE | x86.SEG_S | x86.SEG_P | x86.SEG_L | x86.SEG_G
_DATA = x86.SEG_DATA | x86.SEG_S | x86.SEG_P | x86.SEG_DB | x86.SEG_G
_CODE_SELECTOR = 0x10  # __BOOT_CS, which the protocol prescribes
_DATA_SELECTOR = 0x18  # __BOOT_DS
_GDT = Struct("<4Q").pack(0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)
_LARGE_PAGE = 2 << 20
_IDENTITY_GIB = 4


def plain_header() -> bytes:
    """A setup header for a vmlinux that came without one, from `bootparam.HEADER_START` on."""
    header = bytearray(bootparam.SETUP_HEADER.size)

    def put(fmt: str, offset: int, value: int) -> None:
        pack_into(fmt, header, offset - bootparam.HEADER_START, value)

    put("<H", bootparam.HDR_BOOT_FLAG, bootparam.BOOT_FLAG)
    put("<I", bootparam.HDR_MAGIC, bootparam.HEADER_MAGIC)
    put("<H", bootparam.HDR_VERSION, bootparam.VERSION_64BIT)
    put("<I", bootparam.HDR_KERNEL_ALIGNMENT, _LARGE_PAGE)
    return bytes(header)


def write_zero_page(
    memory: GuestMemory, header: bytes, entries: list[MapEntry], initrd: Initrd | None, rsdp_gpa: int
) -> None:
    """Write the zero page at `layout.BOOT_PARAMS`. ``header`` is what the kernel's file has at 0x1f1."""
    page = bytearray(bootparam.ZERO_PAGE_SIZE)
    page[bootparam.HEADER_START : bootparam.HEADER_START + len(header)] = header
    page[bootparam.HDR_TYPE_OF_LOADER] = bootparam.LOADER_UNDEFINED
    page[bootparam.HDR_LOADFLAGS] |= bootparam.LOADED_HIGH
    pack_into("<I", page, bootparam.HDR_CMD_LINE_PTR, layout.CMDLINE)
    pack_into("<Q", page, bootparam.ACPI_RSDP_ADDR, rsdp_gpa)
    pack_into("<I", page, bootparam.HDR_RAMDISK_IMAGE, initrd.gpa if initrd else 0)
    pack_into("<I", page, bootparam.HDR_RAMDISK_SIZE, initrd.size if initrd else 0)
    page[bootparam.E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        bootparam.E820_ENTRY.pack_into(page, bootparam.E820_TABLE + index * bootparam.E820_ENTRY.size, *entry)
    memory.write(layout.BOOT_PARAMS, page)


def write_tables(memory: GuestMemory) -> None:
    """Write the boot GDT, and page tables that map the first 4 GiB to themselves in 2 MiB pages."""
    directory = layout.PAGE_TABLES + 0x2000
    link = x86.PTE_P | x86.PTE_RW
    pml4 = [(layout.PAGE_TABLES + 0x1000) | link]
    pdpt = [(directory + 0x1000 * gib) | link for gib in range(_IDENTITY_GIB)]
    pages = [page * _LARGE_PAGE | link | x86.PTE_PS for page in range(512 * _IDENTITY_GIB)]
    tables = Struct(f"<512Q512Q{len(pages)}Q").pack(*_padded(pml4), *_padded(pdpt), *pages)
    memory.write(layout.PAGE_TABLES, tables)
    memory.write(layout.GDT, _GDT)


def _padded(entries: list[int]) -> list[int]:
    return entries + [0] * (512 - len(entries))


def registers(entry: int) -> Registers:
    """The state of vCPU 0 at a 64-bit ``entry``."""
    return Registers(
        rip=entry,
        rsi=layout.BOOT_PARAMS,
        rsp=layout.BOOT_STACK,
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
        cr0=x86.CR0_PE | x86.CR0_ET | x86.CR0_NE | x86.CR0_PG,
        cr3=layout.PAGE_TABLES,
        cr4=x86.CR4_PAE,
        efer=x86.EFER_LME | x86.EFER_LMA,
    )

"""The Linux x86 boot protocol: setup header and zero page. [linux-boot] Documentation/x86/boot.rst, zero-page.rst

Offsets count from the start of the bzImage, and of the zero page alike: the header sits at the same place in both.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

ZERO_PAGE_SIZE: Final = 4096
HEADER_START: Final = 0x1F1
HEADER_END_BYTE: Final = 0x201  # the header ends at 0x202 plus this byte's value
HEADER_END_BASE: Final = 0x202
HEADER_END_MAX: Final = 0x290  # start of the EDD area: a header that reaches further is a lie
SECTOR: Final = 512
DEFAULT_SETUP_SECTS: Final = 4  # what 0 in setup_sects means

BOOT_FLAG: Final = 0xAA55
HEADER_MAGIC: Final = 0x5372_6448  # "HdrS"
VERSION_64BIT: Final = 0x020C  # first protocol with xloadflags
LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0
ENTRY_64: Final = 0x200  # the 64-bit entry, from the start of the loaded payload
LOADER_UNDEFINED: Final = 0xFF
CMDLINE_SIZE: Final = 2047  # COMMAND_LINE_SIZE of every x86 Linux, without the final NUL
INITRD_ADDR_MAX: Final = 0x7FFF_FFFF

# Offsets within the zero page
ACPI_RSDP_ADDR: Final = 0x070
E820_ENTRIES: Final = 0x1E8
E820_TABLE: Final = 0x2D0
E820_MAX: Final = 128
HDR_BOOT_FLAG: Final = 0x1FE
HDR_MAGIC: Final = 0x202
HDR_VERSION: Final = 0x206
HDR_TYPE_OF_LOADER: Final = 0x210
HDR_LOADFLAGS: Final = 0x211
HDR_RAMDISK_IMAGE: Final = 0x218
HDR_RAMDISK_SIZE: Final = 0x21C
HDR_CMD_LINE_PTR: Final = 0x228
HDR_KERNEL_ALIGNMENT: Final = 0x230

E820_ENTRY: Final = Struct("<QQI")  # address, size, type
assert E820_ENTRY.size == 20
E820_RAM: Final = 1
E820_RESERVED: Final = 2
E820_ACPI: Final = 3

SETUP_HEADER: Final = Struct("<BHIHHHHHIHIHHBBHIIIIHBBIIIBBHIIQIIQQI")
assert HEADER_START + SETUP_HEADER.size == 0x264


class SetupHeader(NamedTuple):
    """The setup header of protocol 2.12 and later up to init_size."""

    setup_sects: int
    root_flags: int
    syssize: int  # of the protected-mode code, in 16-byte units
    ram_size: int
    vid_mode: int
    root_dev: int
    boot_flag: int
    jump: int
    magic: int
    version: int
    realmode_swtch: int
    start_sys_seg: int
    kernel_version: int
    type_of_loader: int
    loadflags: int
    setup_move_size: int
    code32_start: int
    ramdisk_image: int
    ramdisk_size: int
    bootsect_kludge: int
    heap_end_ptr: int
    ext_loader_ver: int
    ext_loader_type: int
    cmd_line_ptr: int
    initrd_addr_max: int
    kernel_alignment: int
    relocatable_kernel: int
    min_alignment: int
    xloadflags: int
    cmdline_size: int
    hardware_subarch: int
    hardware_subarch_data: int
    payload_offset: int  # from the start of the protected-mode code
    payload_length: int
    setup_data: int
    pref_address: int
    init_size: int

"""One entry point for every kind of kernel.

In order: an ELF file with a PVH note starts by PVH, any other x86-64 ELF file by the Linux 64-bit boot protocol. A
bzImage is unpacked here and loaded as the ELF file it carries, because its own unpacking would run on the guest's
processor; where this host cannot decode it, it is started by its own 64-bit entry and unpacks itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ..hypervisor.base import Registers
from ..memory import GuestMemory
from ..spec import bootparam
from . import acpi, bzimage, cmdline, elf, firmware, initrd, layout, linux, memmap, pvh
from .image import Image, ImageSource, open_image

PROTOCOL_PVH: Final = "pvh"
PROTOCOL_LINUX64: Final = "linux64"
PROTOCOL_BZIMAGE: Final = "bzimage"


@dataclass(frozen=True, slots=True)
class BootState:
    """What `load` did. Addresses are guest-physical.

    ``registers`` is the state vCPU 0 starts with. ``protocol`` is one of the `PROTOCOL` constants.
    """

    registers: Registers
    protocol: str
    entry: int
    kernel_start: int
    kernel_end: int
    initrd: initrd.Initrd | None
    rsdp_gpa: int


def load(
    memory: GuestMemory,
    kernel: ImageSource,
    initrds: Sequence[ImageSource] = (),
    command_line: str = "",
    cpus: int = 1,
    devices: Sequence[layout.VirtioSlot] = (),
    extra: Sequence[acpi.EventDevice] = (),
    unpack: bool = True,
) -> BootState:
    """Put a kernel, its initrds, command line and ACPI tables into ``memory``.

    ``memory`` reads as zeroes, as it does fresh from the host: what a kernel expects to be zero is not written. Files
    are read from the start and left open. ``devices`` are the virtio transports the ACPI tables name, ``extra`` further
    ACPI devices beside the power button. ``unpack`` False starts a bzImage by its own entry.

    Raises BootError if the kernel or an initrd cannot be booted, ConfigError for the command line, the number of CPUs
    or the memory.
    """
    ram_end = memmap.low_ram_end(memory)
    entries = memmap.memory_map(memory)
    image = open_image("kernel", kernel)
    disks = [open_image("initrd", source) for source in initrds]
    head = image.read(0, min(4, image.size))

    cmdline_size, ceiling = bootparam.CMDLINE_SIZE, bootparam.INITRD_ADDR_MAX + 1
    packed: bzimage.BzImage | None = None
    if not elf.is_elf(head):
        packed = bzimage.parse(image)
        cmdline_size, ceiling = packed.cmdline_size, packed.initrd_addr_max + 1
    line = cmdline.encode(command_line, cmdline_size)
    tables = acpi.build(cpus, devices, extra)

    if packed is not None and unpack:
        unpacked = bzimage.extract(image, packed)
        if unpacked is not None:
            image, packed = bzimage.as_image(unpacked), None

    if packed is None:
        state = _load_elf(memory, image, disks, min(ram_end, ceiling), entries)
    else:
        state = _load_bzimage(memory, image, packed, disks, min(ram_end, ceiling), entries)
    memory.write(layout.CMDLINE, line)
    memory.write(layout.ACPI_TABLES, tables)
    memory.write(layout.RESET_VECTOR, firmware.reset_vector())
    return state


def _load_elf(
    memory: GuestMemory, image: Image, disks: Sequence[Image], ceiling: int, entries: list[memmap.MapEntry]
) -> BootState:
    kernel = elf.parse(image, memmap.low_ram_end(memory))
    elf.load(image, kernel, memory)
    placed = initrd.load(memory, disks, kernel.start, kernel.end, ceiling)
    if kernel.pvh_entry is not None:
        pvh.write_start_info(memory, entries, placed, layout.ACPI_TABLES)
        registers, protocol, entry = pvh.registers(kernel.pvh_entry), PROTOCOL_PVH, kernel.pvh_entry
    else:
        linux.write_zero_page(memory, linux.plain_header(), entries, placed, layout.ACPI_TABLES)
        linux.write_tables(memory)
        registers, protocol, entry = linux.registers(kernel.entry), PROTOCOL_LINUX64, kernel.entry
    return BootState(registers, protocol, entry, kernel.start, kernel.end, placed, layout.ACPI_TABLES)


def _load_bzimage(
    memory: GuestMemory,
    image: Image,
    packed: bzimage.BzImage,
    disks: Sequence[Image],
    ceiling: int,
    entries: list[memmap.MapEntry],
) -> BootState:
    gpa, end = bzimage.place(image, packed, memory, memmap.low_ram_end(memory))
    placed = initrd.load(memory, disks, gpa, end, ceiling)
    linux.write_zero_page(memory, packed.header_bytes, entries, placed, layout.ACPI_TABLES)
    linux.write_tables(memory)
    entry = gpa + bootparam.ENTRY_64
    return BootState(linux.registers(entry), PROTOCOL_BZIMAGE, entry, gpa, end, placed, layout.ACPI_TABLES)

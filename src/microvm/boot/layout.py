"""Every fixed guest-physical address, one line each.

Low memory follows the PC; everything that is not RAM sits in the hole between 3 and 4 GiB.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ..errors import ConfigError

GDT: Final = 0x500  # boot GDT: four descriptors, read once by the kernel's entry code
BOOT_PARAMS: Final = 0x7000  # Linux zero page (4 KiB)
PVH_START_INFO: Final = 0x6000  # hvm_start_info, then the module list and the memory map
BOOT_STACK: Final = 0x8FF0  # top of the stack the 64-bit entry starts with
PAGE_TABLES: Final = 0x9000  # identity map for the 64-bit entry: PML4, PDPT, four page directories (0x9000-0xefff)
CMDLINE: Final = 0x2_0000  # kernel command line, NUL-terminated
CMDLINE_MAX: Final = 0x1_0000  # room for it
EBDA_START: Final = 0x9_FC00  # end of the RAM below 640 KiB that the memory map offers
ACPI_TABLES: Final = 0xE_0000  # RSDP, then XSDT, FADT, MADT, DSDT; Linux scans 0xe0000-0xfffff for the RSDP
ACPI_TABLES_END: Final = 0xE_F000
GENERATION_ID: Final = 0xE_F000  # 16 bytes: the VM generation id, which the DSDT names
RESET_VECTOR: Final = 0xF_FFF0  # F000:FFF0, where a PC's firmware starts: code that resets (boot/firmware.py)
HIGH_RAM: Final = 0x10_0000  # RAM above the legacy area; bzImage payloads go no lower
RAM_HOLE_START: Final = 0xC000_0000  # no RAM from here ...
RAM_HOLE_END: Final = 0x1_0000_0000  # ... to here; what does not fit below continues here
VIRTIO_MMIO: Final = 0xC000_0000  # virtio-mmio transports, one page each
VIRTIO_MMIO_STEP: Final = 0x1000
VIRTIO_GSI: Final = 6  # first transport's interrupt; each has its own
VIRTIO_SLOTS: Final = 18  # GSIs 6 to 23
IOAPIC: Final = 0xFEC0_0000
IOAPIC_PINS: Final = 24
LOCAL_APIC: Final = 0xFEE0_0000
KVM_TSS: Final = 0xFFFB_D000  # three pages KVM needs on Intel
KVM_IDENTITY_MAP: Final = 0xFFFB_C000  # one page KVM needs on Intel

SERIAL_PORT: Final = 0x3F8
SERIAL_GSI: Final = 4
CMOS_PORT: Final = 0x70
SLEEP_CONTROL_PORT: Final = 0x600  # ACPI hardware-reduced sleep control register
SLEEP_STATUS_PORT: Final = 0x601
RESET_PORT: Final = 0x602  # ACPI reset register, value RESET_VALUE
RESET_VALUE: Final = 0x06
I8042_PORT: Final = 0x64  # answers only the reset command, for kernels told reboot=k
GED_GSI: Final = 5  # ACPI generic event device: power button, later hot plug and VM generation id
GED_SPARE_GSIS: Final = (1, 2, 3)  # legacy lines nothing uses: one for each further source of ACPI events


class VirtioSlot(NamedTuple):
    """Where one virtio-mmio transport sits: registers at ``gpa``, ``size`` bytes, interrupt ``gsi``."""

    gpa: int
    size: int
    gsi: int


def virtio_slot(index: int) -> VirtioSlot:
    """The place of transport ``index``, counted from 0. Raises ConfigError beyond `VIRTIO_SLOTS`."""
    if not 0 <= index < VIRTIO_SLOTS:
        raise ConfigError("devices", index + 1, f"at most {VIRTIO_SLOTS} virtio devices")
    return VirtioSlot(VIRTIO_MMIO + index * VIRTIO_MMIO_STEP, VIRTIO_MMIO_STEP, VIRTIO_GSI + index)

"""ACPI table layouts and constants, as far as a hardware-reduced platform needs them. [acpi-6.4]"""

from __future__ import annotations

from struct import Struct
from typing import Final

# signature, length, revision, checksum, OEM id, OEM table id, OEM revision, creator id, creator revision. 5.2.6
HEADER: Final = Struct("<4sIBB6s8sI4sI")
HEADER_CHECKSUM: Final = 9
assert HEADER.size == 36

# signature, checksum, OEM id, revision, RSDT, length, XSDT, extended checksum. 5.2.5.3
RSDP: Final = Struct("<8sB6sBIIQB3x")
RSDP_V1_SIZE: Final = 20
RSDP_CHECKSUM: Final = 8
RSDP_EXT_CHECKSUM: Final = 32
assert RSDP.size == 36

# address space, bit width, bit offset, access size, address. 5.2.3.2
GAS: Final = Struct("<BBBBQ")
GAS_SYSTEM_IO: Final = 1
GAS_BYTE: Final = 1
assert GAS.size == 12

# FADT, revision 6: offsets from the start of the table. 5.2.9
FADT_SIZE: Final = 276
FADT_REVISION: Final = 6
FADT_IAPC_BOOT_ARCH: Final = 109
FADT_FLAGS: Final = 112
FADT_RESET_REG: Final = 116
FADT_RESET_VALUE: Final = 128
FADT_MINOR: Final = 131
FADT_X_DSDT: Final = 140
FADT_SLEEP_CONTROL: Final = 244
FADT_SLEEP_STATUS: Final = 256
FADT_HYPERVISOR_ID: Final = 268
FADT_FLAG_PWR_BUTTON: Final = 1 << 4  # the power button is a device, not a fixed-hardware bit
FADT_FLAG_SLP_BUTTON: Final = 1 << 5
FADT_FLAG_RESET_REG: Final = 1 << 10
FADT_FLAG_HW_REDUCED: Final = 1 << 20
IAPC_NO_VGA: Final = 1 << 2
IAPC_NO_CMOS_RTC: Final = 1 << 5

# MADT. 5.2.12
MADT_REVISION: Final = 5
MADT: Final = Struct("<II")  # local APIC address, flags
MADT_LOCAL_APIC: Final = Struct("<BBBBI")  # type 0, length, processor UID, APIC id, flags
MADT_IO_APIC: Final = Struct("<BBBBII")  # type 1, length, id, reserved, address, first GSI
MADT_ENABLED: Final = 1
assert MADT_LOCAL_APIC.size == 8
assert MADT_IO_APIC.size == 12

# Hardware-reduced sleep registers. 4.8.3.7
SLEEP_ENABLE: Final = 1 << 5
SLEEP_TYPE_SHIFT: Final = 2
SLEEP_TYPE_MASK: Final = 7
WAKE_STATUS: Final = 1 << 7
SLEEP_TYPE_S5: Final = 5  # what our \_S5 tells the guest to write; the platform's choice

# Notifications. 5.6.6
NOTIFY_DEVICE: Final = 0x80  # power button pressed; device-specific in general

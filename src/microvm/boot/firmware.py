"""The 16 bytes of firmware there are: what a kernel runs that asks the BIOS to restart the machine.

Linux with CONFIG_EFI on a hardware-reduced platform takes for granted that EFI does its resets. It never tries the ACPI
reset register; finding no EFI, it goes back to real mode and jumps to the BIOS at F000:FFF0 (arch/x86/kernel/reboot.c,
`reboot_init`, `native_machine_emergency_restart`; Linux 6.1). Distribution kernels are built so. Without code there,
every ``reboot`` and every ``panic=`` would run into zeroes.
"""

from __future__ import annotations

from struct import pack

from . import layout


def reset_vector() -> bytes:
    """16-bit code for `layout.RESET_VECTOR` that writes the ACPI reset register, then halts."""
    code = pack("<BHBBB", 0xBA, layout.RESET_PORT, 0xB0, layout.RESET_VALUE, 0xEE)  # mov dx; mov al; out dx, al
    return code + b"\xfa\xf4\xeb\xfd"  # cli; hlt; jmp to the hlt

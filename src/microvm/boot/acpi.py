r"""The ACPI tables of the platform: hardware-reduced, so Linux looks for no PIT, PIC or PM timer. [acpi-6.4]

One blob for `layout.ACPI_TABLES`: RSDP first, where a kernel that scans for it finds it, then DSDT, FADT, MADT, XSDT.
The DSDT names the serial port, every virtio transport (the command line cannot add any beside it) and the generic event
device with what it reports.

The event device has one interrupt for each source, so that its method knows what happened without asking the host.
The power button has `layout.GED_GSI`; further sources (a VM generation id, memory hot plug) are `EventDevice`s on
`layout.GED_SPARE_GSIS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack, pack_into
from typing import Final, NamedTuple

from ..errors import ConfigError
from ..spec import acpi as spec
from . import aml, layout
from .layout import VirtioSlot

CPUS_MAX: Final = 255  # APIC ids of eight bits, 255 being the broadcast
_OEM_ID: Final = b"MICROV"
_OEM_TABLE_ID: Final = b"MICROVM "
_CREATOR: Final = b"PYVM"
_ALIGN: Final = 64
_SYSTEM_BUS: Final = "\\_SB"


class EventDevice(NamedTuple):
    r"""An ACPI device whose notifications the generic event device delivers.

    ``name`` is its four-character name under ``\_SB``, ``terms`` the AML inside it, ``gsi`` the interrupt on which
    the guest notifies it with ``value``.
    """

    name: str
    terms: bytes
    gsi: int
    value: int = spec.NOTIFY_DEVICE


GENERATION_GSI: Final = layout.GED_SPARE_GSIS[0]
GENERATION_ID_SIZE: Final = 16
GENERATION: Final = EventDevice(
    "VGEN",
    aml.name("_HID", aml.string("MVMVGID"))
    + aml.name("_CID", aml.package(aml.string("VM_Gen_Counter"), aml.string("VMGENCTR")))
    + aml.name("_DDN", aml.string("VM_Gen_Counter"))
    + aml.name("ADDR", aml.package(aml.integer(layout.GENERATION_ID), aml.integer(0))),
    GENERATION_GSI,
)
"""The VM generation id: 16 bytes at `layout.GENERATION_ID` that change when this guest is a copy of another."""

POWER_BUTTON: Final = EventDevice("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), layout.GED_GSI)


def build(cpus: int, slots: Sequence[VirtioSlot] = (), extra: Sequence[EventDevice] = ()) -> bytes:
    """All tables, linked to lie at `layout.ACPI_TABLES`, the RSDP at the very start.

    Raises ConfigError for a number of CPUs or devices the tables cannot describe.
    """
    if not 1 <= cpus <= CPUS_MAX:
        raise ConfigError("cpus", cpus, f"1 to {CPUS_MAX}")
    blob = bytearray(spec.RSDP.size)

    def place(table: bytes) -> int:
        blob.extend(bytes(-len(blob) % _ALIGN))
        gpa = layout.ACPI_TABLES + len(blob)
        blob.extend(table)
        return gpa

    dsdt_gpa = place(dsdt(slots, (POWER_BUTTON, *extra)))
    fadt_gpa = place(fadt(dsdt_gpa))
    madt_gpa = place(madt(cpus))
    xsdt_gpa = place(_table(b"XSDT", 1, pack("<QQ", fadt_gpa, madt_gpa)))
    blob[: spec.RSDP.size] = _rsdp(xsdt_gpa)
    if len(blob) > layout.ACPI_TABLES_END - layout.ACPI_TABLES:
        raise ConfigError("devices", len(slots) + len(extra), "more than the ACPI tables have room for")
    return bytes(blob)


def dsdt(slots: Sequence[VirtioSlot], events: Sequence[EventDevice]) -> bytes:
    """The differentiated system description table. 5.2.11.1"""
    devices = [_serial()]
    devices += [_virtio(index, slot) for index, slot in enumerate(slots)]
    devices += [aml.device(event.name, event.terms) for event in events]
    devices.append(_event_device(events))
    sleep = aml.name("\\_S5", aml.package(aml.integer(spec.SLEEP_TYPE_S5), *[aml.integer(0)] * 3))
    return _table(b"DSDT", 2, aml.scope(_SYSTEM_BUS, *devices) + sleep)


def fadt(dsdt_gpa: int) -> bytes:
    """The fixed description table of a hardware-reduced platform: every power management block is absent. 5.2.9"""
    body = bytearray(spec.FADT_SIZE - spec.HEADER.size)

    def put(fmt: str, offset: int, *values: int | bytes) -> None:
        pack_into(fmt, body, offset - spec.HEADER.size, *values)

    flags = spec.FADT_FLAG_HW_REDUCED | spec.FADT_FLAG_RESET_REG | spec.FADT_FLAG_PWR_BUTTON | spec.FADT_FLAG_SLP_BUTTON
    put("<H", spec.FADT_IAPC_BOOT_ARCH, spec.IAPC_NO_VGA | spec.IAPC_NO_CMOS_RTC)
    put("<I", spec.FADT_FLAGS, flags)
    put("12s", spec.FADT_RESET_REG, _port(layout.RESET_PORT))
    put("B", spec.FADT_RESET_VALUE, layout.RESET_VALUE)
    put("B", spec.FADT_MINOR, 4)
    put("<Q", spec.FADT_X_DSDT, dsdt_gpa)
    put("12s", spec.FADT_SLEEP_CONTROL, _port(layout.SLEEP_CONTROL_PORT))
    put("12s", spec.FADT_SLEEP_STATUS, _port(layout.SLEEP_STATUS_PORT))
    put("8s", spec.FADT_HYPERVISOR_ID, b"MICROVM")
    return _table(b"FACP", spec.FADT_REVISION, bytes(body))


def madt(cpus: int) -> bytes:
    """The interrupt controllers: a local APIC for each CPU, APIC ids from 0, and the I/O APIC from GSI 0. 5.2.12"""
    body = spec.MADT.pack(layout.LOCAL_APIC, 0)
    for cpu in range(cpus):
        body += spec.MADT_LOCAL_APIC.pack(0, spec.MADT_LOCAL_APIC.size, cpu, cpu, spec.MADT_ENABLED)
    body += spec.MADT_IO_APIC.pack(1, spec.MADT_IO_APIC.size, 0, 0, layout.IOAPIC, 0)
    return _table(b"APIC", spec.MADT_REVISION, body)


def _serial() -> bytes:
    return aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_STA", aml.integer(0xF)),
        aml.name("_CRS", aml.resources(aml.io(layout.SERIAL_PORT, 8), aml.interrupt(layout.SERIAL_GSI))),
    )


def _virtio(index: int, slot: VirtioSlot) -> bytes:
    return aml.device(
        f"VR{index:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(index)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.memory32_fixed(slot.gpa, slot.size), aml.interrupt(slot.gsi))),
    )


def _event_device(events: Iterable[EventDevice]) -> bytes:
    """The generic event device: ``_EVT`` gets the GSI that fired. 5.6.9"""
    sources = list(events)
    gsis = [event.gsi for event in sources]
    if len(set(gsis)) != len(gsis):
        raise ConfigError("events", gsis, "each source of ACPI events needs an interrupt of its own")
    return aml.device(
        "GED",
        aml.name("_HID", aml.string("ACPI0013")),
        aml.name("_UID", aml.integer(0)),
        # A descriptor for each: Linux looks at the first interrupt of a descriptor only (6.1, drivers/acpi/evged.c).
        aml.name("_CRS", aml.resources(*(aml.interrupt(gsi) for gsi in gsis))),
        aml.method(
            "_EVT",
            1,
            *[
                aml.when(
                    aml.equal(aml.ARG0, aml.integer(event.gsi)),
                    aml.notify(f"{_SYSTEM_BUS}.{event.name}", event.value),
                )
                for event in sources
            ],
            serialized=True,
        ),
    )


def _port(port: int) -> bytes:
    return spec.GAS.pack(spec.GAS_SYSTEM_IO, 8, 0, spec.GAS_BYTE, port)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = spec.HEADER.pack(
        signature, spec.HEADER.size + len(body), revision, 0, _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR, 1
    )
    table = bytearray(header + body)
    table[spec.HEADER_CHECKSUM] = -sum(table) & 0xFF
    return bytes(table)


def _rsdp(xsdt_gpa: int) -> bytes:
    """The root pointer, revision 2; there is no RSDT. 5.2.5.3"""
    rsdp = bytearray(spec.RSDP.pack(b"RSD PTR ", 0, _OEM_ID, 2, 0, spec.RSDP.size, xsdt_gpa, 0))
    rsdp[spec.RSDP_CHECKSUM] = -sum(rsdp[: spec.RSDP_V1_SIZE]) & 0xFF
    rsdp[spec.RSDP_EXT_CHECKSUM] = -sum(rsdp) & 0xFF
    return bytes(rsdp)

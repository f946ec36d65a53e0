"""The ACPI tables: by bytes here, and by Intel's disassembler where it is installed."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from microvm.boot import EventDevice, acpi, aml, layout, virtio_slot
from microvm.errors import ConfigError

SLOTS = [virtio_slot(index) for index in range(layout.VIRTIO_SLOTS)]


def tables(blob: bytes) -> dict[bytes, bytes]:
    """Follow the pointers from the RSDP, as a kernel does."""

    def table(gpa: int) -> bytes:
        start = gpa - layout.ACPI_TABLES
        (length,) = struct.unpack_from("<I", blob, start + 4)
        data = blob[start : start + length]
        assert len(data) == length
        assert sum(data) & 0xFF == 0
        return data

    assert blob[:8] == b"RSD PTR "
    assert sum(blob[:20]) & 0xFF == sum(blob[:36]) & 0xFF == 0
    assert blob[15] == 2
    xsdt = table(struct.unpack_from("<Q", blob, 24)[0])
    found = {b"XSDT": xsdt}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        data = table(gpa)
        found[data[:4]] = data
    found[b"DSDT"] = table(struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


def test_tables_are_reachable_and_sum_to_zero() -> None:
    assert set(tables(acpi.build(1))) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}


def test_fadt_describes_a_hardware_reduced_platform() -> None:
    fadt = tables(acpi.build(1))[b"FACP"]
    assert len(fadt) == 276
    assert fadt[8] == 6
    assert struct.unpack_from("<H", fadt, 109) == (0x24,)
    assert struct.unpack_from("<I", fadt, 112) == (1 << 20 | 1 << 10 | 1 << 5 | 1 << 4,)
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, layout.RESET_PORT)
    assert fadt[128] == layout.RESET_VALUE
    assert fadt[244:256] == struct.pack("<BBBBQ", 1, 8, 0, 1, layout.SLEEP_CONTROL_PORT)
    assert fadt[256:268] == struct.pack("<BBBBQ", 1, 8, 0, 1, layout.SLEEP_STATUS_PORT)
    assert not any(fadt[36:109])  # no FACS, no 32-bit DSDT, no power management blocks


@pytest.mark.parametrize("cpus", [1, 2, 32, 255])
def test_madt_has_an_apic_for_each_cpu_and_one_io_apic(cpus: int) -> None:
    madt = tables(acpi.build(cpus))[b"APIC"]
    assert madt[8] == 5
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 0)
    for cpu in range(cpus):
        assert madt[44 + 8 * cpu :][:8] == bytes([0, 8, cpu, cpu, 1, 0, 0, 0])
    assert madt[44 + 8 * cpus :] == struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC0_0000, 0)


@pytest.mark.parametrize("cpus", [0, -1, 256])
def test_cpus_without_an_apic_id_are_refused(cpus: int) -> None:
    with pytest.raises(ConfigError, match="cpus"):
        acpi.build(cpus)


def test_dsdt_names_every_device() -> None:
    dsdt = tables(acpi.build(1, SLOTS))[b"DSDT"]
    assert dsdt.count(b"LNRO0005") == layout.VIRTIO_SLOTS
    for slot in SLOTS:
        assert aml.memory32_fixed(slot.gpa, slot.size) + aml.interrupt(slot.gsi) in dsdt
    assert aml.eisa_id("PNP0501") in dsdt
    assert b"ACPI0013" in dsdt
    assert aml.eisa_id("PNP0C0C") in dsdt
    assert aml.name("\\_S5", aml.package(*map(aml.integer, (5, 0, 0, 0)))) in dsdt


def test_tables_stay_within_their_area() -> None:
    assert len(acpi.build(255, SLOTS)) < layout.ACPI_TABLES_END - layout.ACPI_TABLES
    huge = EventDevice("BLOB", aml.name("DATA", aml.buffer(bytes(0x10000))), layout.GED_SPARE_GSIS[0])
    with pytest.raises(ConfigError, match="room"):
        acpi.build(1, (), [huge])


def test_event_sources_must_not_share_an_interrupt() -> None:
    with pytest.raises(ConfigError, match="interrupt of its own"):
        acpi.build(1, (), [EventDevice("VGEN", b"", layout.GED_GSI)])


def test_slots_end_with_the_io_apic() -> None:
    assert SLOTS[-1].gsi == layout.IOAPIC_PINS - 1
    with pytest.raises(ConfigError, match="at most 18"):
        virtio_slot(layout.VIRTIO_SLOTS)


@pytest.mark.skipif(shutil.which("iasl") is None, reason="iasl (acpica-tools) is not installed")
def test_disassembler_reads_the_tables_as_meant(tmp_path: Path) -> None:
    generation = EventDevice("VGEN", aml.name("_CID", aml.string("VM_Gen_Counter")), layout.GED_SPARE_GSIS[0])
    text = {}
    for signature, data in tables(acpi.build(2, SLOTS, [generation])).items():
        name = signature.decode().lower()
        (tmp_path / f"{name}.dat").write_bytes(data)
        run = subprocess.run(
            ["iasl", "-d", f"{name}.dat"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "error" not in (run.stdout + run.stderr).lower()
        text[name] = (tmp_path / f"{name}.dsl").read_text()
    assert "Hardware Reduced (V5) : 1" in text["facp"]
    dsdt = " ".join(text["dsdt"].split())
    assert 'Name (_HID, "LNRO0005")' in dsdt
    assert all(f"Exclusive, ,, ) {{ 0x0000000{gsi}, }}" in dsdt for gsi in (5, 1))
    assert "If ((Arg0 == 0x05)) { Notify (\\_SB.PWRB, 0x80)" in dsdt
    assert "If ((Arg0 == One)) { Notify (\\_SB.VGEN, 0x80)" in dsdt
    # What the compiler accepts, it understood: its warnings are about names it cannot know.
    run = subprocess.run(["iasl", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr

"""What ends up in guest memory and in the registers for each kind of kernel."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from microvm import boot
from microvm.boot import layout
from microvm.errors import BootError, ConfigError
from microvm.memory import GuestMemory
from microvm.spec import bootparam, pvh, x86
from microvm.testing.kernels import LOAD_GPA, TEXT, gzip_payload, make_bzimage, make_elf, u32, u64

MIB = 1 << 20


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory.allocate(64 * MIB)


def e820(memory: GuestMemory) -> list[tuple[int, ...]]:
    count = memory.load_u8(layout.BOOT_PARAMS + bootparam.E820_ENTRIES)
    base = layout.BOOT_PARAMS + bootparam.E820_TABLE
    return [memory.unpack(bootparam.E820_ENTRY, base + 20 * index) for index in range(count)]


def _pvh_map(memory: GuestMemory) -> list[tuple[int, ...]]:
    map_gpa, entries = memory.unpack(pvh.START_INFO, layout.PVH_START_INFO)[7:9]
    return [memory.unpack(pvh.MEMMAP_ENTRY, map_gpa + 24 * index)[:3] for index in range(entries)]


def test_elf_with_note_starts_by_pvh(memory: GuestMemory) -> None:
    state = boot.load(memory, make_elf(), [b"initrd"], "console=ttyS0")
    registers = state.registers
    assert state.protocol == "pvh"
    assert registers.rip == state.entry == LOAD_GPA + 0x10
    assert registers.rbx == layout.PVH_START_INFO
    assert registers.cr0 == x86.CR0_PE | x86.CR0_ET
    assert registers.efer == registers.cr4 == 0
    assert registers.cs.attributes == 0xC09B
    assert registers.ss.attributes == registers.ds.attributes == 0xC093
    assert memory.read(LOAD_GPA, len(TEXT)) == TEXT


def test_pvh_start_info_names_everything(memory: GuestMemory) -> None:
    state = boot.load(memory, make_elf(), [b"initrd"], "console=ttyS0")
    info = memory.unpack(pvh.START_INFO, layout.PVH_START_INFO)
    magic, version, _flags, modules, modules_gpa, cmdline_gpa, rsdp_gpa, map_gpa, entries, _ = info
    assert (magic, version, modules) == (0x336EC578, 1, 1)
    assert memory.read(cmdline_gpa, 14) == b"console=ttyS0\0"
    assert memory.read(rsdp_gpa, 8) == b"RSD PTR "
    assert memory.unpack(pvh.MODULE, modules_gpa) == (*state.initrd, 0, 0) if state.initrd else False
    assert (map_gpa, entries) == (layout.PVH_START_INFO + 56 + 32, 3)
    assert _pvh_map(memory) == [(0, 0x9FC00, 1), (0x9FC00, 0x60400, 2), (0x100000, 63 * MIB, 1)]


def test_pvh_without_initrd_has_no_module(memory: GuestMemory) -> None:
    state = boot.load(memory, make_elf())
    assert state.initrd is None
    assert memory.unpack(pvh.START_INFO, layout.PVH_START_INFO)[3:5] == (0, 0)


@pytest.mark.parametrize("size", [4, 8])
def test_pvh_note_of_either_width_is_understood(memory: GuestMemory, size: int) -> None:
    from microvm.testing import kernels

    data = make_elf().replace(kernels.note(), kernels.note(size=size))
    assert boot.load(memory, data).registers.rip == LOAD_GPA + 0x10


def test_plain_elf_starts_by_the_64_bit_protocol(memory: GuestMemory) -> None:
    state = boot.load(memory, make_elf(with_note=False), [b"initrd"], "quiet")
    registers = state.registers
    assert state.protocol == "linux64"
    assert registers.rip == LOAD_GPA
    assert registers.rsi == layout.BOOT_PARAMS
    assert registers.cr3 == layout.PAGE_TABLES
    assert registers.efer == x86.EFER_LME | x86.EFER_LMA
    assert registers.cs.selector == 0x10
    assert registers.ds.selector == 0x18
    assert registers.cs.attributes == 0xA09B
    page = memory.read(layout.BOOT_PARAMS, 4096)
    assert u32(page, 0x202) == 0x53726448
    assert (u32(page, 0x218), u32(page, 0x21C)) == state.initrd
    assert u32(page, 0x228) == layout.CMDLINE
    assert u64(page, 0x70) == layout.ACPI_TABLES


@pytest.mark.parametrize("gpa", [0, 0x7123, LOAD_GPA, 0xBFFF_FFFF, 0xFEE0_0020, 0xFFFF_FFFF])
def test_page_tables_map_the_first_4_gib_to_themselves(memory: GuestMemory, gpa: int) -> None:
    boot.load(memory, make_elf(with_note=False))
    table = layout.PAGE_TABLES
    for shift in (39, 30):
        entry = memory.load_u64(table + 8 * (gpa >> shift & 511))
        assert entry & 3 == 3
        table = entry & ~0xFFF
    entry = memory.load_u64(table + 8 * (gpa >> 21 & 511))
    assert entry & 0x83 == 0x83
    assert (entry & ~0x1F_FFFF) | gpa & 0x1F_FFFF == gpa


def test_boot_areas_do_not_overlap() -> None:
    areas = sorted(
        [
            (layout.GDT, 32),
            (layout.PVH_START_INFO, 0x1000),
            (layout.BOOT_PARAMS, 0x1000),
            (layout.BOOT_STACK - 0x800, 0x800),
            (layout.PAGE_TABLES, 0x6000),
            (layout.CMDLINE, layout.CMDLINE_MAX),
            (layout.ACPI_TABLES, layout.ACPI_TABLES_END - layout.ACPI_TABLES),
            (layout.RESET_VECTOR, 16),
        ]
    )
    for (low, size), (high, _) in itertools.pairwise(areas):
        assert low + size <= high


def test_bzimage_starts_by_its_64_bit_entry(memory: GuestMemory) -> None:
    image = make_bzimage(b"not compressed at all")
    state = boot.load(memory, image, [b"initrd"], "quiet")
    assert state.protocol == "bzimage"
    assert state.registers.rip == LOAD_GPA + 0x200
    assert state.kernel_end == LOAD_GPA + 0x10_0000
    assert memory.read(LOAD_GPA, len(TEXT)) == TEXT
    page = memory.read(layout.BOOT_PARAMS, 4096)
    assert page[0x1F1] == 1
    assert page[0x210] == 0xFF
    assert u64(page, 0x258) == LOAD_GPA
    assert page[:0x1E8].count(0) == 0x1E8 - 1  # nothing but the RSDP pointer before the header
    assert e820(memory)[2] == (0x100000, 63 * MIB, 1)


def test_bzimage_with_known_compression_is_unpacked_here(memory: GuestMemory) -> None:
    state = boot.load(memory, make_bzimage(gzip_payload(make_elf())))
    assert state.protocol == "pvh"
    assert state.registers.rip == LOAD_GPA + 0x10


def test_unpacking_can_be_declined(memory: GuestMemory) -> None:
    assert boot.load(memory, make_bzimage(gzip_payload(make_elf())), unpack=False).protocol == "bzimage"


def test_restart_through_the_bios_reaches_the_reset_register(memory: GuestMemory) -> None:
    boot.load(memory, make_elf())
    code = memory.read(0xF_FFF0, 10)
    assert code == bytes.fromhex("ba0206 b006 ee fa f4 ebfd")
    reserved = [(gpa, size) for gpa, size, kind in _pvh_map(memory) if kind == 2]
    assert any(gpa <= 0xF_FFF0 < gpa + size for gpa, size in reserved)


def test_zero_setup_sectors_mean_four(memory: GuestMemory) -> None:
    image = make_bzimage()
    image = image[:0x1F1] + b"\0" + image[0x1F2:1024] + bytes(3 * 512) + image[1024:]
    boot.load(memory, image)
    assert memory.read(LOAD_GPA, len(TEXT)) == TEXT


def test_initrds_lie_end_to_end_on_four_byte_boundaries(memory: GuestMemory) -> None:
    state = boot.load(memory, make_elf(), [b"12345", b"", b"abc", b"xyzw"])
    assert state.initrd is not None
    gpa, size = state.initrd
    assert gpa % 4096 == 0
    assert memory.read(gpa, size) == b"12345\0\0\0abc\0xyzw"
    assert gpa + size <= 64 * MIB < gpa + size + 4096


def test_initrd_stays_below_what_the_kernel_can_reach(memory: GuestMemory) -> None:
    state = boot.load(memory, make_bzimage(initrd_addr_max=0x1FF_FFFF), [b"x" * 5000])
    assert state.initrd is not None
    assert state.initrd.gpa + state.initrd.size <= 0x200_0000


def test_initrd_larger_than_memory_is_refused(memory: GuestMemory) -> None:
    with pytest.raises(BootError, match=r"does not fit into memory: it needs 50\.0 MiB"):
        boot.load(memory, make_elf(), [bytes(50 * MIB)])


def test_initrd_never_covers_the_kernel() -> None:
    small = GuestMemory.allocate(18 * MIB)
    room = 18 * MIB - (LOAD_GPA + 2 * len(TEXT)) & -4096
    state = boot.load(small, make_elf(), [bytes(room)])
    assert state.initrd is not None
    assert state.initrd.gpa >= state.kernel_end


def test_initrd_without_room_above_the_kernel_goes_below() -> None:
    small = GuestMemory.allocate(18 * MIB)
    state = boot.load(small, make_elf(), [bytes(15 * MIB)])
    assert state.initrd == (MIB, 15 * MIB)
    assert state.initrd.gpa + state.initrd.size <= state.kernel_start
    with pytest.raises(BootError, match=r"does not fit .* beside the kernel there are 15\.0 MiB"):
        boot.load(small, make_elf(), [bytes(15 * MIB + 1)])


def test_memory_beyond_the_hole_is_in_the_map() -> None:
    memory = GuestMemory.allocate(5 << 30)
    state = boot.load(memory, make_bzimage(), [b"x"])
    assert e820(memory)[2:] == [
        (0x100000, 0xC0000000 - 0x100000, 1),
        (1 << 32, 2 << 30, 1),
    ]
    assert state.initrd is not None
    assert state.initrd.gpa < 1 << 31


def test_memory_without_room_for_a_kernel_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="memory"):
        boot.load(GuestMemory.allocate(MIB), make_elf())


@pytest.mark.parametrize("bad", ["a\0b", "a\nb", "a\rb", "\udfff\ud800"])
def test_command_line_with_forbidden_characters_is_refused(memory: GuestMemory, bad: str) -> None:
    with pytest.raises(ConfigError, match="command line"):
        boot.load(memory, make_elf(), (), bad)


def test_command_line_is_never_cut(memory: GuestMemory) -> None:
    boot.load(memory, make_elf(), (), "x" * 2047)
    assert memory.read(layout.CMDLINE, 2049) == b"x" * 2047 + b"\0\0"
    with pytest.raises(ConfigError, match="of 2048 bytes: this kernel takes at most 2047"):
        boot.load(memory, make_elf(), (), "x" * 2048)
    with pytest.raises(ConfigError, match="at most 100"):
        boot.load(memory, make_bzimage(cmdline_size=100), (), "x" * 101)
    with pytest.raises(ConfigError, match="at most 65535"):
        boot.load(memory, make_bzimage(cmdline_size=0xFFFF_FFFF), (), "x" * 65536)


def test_refused_kernel_or_command_line_leaves_no_written_memory(memory: GuestMemory) -> None:
    writes: list[tuple[int, int]] = []
    memory.observe(lambda gpa, size: writes.append((gpa, size)))
    for kernel, line in ((b"rubbish", ""), (make_elf(), "a\n"), (make_elf(entry=0, with_note=False), "")):
        with pytest.raises((BootError, ConfigError)):
            boot.load(memory, kernel, (), line)
    assert writes == []


def test_everything_written_is_reported(memory: GuestMemory) -> None:
    writes: list[tuple[int, int]] = []
    memory.observe(lambda gpa, size: writes.append((gpa, size)))
    state = boot.load(memory, make_elf(), [b"initrd"])
    assert state.initrd in writes
    assert (LOAD_GPA, len(TEXT)) in writes
    assert {layout.CMDLINE, layout.ACPI_TABLES, layout.PVH_START_INFO, layout.GDT} <= {gpa for gpa, _ in writes}


def test_trailing_zeroes_of_a_segment_are_not_copied(memory: GuestMemory) -> None:
    from microvm.spec import elf
    from microvm.testing.kernels import ehdr, phdr

    writes: list[tuple[int, int]] = []
    memory.observe(lambda gpa, size: writes.append((gpa, size)))
    body = TEXT + bytes(MIB)
    data = ehdr(1) + phdr(elf.PT_LOAD, 120, LOAD_GPA, len(body)) + body
    boot.load(memory, data)
    (copied,) = [size for gpa, size in writes if gpa == LOAD_GPA]
    assert len(TEXT) <= copied < 65536 + len(TEXT)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview, io.BytesIO], ids=lambda wrap: wrap.__name__)
def test_any_kind_of_source_loads(memory: GuestMemory, wrap: Callable[[bytes], boot.ImageSource]) -> None:
    assert boot.load(memory, wrap(make_elf()), [wrap(b"initrd")]).initrd is not None
    assert memory.read(LOAD_GPA, len(TEXT)) == TEXT


@pytest.mark.parametrize("buffering", [0, -1])
def test_file_loads_and_stays_open(memory: GuestMemory, tmp_path: Path, buffering: int) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(make_bzimage())
    with path.open("rb", buffering=buffering) as file:
        boot.load(memory, file)
        assert not file.closed
    assert memory.read(LOAD_GPA, len(TEXT)) == TEXT


def test_pipe_loads(memory: GuestMemory) -> None:
    reader, writer = os.pipe()
    os.write(writer, make_elf())
    os.close(writer)
    with open(reader, "rb") as file:
        assert boot.load(memory, file).protocol == "pvh"


def test_file_that_shrinks_is_a_boot_error(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "initrd"
    path.write_bytes(bytes(8 * MIB))
    with path.open("rb", buffering=0) as file:
        from microvm.boot.image import open_image

        image = open_image("initrd", file)
        os.truncate(path, 4 * MIB)
        with pytest.raises(BootError, match="initrd is truncated"):
            image.read_into(0, memoryview(bytearray(8 * MIB)))


def test_file_that_cannot_be_read_is_a_boot_error(memory: GuestMemory, tmp_path: Path) -> None:
    class Broken(io.BytesIO):
        def readinto(self, buffer: object) -> int:
            raise OSError(5, "Input/output error")

    with pytest.raises(BootError, match="kernel cannot be read: Input/output error"):
        boot.load(memory, Broken(make_elf()))


def test_endless_stream_is_cut_off(memory: GuestMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    from microvm.boot import image

    class Endless(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= 1025
            return bytes(size)

    monkeypatch.setattr(image, "STREAM_MAX", 1024)
    with pytest.raises(BootError, match="larger than"):
        boot.load(memory, Endless())  # type: ignore[arg-type]

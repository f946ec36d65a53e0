"""Mappings, read-only memory, dirty tracking, doorbells, translation, two partitions side by side."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from microvm._os.event import Event
from microvm.errors import ConfigError
from microvm.hypervisor.base import Perm
from microvm.memory import GuestMemory, MemoryRegion

from .asm import Code
from .machine import DATA, MEMORY, MMIO, PD, PORT_LOG, Machine

EXTRA = 0x80_0000  # beyond the machine's own memory, inside the page tables' first GiB
PAGE = 4096


def extra_memory(pages: int) -> tuple[GuestMemory, MemoryRegion]:
    memory = GuestMemory.allocate(pages * PAGE)
    return memory, memory.regions[0]


def test_mapped_memory_is_shared_both_ways(machine: Machine) -> None:
    memory, region = extra_memory(4)
    machine.partition.map(EXTRA, region)
    memory.store_u32(8, 0x1234)
    code = Code().mov("rbx", EXTRA + 8).load("eax", "rbx").inc("eax").store("rbx", "eax").stop(4)
    assert machine.finish(machine.long(code)) == 0x1235
    assert memory.load_u32(8) == 0x1235


def test_memory_taken_away_becomes_device_space(machine: Machine) -> None:
    memory, region = extra_memory(4)
    machine.partition.map(EXTRA, region)
    code = Code().mov("rbx", EXTRA).load("eax", "rbx").stop(4)
    memory.store_u32(0, 77)
    assert machine.finish(machine.long(code)) == 77
    machine.partition.unmap(EXTRA, region.size)
    assert machine.finish(machine.long(code)) == 0xFFFF_FFFF
    machine.partition.map(EXTRA, region)
    assert machine.finish(machine.long(code)) == 77


def test_one_region_can_be_shown_at_two_addresses(machine: Machine) -> None:
    _, region = extra_memory(1)
    machine.partition.map(EXTRA, region)
    machine.partition.map(EXTRA + 0x10_0000, region)
    code = Code().mov("rbx", EXTRA).mov("eax", 5).store("rbx", "eax")
    code.mov("rbx", EXTRA + 0x10_0000).load("eax", "rbx").stop()
    assert machine.finish(machine.long(code)) == 5


def test_writes_to_read_only_memory_become_device_accesses(machine: Machine) -> None:
    memory, region = extra_memory(1)
    memory.store_u32(0, 9)
    machine.partition.map(EXTRA, region, Perm.READ | Perm.EXEC)
    seen: list[tuple[int, int, int]] = []

    class Device:
        def mmio_read(self, offset: int, size: int) -> int:
            raise AssertionError("reads come from memory")

        def mmio_write(self, offset: int, size: int, value: int) -> None:
            seen.append((offset, size, value))

    machine.bus.map_mmio(EXTRA, PAGE, Device())
    code = Code().mov("rbx", EXTRA).mov("eax", 5).store("rbx", "eax").load("ecx", "rbx").move("eax", "ecx").stop()
    assert machine.finish(machine.long(code)) == 9
    assert seen == [(0, 4, 5)]
    assert memory.load_u32(0) == 9


def test_code_runs_from_read_only_memory(machine: Machine) -> None:
    memory, region = extra_memory(1)
    memory.write(0, Code(origin=EXTRA).mov("al", 6).stop().build())
    machine.partition.map(EXTRA, region, Perm.READ | Perm.EXEC)
    code = Code().mov("rax", EXTRA).raw("ff e0")  # jmp rax
    assert machine.finish(machine.long(code)) == 6


@pytest.mark.parametrize(("offset", "pages"), [(0, 1), (-1, 2), (1, 1), (3, 4), (-4, 9)])
def test_overlapping_mappings_are_refused(machine: Machine, offset: int, pages: int) -> None:
    _, region = extra_memory(4)
    machine.partition.map(EXTRA, region)
    _, other = extra_memory(pages)
    with pytest.raises(ConfigError):
        machine.partition.map(EXTRA + offset * PAGE, other)


def test_adjacent_mappings_are_not_overlapping(machine: Machine) -> None:
    for position in (0, 1, -1):
        _, region = extra_memory(1)
        machine.partition.map(EXTRA + position * PAGE, region)


def test_unmapping_what_is_not_mapped_is_refused(machine: Machine) -> None:
    _, region = extra_memory(4)
    machine.partition.map(EXTRA, region)
    for gpa, size in ((EXTRA, PAGE), (EXTRA + PAGE, region.size), (EXTRA * 2, PAGE)):
        with pytest.raises(ConfigError):
            machine.partition.unmap(gpa, size)


def write_pages(pages: list[int], gpa: int = DATA) -> Code:
    code = Code().mov("eax", 0xAB)
    for page in pages:
        code.mov("rbx", gpa + page * PAGE + 8).store("rbx", "al")
    return code.stop()


def bits(bitmap: bytes) -> list[int]:
    return [i for i in range(8 * len(bitmap)) if bitmap[i // 8] >> i % 8 & 1]


def test_dirty_log_has_each_written_page_exactly_once_and_starts_anew(make_machine: Callable[..., Machine]) -> None:
    machine = make_machine(track_dirty=True)
    if not machine.partition.caps.dirty_log:
        pytest.skip("no dirty log on this backend")
    own = DATA // PAGE
    machine.finish(machine.long(write_pages([])))
    machine.partition.dirty(0, MEMORY)  # what the processor did to reach the code
    for pages in ([0, 1, 5, 200], [5], [], [0, 511]):
        machine.finish(machine.long(write_pages(pages)))
        bitmap = machine.partition.dirty(0, MEMORY)
        assert len(bitmap) == MEMORY // PAGE // 8
        assert [page - own for page in bits(bitmap) if page >= own] == pages
        assert [page for page in bits(machine.partition.dirty(0, MEMORY)) if page >= own] == []


def test_dirty_log_of_a_region_of_few_pages(machine: Machine) -> None:
    if not machine.partition.caps.dirty_log:
        pytest.skip("no dirty log on this backend")
    _, region = extra_memory(3)
    machine.partition.map(EXTRA, region, track_dirty=True)
    machine.finish(machine.long(write_pages([0, 2], EXTRA)))
    assert bits(machine.partition.dirty(EXTRA, region.size)) == [0, 2]


def test_reading_does_not_dirty(machine: Machine) -> None:
    if not machine.partition.caps.dirty_log:
        pytest.skip("no dirty log on this backend")
    _, region = extra_memory(2)
    machine.partition.map(EXTRA, region, track_dirty=True)
    machine.finish(machine.long(Code().mov("rbx", EXTRA).load("eax", "rbx").stop()))
    assert bits(machine.partition.dirty(EXTRA, region.size)) == []


def test_string_and_locked_writes_dirty_their_pages(machine: Machine) -> None:
    if not machine.partition.caps.dirty_log:
        pytest.skip("no dirty log on this backend")
    _, region = extra_memory(8)
    machine.partition.map(EXTRA, region, track_dirty=True)
    code = Code().mov("rdi", EXTRA + PAGE - 4).mov("ecx", 8).mov("eax", 1).raw("f3 aa")  # rep stosb over a boundary
    code.mov("rbx", EXTRA + 4 * PAGE).raw("f0 ff 03").stop()  # lock inc dword [rbx]
    machine.finish(machine.long(code))
    assert bits(machine.partition.dirty(EXTRA, region.size)) == [0, 1, 4]


def test_dirty_log_without_tracking_is_refused(machine: Machine) -> None:
    if not machine.partition.caps.dirty_log:
        pytest.skip("no dirty log on this backend")
    with pytest.raises(ConfigError):
        machine.partition.dirty(0, MEMORY)


def test_doorbell_takes_its_value_and_leaves_others_to_the_bus(machine: Machine) -> None:
    first, second = Event(), Event()
    try:
        if not machine.partition.doorbell(MMIO + 0x50, 4, 0, first):
            assert not machine.partition.caps.doorbells
            pytest.skip("no doorbells on this backend")
        assert machine.partition.doorbell(MMIO + 0x50, 4, 1, second)
        code = Code().mov("rbx", MMIO + 0x50).mov("eax", 0).store("rbx", "eax").mov("eax", 7).store("rbx", "eax").stop()
        machine.finish(machine.long(code))
        assert first.clear()
        assert not second.clear()
        assert machine.window.writes == [(0x50, 4, 7)]
    finally:
        machine.close()
        first.close()
        second.close()


def test_many_rings_of_a_doorbell_need_no_bus(machine: Machine) -> None:
    event = Event()
    try:
        if not machine.partition.doorbell(MMIO + 0x50, 4, 3, event):
            pytest.skip("no doorbells on this backend")
        code = Code().mov("rbx", MMIO + 0x50).mov("eax", 3).mov("ecx", 200)
        machine.finish(machine.long(code.label("next").store("rbx", "eax").dec("ecx").j("nz", "next").stop()))
        assert event.clear()
        assert not event.clear()
        assert machine.window.writes == []
    finally:
        machine.close()
        event.close()


def test_translate_follows_the_page_tables(machine: Machine) -> None:
    registers = machine.long(Code().stop())
    machine.memory.write(PD + 8 * 100, struct.pack("<Q", DATA | 0x83))
    machine.vcpu.set_registers(registers)
    assert machine.vcpu.translate(DATA + 5) == DATA + 5
    assert machine.vcpu.translate((100 << 21) + 0x1234) == DATA + 0x1234
    assert machine.vcpu.translate(1 << 30) is None


def test_without_paging_an_address_is_its_own_translation(machine: Machine) -> None:
    machine.vcpu.set_registers(machine.protected(Code(32).stop()))
    assert machine.vcpu.translate(0x1234) == 0x1234


def test_two_partitions_do_not_see_each_other(make_machine: Callable[..., Machine]) -> None:
    machines = [make_machine(), make_machine()]
    code = Code().in_(PORT_LOG).mov("rbx", DATA).store("rbx", "al").out(PORT_LOG + 1).stop()
    for number, machine in enumerate(machines):
        machine.log.answer = lambda offset, size, number=number: number + 5  # type: ignore[misc]
        machine.vcpu.set_registers(machine.long(code))
    running = [machine.spawn(0) for machine in machines]
    for each in running:
        each.join()
    for number, machine in enumerate(machines):
        assert machine.stops == [number + 5]
        assert machine.memory.load_u8(DATA) == number + 5
    machines[0].close()
    assert machines[1].finish(machines[1].long(Code().mov("al", 1).stop())) == 1


def test_code_written_by_the_guest_runs(machine: Machine) -> None:
    """Self-modifying code: overwrite an immediate, run it, twice."""
    target = 0xA000
    machine.memory.write(target, Code(origin=target).mov("eax", 1).raw("c3").build())  # ret
    code = Code().mov("rsi", target).raw("ff d6").out(PORT_LOG)  # call rsi
    code.mov("rbx", target + 1).mov("ecx", 2).store("rbx", "ecx").raw("ff d6").out(PORT_LOG).stop()
    machine.finish(machine.long(code))
    assert machine.log.values == [1, 2]


def test_code_written_by_the_host_runs(machine: Machine) -> None:
    for value in (3, 4):
        assert machine.finish(machine.long(Code().mov("al", value).stop())) == value

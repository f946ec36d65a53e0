"""Port and memory-mapped I/O: every size, both directions, string instructions, every mode."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from microvm.hypervisor.base import Registers

from .asm import Code
from .machine import CODE, DATA, MMIO, PORT_LOG, Machine

MODES = {"real": 16, "protected": 32, "long": 64}
ACCUMULATOR = {1: "al", 2: "ax", 4: "eax"}
PATTERN = 0x8182_8384_8586_8788


def load(machine: Machine, mode: str, code: Code) -> Registers:
    enter: Callable[[Code], Registers] = getattr(machine, mode)
    return enter(code)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_out_reaches_the_bus_with_its_size_and_value(machine: Machine, mode: str, size: int) -> None:
    code = Code(MODES[mode]).mov("eax", 0x8765_4321).out(PORT_LOG + 4, size).stop()
    machine.finish(load(machine, mode, code))
    assert machine.log.writes == [(4, size, 0x8765_4321 & (1 << 8 * size) - 1)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_in_changes_only_the_bytes_it_reads(machine: Machine, mode: str, size: int) -> None:
    machine.log.answer = lambda offset, size: 0xA1B2_C3D4 & (1 << 8 * size) - 1
    code = Code(MODES[mode]).mov("eax", 0x1122_3344).in_(PORT_LOG, size).stop(4)
    mask = (1 << 8 * size) - 1
    assert machine.finish(load(machine, mode, code)) == (0x1122_3344 & ~mask | 0xA1B2_C3D4 & mask)


def test_in_to_eax_clears_the_upper_half_of_rax(machine: Machine) -> None:
    code = Code().mov("rax", -1).in_(PORT_LOG, 4).stop()
    machine.finish(machine.long(code))
    assert machine.vcpu.get_registers().rax == 0


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 7, 600])
def test_rep_outs_writes_every_element_in_order(machine: Machine, mode: str, size: int, count: int) -> None:
    source = 0x4000 if mode == "real" else DATA + 5  # not aligned, and 600 dwords cross a page
    data = bytes(i * 7 + (i >> 8) & 0xFF for i in range(size * count))
    machine.memory.write(source, data)
    code = Code(MODES[mode]).mov("esi", source).mov("ecx", count).mov("dx", PORT_LOG + 8)
    code.raw("fc f3")  # cld; rep
    code.raw({1: "6e", 2: "6f" if mode == "real" else "", 4: "6f" if mode != "real" else ""}[size])
    if (size == 2 and mode != "real") or (size == 4 and mode == "real"):
        code.data[-1:] = b"\x66\xf3\x6f"  # the operand-size prefix goes before rep's opcode
    code.stop()
    machine.finish(load(machine, mode, code))
    assert [entry[:2] for entry in machine.log.writes] == [(8, size)] * count
    assert b"".join(value.to_bytes(size, "little") for value in machine.log.values) == data
    registers = machine.vcpu.get_registers()
    assert registers.rcx & 0xFFFF_FFFF == 0
    assert registers.rsi & 0xFFFF_FFFF == source + size * count


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 7, 600])
def test_rep_ins_fills_memory_in_order(machine: Machine, mode: str, size: int, count: int) -> None:
    target = 0x4000 if mode == "real" else DATA + 3
    data = bytes(i * 5 + (i >> 8) & 0xFF for i in range(size * count))
    position = iter(range(0, len(data), size))

    def answer(offset: int, width: int) -> int:
        at = next(position)
        return int.from_bytes(data[at : at + width], "little")

    machine.log.answer = answer
    code = Code(MODES[mode]).mov("edi", target).mov("ecx", count).mov("dx", PORT_LOG + 8).raw("fc")
    if (size == 2 and mode != "real") or (size == 4 and mode == "real"):
        code.raw("66")
    code.raw("f3", "6c" if size == 1 else "6d")
    code.stop()
    machine.finish(load(machine, mode, code))
    assert machine.memory.read(target - 1, 1) == b"\0"
    assert machine.memory.read(target, len(data)) == data
    assert machine.memory.read(target + len(data), 1) == b"\0"
    assert machine.vcpu.get_registers().rdi & 0xFFFF_FFFF == target + len(data)


def test_rep_outs_runs_downwards_with_the_direction_flag(machine: Machine) -> None:
    machine.memory.write(DATA, b"abcd")
    code = Code().mov("rsi", DATA + 3).mov("ecx", 4).mov("dx", PORT_LOG)
    code.raw("fd", "f3 6e", "fc")  # std; rep outsb; cld
    machine.finish(machine.long(code.stop()))
    assert bytes(machine.log.values) == b"dcba"


def test_rep_outs_of_nothing_touches_no_port(machine: Machine) -> None:
    code = Code().mov("rsi", DATA).mov("ecx", 0).mov("dx", PORT_LOG).raw("f3 6e")
    machine.finish(machine.long(code.stop()))
    assert machine.log.writes == []


def test_a_port_nobody_has_reads_all_ones(machine: Machine) -> None:
    machine.finish(machine.long(Code().in_(0x555, 4).stop(4)))
    assert machine.stops == [0xFFFF_FFFF]
    assert machine.bus.unclaimed == 1


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["protected", "long"])
def test_mmio_write_arrives_whole(machine: Machine, mode: str, size: int) -> None:
    if size == 8 and mode != "long":
        pytest.skip("no 8-byte register in this mode")
    base = "rbx" if mode == "long" else "ebx"
    register = {1: "cl", 2: "cx", 4: "ecx", 8: "rcx"}[size]
    code = Code(MODES[mode]).mov(base, MMIO + 0x18).mov(register, PATTERN).store(base, register).stop()
    machine.finish(load(machine, mode, code))
    whole = [(0x18, size, PATTERN & (1 << 8 * size) - 1)]
    halves = [(0x18, 4, PATTERN & 0xFFFF_FFFF), (0x1C, 4, PATTERN >> 32)]  # how a 32-bit bus sees 8 bytes
    assert machine.window.writes == whole or (size == 8 and machine.window.writes == halves)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_mmio_read_changes_only_what_it_should(machine: Machine, size: int) -> None:
    machine.window.answer = lambda offset, width: PATTERN >> 8 * (offset - 0x20) & (1 << 8 * width) - 1
    register = {1: "cl", 2: "cx", 4: "ecx", 8: "rcx"}[size]
    code = Code().mov("rbx", MMIO + 0x20).mov("rcx", 0x1111_1111_1111_1111).load(register, "rbx").stop()
    machine.finish(machine.long(code))
    mask = (1 << 8 * size) - 1
    kept = 0 if size == 4 else 0x1111_1111_1111_1111 & ~mask
    assert machine.vcpu.get_registers().rcx == kept | PATTERN & mask
    assert machine.window.reads == [(0x20, size)] or (size == 8 and machine.window.reads == [(0x20, 4), (0x24, 4)])


def test_mmio_read_modify_write_does_both(machine: Machine) -> None:
    machine.window.answer = lambda offset, size: 40
    code = Code().mov("rbx", MMIO).mov("ecx", 2).add_memory("rbx", "ecx").stop()
    machine.finish(machine.long(code))
    assert machine.window.reads == [(0, 4)]
    assert machine.window.writes == [(0, 4, 42)]


def test_mmio_sign_and_zero_extension(machine: Machine) -> None:
    machine.window.answer = lambda offset, size: 0xFF & (1 << 8 * size) - 1
    code = Code().mov("rbx", MMIO).mov("rcx", -1).mov("rsi", 0)
    code.raw("0f b6 0b")  # movzx ecx, byte [rbx]
    code.raw("48 0f be 33")  # movsx rsi, byte [rbx]
    machine.finish(machine.long(code.stop()))
    registers = machine.vcpu.get_registers()
    assert (registers.rcx, registers.rsi) == (0xFF, 0xFFFF_FFFF_FFFF_FFFF)


def test_mmio_compare_sets_flags_from_the_device(machine: Machine) -> None:
    machine.window.answer = lambda offset, size: 0x76726976
    code = Code().mov("rbx", MMIO).raw("81 3b 76 69 72 74")  # cmp dword [rbx], "virt" reversed below
    code.data[-4:] = (0x76726976).to_bytes(4, "little")
    code.mov("al", 1).j("e", "same").mov("al", 0).label("same").stop()
    assert machine.finish(machine.long(code)) == 1


def test_mmio_access_across_a_page_boundary_loses_no_byte(machine: Machine) -> None:
    """Between two pages of one device, at an odd offset: the backend may split it as it likes."""
    code = Code().mov("rbx", MMIO + 0xFFD).mov("rcx", PATTERN).store("rbx", "rcx").stop()
    machine.finish(machine.long(code))
    expected = {0xFFD + i: byte for i, byte in enumerate(PATTERN.to_bytes(8, "little"))}
    assert machine.window.written_bytes() == expected


def test_mmio_read_across_a_page_boundary_assembles_every_byte(machine: Machine) -> None:
    machine.window.answer = lambda offset, size: int.from_bytes(
        bytes((offset + i) & 0xFF for i in range(size)), "little"
    )
    code = Code().mov("rbx", MMIO + 0xFFB).load("rcx", "rbx").stop()
    machine.finish(machine.long(code))
    assert machine.vcpu.get_registers().rcx.to_bytes(8, "little") == bytes((0xFFB + i) & 0xFF for i in range(8))


def test_rep_movs_copies_memory_to_a_device(machine: Machine) -> None:
    machine.memory.write(DATA, b"0123456789abcdef")
    code = Code().mov("rsi", DATA).mov("rdi", MMIO + 0x100).mov("ecx", 4).raw("f3 a5")  # rep movsd
    machine.finish(machine.long(code.stop()))
    data = machine.window.written_bytes()
    assert bytes(data[0x100 + i] for i in range(16)) == b"0123456789abcdef"


def test_rep_movs_copies_a_device_to_memory(machine: Machine) -> None:
    machine.window.answer = lambda offset, size: int.from_bytes(bytes(offset + i for i in range(size)), "little")
    code = Code().mov("rsi", MMIO + 0x40).mov("rdi", DATA).mov("ecx", 16).raw("f3 a4")  # rep movsb
    machine.finish(machine.long(code.stop()))
    assert machine.memory.read(DATA, 16) == bytes(range(0x40, 0x50))


def test_mmio_nobody_has_reads_all_ones_and_swallows_writes(machine: Machine) -> None:
    code = Code().mov("rbx", MMIO + 0x10_0000).store("rbx", "ebx").load("eax", "rbx").stop(4)
    assert machine.finish(machine.long(code)) == 0xFFFF_FFFF
    assert machine.bus.unclaimed == 2


def test_an_exception_in_a_device_comes_out_of_run_before_the_guest_does_anything_else(machine: Machine) -> None:
    def fail(offset: int, size: int, value: int) -> None:
        raise ZeroDivisionError

    machine.log.on_write = fail
    code = Code().mov("al", 1).out(PORT_LOG).mov("al", 2).out(PORT_LOG + 1).mov("al", 9).stop()
    with pytest.raises(ZeroDivisionError):
        machine.go(machine.long(code))
    assert machine.log.values == [1]
    machine.log.on_write = None
    assert machine.finish() == 9
    assert machine.log.values == [1, 2]


def test_state_can_be_read_after_an_exception_in_a_device(machine: Machine) -> None:
    def fail(offset: int, size: int) -> int:
        raise ZeroDivisionError

    machine.log.answer = fail
    with pytest.raises(ZeroDivisionError):
        machine.go(machine.long(Code().mov("ecx", 7).in_(PORT_LOG).stop()))
    registers = machine.vcpu.get_registers()
    assert registers.rcx == 7
    machine.memory.write(CODE, Code().mov("al", 3).stop().build())
    registers.rip = CODE
    assert machine.finish(registers) == 3


def test_a_thousand_exits_leave_no_object_behind(machine: Machine) -> None:
    class Silent:
        def pio_read(self, offset: int, size: int) -> int:
            return 0x1234

        def pio_write(self, offset: int, size: int, value: int) -> None:
            if value == 1 and offset:
                counts.append(sys.getallocatedblocks())

    counts: list[int] = []
    machine.bus.map_pio(0x400, 4, Silent())
    code = Code().mov("ecx", 1000).mov("al", 1).out(0x402)
    code.label("next").in_(0x400, 2).out(0x400, 4).dec("ecx").j("nz", "next")
    machine.finish(machine.long(code.mov("al", 1).out(0x402).mov("al", 0).stop()))
    assert counts[1] - counts[0] < 50

"""Exceptions through the IDT, the interrupt stack table, privilege changes, and what ends in a triple fault."""

from __future__ import annotations

import struct

import pytest

from microvm.hypervisor.base import TRIPLE_FAULT, StopReason, Table

from .asm import Code
from .conftest import gap
from .machine import (
    CODE,
    CODE0,
    DATA,
    IST_STACK,
    PD,
    PORT_LOG,
    PORT_STOP,
    STACK,
    Machine,
    skip_if_not_emulated,
)  # fmt: skip

HANDLER = 0x9000
USER_STACK = 0x30_0000


def frame_handler(has_error_code: bool) -> Code:
    """Log the error code (if any), RIP, CS, RFLAGS, RSP and SS the processor pushed, then RSP itself; stop."""
    code = Code(origin=HANDLER).raw("48 89 e6")  # mov rsi, rsp
    for _ in range(6 if has_error_code else 5):
        code.raw("48 ad").out(PORT_LOG, 4)  # lodsq
    code.raw("48 89 e0").out(PORT_LOG, 4)  # mov rax, rsp
    return code.mov("al", 0).stop()


@pytest.mark.parametrize(
    ("vector", "instruction", "error_code"),
    [
        (0, "31 c9 f7 f1", None),  # xor ecx, ecx; div ecx
        (6, "0f 0b", None),  # ud2
        (13, "66 b8 f0 00 8e d8", 0xF0),  # mov ax, 0xf0; mov ds, ax: beyond the GDT
        (13, "48 b8 00 00 00 00 00 00 00 80 8b 00", 0),  # mov rax, 1 << 63; mov eax, [rax]: not canonical
        (14, "b8 00 00 00 40 8b 00", 0),  # mov eax, 1 << 30; mov eax, [rax]: not mapped
        (14, "b8 00 00 00 40 89 00", 2),  # ... a write
    ],
)
def test_fault_pushes_its_frame_and_points_at_the_instruction(
    machine: Machine, vector: int, instruction: str, error_code: int | None
) -> None:
    raw = bytes.fromhex(instruction)
    code = Code().raw(raw)
    registers = machine.long(code)
    machine.handler(vector, frame_handler(error_code is not None))
    machine.finish(registers)
    values = machine.log.values
    if error_code is not None:
        assert values.pop(0) == error_code
    # Every one of these ends in the instruction that faults.
    faulting = {0: 2, 6: 2, 13: 2, 14: 2}[vector]
    assert values[0] == CODE + len(raw) - faulting
    assert values[1] == CODE0
    assert values[2] & 0x0003_0002 & ~0x1_0000 == 2
    assert values[3] == STACK
    assert values[5] == STACK - 40 - (8 if error_code is not None else 0)
    if vector == 14:
        assert machine.vcpu.get_registers().cr2 == 1 << 30


def test_breakpoint_traps_behind_the_instruction(machine: Machine) -> None:
    registers = machine.long(Code().raw("cc"))  # int3
    machine.handler(3, frame_handler(False), dpl=3)
    machine.finish(registers)
    assert machine.log.values[0] == CODE + 1


def test_software_interrupt_reaches_its_gate(machine: Machine) -> None:
    registers = machine.long(Code().raw("cd 80"))  # int 0x80
    machine.handler(0x80, frame_handler(False), dpl=3)
    machine.finish(registers)
    assert machine.log.values[0] == CODE + 2


def test_handler_returns_with_iretq(machine: Machine) -> None:
    registers = machine.long(Code().mov("ecx", 5).raw("0f 0b").mov("al", 7).stop())  # ud2
    # add qword [rsp], 2; inc ecx; iretq
    machine.handler(6, Code(origin=HANDLER).raw("48 83 04 24 02").inc("ecx").iretq())
    assert machine.finish(registers) == 7
    assert machine.vcpu.get_registers().rcx == 6
    assert machine.vcpu.get_registers().rsp == STACK


def test_interrupt_stack_table_switches_stacks(machine: Machine) -> None:
    registers = machine.long(Code().raw("0f 0b"))
    machine.handler(6, frame_handler(False), ist=1)
    machine.finish(registers)
    assert machine.log.values[3] == STACK
    assert machine.log.values[5] == IST_STACK - 40


def test_fault_in_ring_3_switches_to_the_kernel_stack(machine: Machine) -> None:
    registers = machine.long(Code().raw("0f 0b"), ring=3)
    registers.rsp = USER_STACK
    machine.handler(6, frame_handler(False))
    machine.finish(registers)
    rip, cs, _, rsp, ss, handler_rsp = machine.log.values
    assert (rip, cs, rsp, ss) == (CODE, 0x23, USER_STACK, 0x1B)
    assert handler_rsp == STACK - 40


def test_ring_3_may_not_touch_ports(machine: Machine) -> None:
    registers = machine.long(Code().out(PORT_LOG), ring=3)
    machine.handler(13, Code(origin=HANDLER).mov("al", 13).stop())
    assert machine.finish(registers) == 13
    assert machine.log.writes == []


def test_ring_3_may_not_execute_privileged_instructions(machine: Machine) -> None:
    registers = machine.long(Code().hlt(), ring=3)
    machine.handler(13, Code(origin=HANDLER).mov("al", 13).stop())
    assert machine.finish(registers) == 13


def test_ring_3_may_not_read_a_supervisor_page(machine: Machine) -> None:
    registers = machine.long(Code().mov("rbx", DATA).load("eax", "rbx"), ring=3)
    machine.memory.write(PD + 8, struct.pack("<Q", DATA | 0x83))  # the second 2 MiB without the user bit
    machine.handler(14, Code(origin=HANDLER).raw("58").stop())  # pop rax: the error code
    assert machine.finish(registers) == 5  # present, read, user
    assert machine.vcpu.get_registers().cr2 == DATA


def test_write_to_a_read_only_page_faults(machine: Machine) -> None:
    registers = machine.long(Code().mov("rbx", DATA).load("eax", "rbx").store("rbx", "eax"))
    machine.memory.write(PD + 8, struct.pack("<Q", DATA | 0x81))
    machine.handler(14, Code(origin=HANDLER).raw("58").stop())
    assert machine.finish(registers) == 3  # present, write


def test_no_execute_page_faults_on_fetch(machine: Machine) -> None:
    registers = machine.long(Code().mov("rax", DATA).raw("ff e0"))  # jmp rax
    registers.efer |= 1 << 11
    machine.memory.write(PD + 8, struct.pack("<Q", 1 << 63 | DATA | 0x87))
    machine.handler(14, Code(origin=HANDLER).raw("58").stop())
    assert machine.finish(registers) == 0x11  # present, fetch
    assert machine.vcpu.get_registers().cr2 == DATA


def test_syscall_and_sysret_change_rings(machine: Machine) -> None:
    user = Code().raw("0f 05").mov("r8d", 3).raw("0f 05")  # syscall; ...; syscall
    registers = machine.long(user, ring=3)
    registers.rsp = USER_STACK
    registers.rflags = 0x202
    # cmp r8d, 3; je done; mov eax, r11d; out; sysretq; done: stop with al = cs
    kernel = Code(origin=HANDLER).raw("41 83 f8 03").j("e", "done")
    kernel.raw("44 89 d8").out(PORT_LOG, 4).raw("89 c8").out(PORT_LOG, 4).raw("48 0f 07")
    kernel.label("done").raw("8c c8").stop()  # mov eax, cs
    machine.memory.write(HANDLER, kernel.build())
    vcpu = machine.vcpu
    vcpu.set_registers(registers)
    vcpu.set_msr(0xC000_0081, 0x10 << 48 | CODE0 << 32)
    vcpu.set_msr(0xC000_0082, HANDLER)
    vcpu.set_msr(0xC000_0084, 0x200)
    machine.handler(13, Code(origin=HANDLER + 0x100).mov("al", 13).stop())
    result = machine.finish()
    if result == 13:
        gap(machine.backend, "SYSCALL from ring 3 raises #GP")
    assert result == CODE0
    assert machine.log.values == [0x202, CODE + 2]  # r11 = rflags, rcx = the address behind syscall
    assert not vcpu.get_registers().rflags & 0x200
    assert vcpu.get_registers().rsp == USER_STACK


def test_single_step_traps_after_one_instruction(machine: Machine) -> None:
    registers = machine.long(Code().nop().nop().nop())
    registers.rflags = 0x102  # TF
    machine.handler(1, frame_handler(False))
    machine.finish(registers)
    assert machine.log.values[0] == CODE + 1


def test_a_fault_without_an_idt_is_a_triple_fault(machine: Machine) -> None:
    registers = machine.long(Code().raw("0f 0b"))
    registers.idtr = Table(0, 0)
    stop = machine.go(registers)
    skip_if_not_emulated(machine.backend, stop)
    assert stop.reason == StopReason.CRASHED
    assert stop.detail == TRIPLE_FAULT
    assert stop.triple_fault


def test_a_fault_in_a_fault_is_a_double_fault(machine: Machine) -> None:
    """#PF whose own gate is not present: the second contributory exception. [SDM] 3A 6.15"""
    # Everything the delivery needs is touched first: a processor that is itself emulated (QEMU's nested SVM) forgets
    # the first exception when its host has to fetch a page in between.
    code = Code()
    for page in (0x5000, 0x6000, 0x7000, IST_STACK - 16, STACK - 16, HANDLER):
        code.mov("rbx", page).load("eax", "rbx").store("rbx", "eax")
    registers = machine.long(code.mov("rbx", 1 << 30).load("eax", "rbx"))
    machine.memory.write(0x6000 + 16 * 14, bytes(16))
    machine.handler(8, Code(origin=HANDLER).raw("58").mov("al", 8).stop(), ist=1)
    assert machine.finish(registers) == 8


def test_other_vcpus_and_partitions_do_not_notice_a_triple_fault(make_machine) -> None:  # type: ignore[no-untyped-def]
    first, second = make_machine(), make_machine()
    registers = first.long(Code().raw("0f 0b"))
    registers.idtr = Table(0, 0)
    stop = first.go(registers)
    skip_if_not_emulated(first.backend, stop)
    assert stop.triple_fault
    assert second.finish(second.long(Code().mov("al", 4).stop())) == 4


def test_an_undefined_opcode_is_an_exception_of_the_guest(machine: Machine) -> None:
    registers = machine.long(Code().raw("0f ff c0"))  # ud0
    machine.handler(6, Code(origin=HANDLER).mov("al", 6).stop())
    assert machine.finish(registers) == 6


def test_compare_exchange_of_16_bytes(machine: Machine) -> None:
    machine.memory.write(DATA, struct.pack("<QQ", 1, 2))
    code = Code().mov("rdi", DATA).mov("rax", 1).mov("rdx", 2).mov("rbx", 3).mov("rcx", 4)
    code.raw("f0 48 0f c7 0f")  # lock cmpxchg16b [rdi]
    code.raw("0f 94 c0")  # sete al
    assert machine.finish(machine.long(code.stop())) == 1
    assert struct.unpack("<QQ", machine.memory.read(DATA, 16)) == (3, 4)


def test_stop_port_is_the_assemblers() -> None:
    assert Code().stop().build()[: len(Code().out(PORT_STOP).build())] == Code().out(PORT_STOP).build()

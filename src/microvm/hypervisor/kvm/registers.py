"""Between the contract's registers and KVM's."""

from __future__ import annotations

from typing import Final

from ..base import Registers, Segment, Table
from . import abi

_GENERAL: Final = (
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp",
    "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
)  # fmt: skip
_SEGMENTS: Final = (("cs", "cs"), ("ds", "ds"), ("es", "es"), ("fs", "fs"), ("gs", "gs"), ("ss", "ss"))
_SYSTEM_SEGMENTS: Final = (("tr", "tr"), ("ldtr", "ldt"))
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")


def store_registers(registers: Registers, regs: abi.kvm_regs, sregs: abi.kvm_sregs) -> None:
    """Write the contract's registers into KVM's structures, leaving what the contract does not name."""
    for name in _GENERAL:
        setattr(regs, name, getattr(registers, name))
    for ours, theirs in (*_SEGMENTS, *_SYSTEM_SEGMENTS):
        _store_segment(getattr(registers, ours), getattr(sregs, theirs))
    for ours, theirs in (("gdtr", "gdt"), ("idtr", "idt")):
        table, target = getattr(registers, ours), getattr(sregs, theirs)
        target.base, target.limit = table.base, table.limit
    for name in _CONTROL:
        setattr(sregs, name, getattr(registers, name))


def load_registers(regs: abi.kvm_regs, sregs: abi.kvm_sregs) -> Registers:
    """The contract's registers from KVM's structures."""
    registers = Registers()
    for name in _GENERAL:
        setattr(registers, name, getattr(regs, name))
    for ours, theirs in (*_SEGMENTS, *_SYSTEM_SEGMENTS):
        setattr(registers, ours, _load_segment(getattr(sregs, theirs)))
    registers.gdtr = Table(sregs.gdt.base, sregs.gdt.limit)
    registers.idtr = Table(sregs.idt.base, sregs.idt.limit)
    for name in _CONTROL:
        setattr(registers, name, getattr(sregs, name))
    return registers


def _store_segment(segment: Segment, target: abi.kvm_segment) -> None:
    attributes = segment.attributes
    target.base = segment.base
    target.limit = segment.limit
    target.selector = segment.selector
    target.type = attributes & 0xF
    target.s = attributes >> 4 & 1
    target.dpl = attributes >> 5 & 3
    target.present = attributes >> 7 & 1
    target.avl = attributes >> 12 & 1
    target.l = attributes >> 13 & 1
    target.db = attributes >> 14 & 1
    target.g = attributes >> 15 & 1
    # What is not present cannot be used; Intel's entry checks want to hear it. [SDM] 3C 24.4.1
    target.unusable = not attributes & 0x80


def _load_segment(source: abi.kvm_segment) -> Segment:
    attributes = (
        source.type
        | source.s << 4
        | source.dpl << 5
        | source.present << 7
        | source.avl << 12
        | source.l << 13
        | source.db << 14
        | source.g << 15
    )
    return Segment(source.selector, source.base, source.limit, attributes)

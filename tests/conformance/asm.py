"""Just enough of an x86 assembler to keep the tiny guests readable.

`Code` emits for 16, 32 or 64 bits. Methods cover what most guests need; anything else is `raw` bytes with the
instruction in a comment. Jumps are short and take label names; `here` gives an address.
"""

from __future__ import annotations

import struct

_LOW8 = ("al", "cl", "dl", "bl")
_NAMES = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")
REGISTERS: dict[str, tuple[int, int]] = {
    **{name: (i, 1) for i, name in enumerate(_LOW8)},
    **{name: (i, 2) for i, name in enumerate(_NAMES)},
    **{"e" + name: (i, 4) for i, name in enumerate(_NAMES)},
    **{"r" + name: (i, 8) for i, name in enumerate(_NAMES)},
    **{f"r{i}": (i, 8) for i in range(8, 16)},
    **{f"r{i}d": (i, 4) for i in range(8, 16)},
}
LAPIC = 0xFEE0_0000
PORT_STOP = 0x320  # where `Code.stop` writes
CONDITIONS = {"o": 0, "b": 2, "ae": 3, "e": 4, "z": 4, "ne": 5, "nz": 5, "be": 6, "a": 7, "s": 8}


class Code:
    """Machine code being written at ``origin``."""

    def __init__(self, bits: int = 64, origin: int = 0x8000) -> None:
        self.bits = bits
        self.origin = origin
        self.data = bytearray()
        self._labels: dict[str, int] = {}
        self._short: list[tuple[int, str]] = []

    @property
    def here(self) -> int:
        """The address of the next instruction."""
        return self.origin + len(self.data)

    def label(self, name: str) -> Code:
        self._labels[name] = len(self.data)
        return self

    def raw(self, *parts: str | bytes) -> Code:
        """Bytes, or hex digits."""
        for part in parts:
            self.data += bytes.fromhex(part) if isinstance(part, str) else part
        return self

    def build(self) -> bytes:
        for at, name in self._short:
            distance = self._labels[name] - (at + 1)
            self.data[at] = struct.pack("<b", distance)[0]
        return bytes(self.data)

    def _prefix(self, size: int, *registers: int) -> None:
        """Operand size and REX for an instruction whose ModRM (reg, rm) or opcode register are given."""
        if (size == 2 and self.bits != 16) or (size == 4 and self.bits == 16):
            self.data.append(0x66)
        rex = 0x48 if size == 8 else 0x40
        extension = (4, 1) if len(registers) == 2 else (1,)
        for number, bit in zip(registers, extension, strict=True):
            rex |= bit if number >= 8 else 0
        if rex != 0x40:
            self.data.append(rex)

    def mov(self, register: str, value: int) -> Code:
        """mov register, immediate"""
        number, size = REGISTERS[register]
        self._prefix(size, number)
        self.data.append((0xB0 if size == 1 else 0xB8) + (number & 7))
        self.data += (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return self

    def _memory(self, opcode: str, register: str, base: str) -> Code:
        number, size = REGISTERS[register]
        base_number, base_size = REGISTERS[base]
        assert base_number & 7 not in (4, 5), "no encoding for this base here"
        assert base_size * 8 == self.bits or self.bits == 16, "addresses have the mode's size"
        if self.bits == 16:
            self.data.append(0x67)
        self._prefix(size, number, base_number)
        self.raw(opcode)
        self.data.append((number & 7) << 3 | base_number & 7)
        return self

    def load(self, register: str, base: str) -> Code:
        """mov register, [base]"""
        return self._memory("8a" if REGISTERS[register][1] == 1 else "8b", register, base)

    def store(self, base: str, register: str) -> Code:
        """mov [base], register"""
        return self._memory("88" if REGISTERS[register][1] == 1 else "89", register, base)

    def add_memory(self, base: str, register: str) -> Code:
        """add [base], register"""
        return self._memory("00" if REGISTERS[register][1] == 1 else "01", register, base)

    def _group(self, opcode: int, extension: int, register: str) -> None:
        number, size = REGISTERS[register]
        self._prefix(size, number)
        self.data += bytes((opcode if size > 1 else opcode - 1, 0xC0 | extension << 3 | number & 7))

    def dec(self, register: str) -> Code:
        self._group(0xFF, 1, register)
        return self

    def inc(self, register: str) -> Code:
        self._group(0xFF, 0, register)
        return self

    def add(self, register: str, value: int) -> Code:
        """add register, immediate (32 bits at most, sign-extended)"""
        return self._immediate(0, register, value)

    def cmp(self, register: str, value: int) -> Code:
        return self._immediate(7, register, value)

    def _immediate(self, extension: int, register: str, value: int) -> Code:
        size = REGISTERS[register][1]
        self._group(0x81, extension, register)
        self.data += (value & (1 << 8 * min(size, 4)) - 1).to_bytes(min(size, 4), "little")
        return self

    def move(self, target: str, source: str) -> Code:
        """mov target, source (registers of one size)"""
        number, size = REGISTERS[target]
        other, _ = REGISTERS[source]
        self._prefix(size, other, number)
        self.data += bytes((0x89 if size > 1 else 0x88, 0xC0 | (other & 7) << 3 | number & 7))
        return self

    def jmp(self, name: str) -> Code:
        self.data += b"\xeb\0"
        self._short.append((len(self.data) - 1, name))
        return self

    def j(self, condition: str, name: str) -> Code:
        self.data += bytes((0x70 + CONDITIONS[condition], 0))
        self._short.append((len(self.data) - 1, name))
        return self

    def out(self, port: int, size: int = 1) -> Code:
        """out port, al/ax/eax by way of dx"""
        self.mov("dx", port)
        self._prefix(size if size > 1 else 1, 0)
        self.data.append(0xEE if size == 1 else 0xEF)
        return self

    def stop(self, size: int = 1) -> Code:
        """Report al/ax/eax to the host, which kicks vCPU 0; then spin, because a kick takes effect when it does."""
        return self.out(PORT_STOP, size).raw("eb fe")  # jmp $

    def in_(self, port: int, size: int = 1) -> Code:
        """in al/ax/eax, port by way of dx"""
        self.mov("dx", port)
        self._prefix(size if size > 1 else 1, 0)
        self.data.append(0xEC if size == 1 else 0xED)
        return self

    def hlt(self) -> Code:
        return self.raw("f4")

    def cli(self) -> Code:
        return self.raw("fa")

    def sti(self) -> Code:
        return self.raw("fb")

    def nop(self) -> Code:
        return self.raw("90")

    def iretq(self) -> Code:
        return self.raw("48 cf")

    def wrmsr(self, index: int, value: int) -> Code:
        return self.mov("ecx", index).mov("eax", value & 0xFFFF_FFFF).mov("edx", value >> 32).raw("0f 30")

    def rdmsr(self, index: int) -> Code:
        return self.mov("ecx", index).raw("0f 32")

    def apic(self, register: int, value: int) -> Code:
        """Write a local APIC register; clobbers rax and rbx. Long mode."""
        return self.mov("rbx", LAPIC + register).mov("eax", value).store("rbx", "eax")

    def eoi(self) -> Code:
        """End of interrupt, keeping all registers."""
        return self.raw("50 53").apic(0xB0, 0).raw("5b 58")  # push rax; push rbx; ...; pop rbx; pop rax

    def cpuid(self, leaf: int, subleaf: int = 0) -> Code:
        return self.mov("eax", leaf).mov("ecx", subleaf).raw("0f a2")

"""Carrying out one instruction that touched a device, for hypervisors that only say which address it was.

WHP and Hypervisor.framework stop a virtual processor before an access to memory that is not there and hand over the
instruction's bytes at most. `decode` makes an instruction of them (iced-x86, an optional dependency), `execute` does
what the processor would have done: operands, flags, string registers, and RIP behind it. [SDM] 2.

Order inside one instruction. First every address is translated, so that a page fault on any operand leaves nothing
half done; then memory and devices are read, the result is computed, and registers or memory are written. A device is
read once and written once. With REP each turn is complete in itself, registers included, and after MAX_TURNS turns
`execute` returns with RIP still on the instruction, so that interrupts and kicks get their turn.

The forms are those that drivers use (MOV in all its shapes, string instructions) and the arithmetic that compilers
fold into memory operands. Anything else is `Unsupported`, with the bytes in the message: a guest that maps a device as
ordinary memory gets a clear stop, not a wrong result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

from iced_x86 import Decoder, DecoderError, Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from . import x86_alu as alu

MAX_TURNS: Final = 1024
MAX_LENGTH: Final = 15
_CACHED: Final = 512  # decoded instructions kept; a guest's drivers have a few dozen
_MASKS: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
_MASK64: Final = 0xFFFF_FFFF_FFFF_FFFF
_PAGE: Final = 4096
RAX, RCX, RDX, RSI, RDI = 0, 1, 2, 6, 7
GENERAL_PROTECTION: Final = 13
PAGE_FAULT: Final = 14


class Fault(Exception):
    """The instruction raises an exception in the guest. ``address`` is CR2 of a page fault."""

    def __init__(self, vector: int, code: int = 0, address: int = 0) -> None:
        self.vector = vector
        self.code = code
        self.address = address


class TooShort(Exception):
    """The bytes end before the instruction does."""


class Unsupported(Exception):
    """Not an instruction this module carries out; ``str()`` is a clause for a report."""


class Cpu(Protocol):
    """The virtual processor as the instruction sees it. ``gpr`` is RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8-R15.

    ``bits`` is 16, 32 or 64: the mode of the code segment.
    """

    gpr: list[int]
    rip: int
    rflags: int
    bits: int

    def segment_base(self, index: int) -> int:
        """Base of ES, CS, SS, DS, FS, GS by number; in 64-bit mode only FS and GS are asked for."""

    def translate(self, gva: int, write: bool) -> int:
        """The guest-physical address. Raises Fault."""

    def read(self, gpa: int, size: int) -> int:
        """1, 2, 4 or 8 bytes of memory or of a device, inside one page."""

    def write(self, gpa: int, size: int, value: int) -> None:
        """1, 2, 4 or 8 bytes to memory or a device, inside one page."""

    def port_in(self, port: int, size: int) -> int: ...

    def port_out(self, port: int, size: int, value: int) -> None: ...

    def get_xmm(self, index: int) -> int: ...

    def set_xmm(self, index: int, value: int) -> None: ...


# register number: (index, shift, size in bytes)
_GPR: Final[dict[int, tuple[int, int, int]]] = {}
_XMM: Final[dict[int, int]] = {}
_registers: dict[str, Any] = {name: value for name, value in vars(Register).items() if isinstance(value, int)}
for _name, _register in _registers.items():
    if RegisterExt.is_gpr(_register):
        _high = _name in ("AH", "CH", "DH", "BH")
        _full = RegisterExt.full_register(_register)
        _GPR[_register] = (RegisterExt.number(_full), 8 if _high else 0, RegisterExt.size(_register))
    elif RegisterExt.is_xmm(_register):
        _XMM[_register] = RegisterExt.number(_register)
_SEGMENTS: Final[dict[int, int]] = {
    Register.ES: 0,
    Register.CS: 1,
    Register.SS: 2,
    Register.DS: 3,
    Register.FS: 4,
    Register.GS: 5,
}
_IP: Final = (Register.RIP, Register.EIP)

_decoded: dict[tuple[bytes, int], Instruction] = {}


def decode(code: bytes, bits: int) -> Instruction:
    """The instruction ``code`` begins with, relative to address 0. Raises TooShort, Unsupported."""
    key = (code, bits)
    instruction = _decoded.get(key)
    if instruction is not None:
        return instruction
    decoder = Decoder(bits, code[:MAX_LENGTH])
    instruction = decoder.decode()
    if instruction.is_invalid:
        if decoder.last_error == DecoderError.NO_MORE_BYTES and len(code) < MAX_LENGTH:
            raise TooShort
        raise Unsupported(f"bytes that are no instruction ({code[:MAX_LENGTH].hex(' ')})")
    if len(_decoded) >= _CACHED:
        _decoded.clear()
    _decoded[key] = instruction
    return instruction


class PlainMove(NamedTuple):
    """MOV between memory and a register, or of a constant to memory: nine of ten device accesses.

    ``register`` is the general register's index, None for a constant. The high byte registers are not plain.
    """

    is_write: bool
    size: int
    length: int
    register: int | None
    constant: int


_plain: dict[tuple[bytes, int], PlainMove | None] = {}


def plain_move(code: bytes, bits: int) -> PlainMove | None:
    """The instruction ``code`` begins with if it is a plain move, for callers that know its address already."""
    key = (code, bits)
    if key in _plain:
        return _plain[key]
    if len(_plain) >= _CACHED:
        _plain.clear()
    try:
        found = _as_plain_move(decode(code, bits))
    except (TooShort, Unsupported):
        found = None
    _plain[key] = found
    return found


def _as_plain_move(instruction: Instruction) -> PlainMove | None:
    kinds = (instruction.op_kind(0), instruction.op_kind(1))
    if instruction.mnemonic != Mnemonic.MOV or OpKind.MEMORY not in kinds:
        return None
    is_write = kinds[0] == OpKind.MEMORY
    size = MemorySizeExt.size(instruction.memory_size)
    other = 1 if is_write else 0
    if kinds[other] != OpKind.REGISTER:
        constant = int(instruction.immediate(other)) & _MASKS[size]
        return PlainMove(is_write, size, instruction.len, None, constant)
    register = _GPR.get(instruction.op_register(other))
    if register is None or register[1]:
        return None
    return PlainMove(is_write, size, instruction.len, register[0], 0)


def execute(instruction: Instruction, cpu: Cpu) -> None:
    """Do what the processor would, RIP included. Raises Fault before any effect, Unsupported."""
    string = _STRING.get(instruction.mnemonic)
    if string is not None and instruction.op_kind(0) != OpKind.MEMORY and _is_string(instruction):
        _string(instruction, cpu, *string)
        return
    handler = _HANDLERS.get(instruction.mnemonic)
    if handler is None or OpKind.MEMORY not in (instruction.op_kind(0), instruction.op_kind(1)):
        raise Unsupported(f"{instruction} on device memory")
    operation = _Operation(instruction, cpu)
    try:
        handler(operation)
    except (Fault, Unsupported):
        raise
    except BaseException:  # a device's handler raised: the access was made, so the instruction is over
        advance(instruction, cpu)
        raise
    advance(instruction, cpu)


def advance(instruction: Instruction, cpu: Cpu) -> None:
    """Put RIP behind the instruction."""
    cpu.rip = (cpu.rip + instruction.len) & (_MASK64 if cpu.bits == 64 else 0xFFFF_FFFF)


def read_register(cpu: Cpu, register: int) -> int:
    """A general register of any size, the high byte ones included."""
    index, shift, size = _GPR[register]
    return cpu.gpr[index] >> shift & _MASKS[size]


def write_register(cpu: Cpu, register: int, value: int) -> None:
    """4 bytes clear the upper half, 1 and 2 leave the rest. [SDM] 1 3.4.1.1"""
    index, shift, size = _GPR[register]
    if size >= 4:
        cpu.gpr[index] = value & _MASKS[size]
    else:
        mask = _MASKS[size] << shift
        cpu.gpr[index] = cpu.gpr[index] & ~mask | (value << shift) & mask


def _linear(cpu: Cpu, segment: int, offset: int) -> int:
    index = _SEGMENTS[segment]
    if cpu.bits == 64:
        return (cpu.segment_base(index) + offset) & _MASK64 if index >= 4 else offset
    return (cpu.segment_base(index) + offset) & 0xFFFF_FFFF


def _effective(instruction: Instruction, cpu: Cpu, extra: int = 0) -> int:
    """The linear address of the memory operand, ``extra`` bytes further on."""
    base, index = instruction.memory_base, instruction.memory_index
    displacement = instruction.memory_displacement
    size = instruction.memory_displ_size
    if base in _IP:
        size = 8 if base == Register.RIP else 4
        displacement += cpu.rip  # decoded relative to 0
    else:
        if base != Register.NONE:
            displacement += read_register(cpu, base)
            size = _GPR[base][2]
        if index != Register.NONE:
            displacement += read_register(cpu, index) * instruction.memory_index_scale
            size = _GPR[index][2]
    offset = (displacement + extra) & _MASKS.get(size, _MASK64)
    return _linear(cpu, instruction.memory_segment, offset)


Place = list[tuple[int, int]]  # pieces (gpa, size)


def _place(cpu: Cpu, gva: int, size: int, write: bool) -> Place:
    """Where the bytes are: one piece, or naturally aligned ones where a page ends in between."""
    room = _PAGE - (gva & (_PAGE - 1))
    gpa = cpu.translate(gva, write)
    if size <= room and size <= 8:
        return [(gpa, size)]
    limit = _MASK64 if cpu.bits == 64 else 0xFFFF_FFFF
    second = cpu.translate((gva + room) & limit, write) if size > room else 0
    pieces: Place = []
    done = 0
    while done < size:
        piece = 8
        while piece > size - done or (gva + done) & (piece - 1):
            piece >>= 1
        pieces.append((gpa + done if done < room else second + done - room, piece))
        done += piece
    return pieces


def _load(cpu: Cpu, place: Place) -> int:
    if len(place) == 1:
        return cpu.read(*place[0])
    value = shift = 0
    for gpa, size in place:
        value |= cpu.read(gpa, size) << shift
        shift += 8 * size
    return value


def _store(cpu: Cpu, place: Place, value: int) -> None:
    for gpa, size in place:
        cpu.write(gpa, size, value & _MASKS[size])
        value >>= 8 * size


class _Operation:
    """One instruction with its memory operand found. ``size`` is that of the memory operand in bytes."""

    __slots__ = ("_place", "cpu", "instruction", "size", "width")

    def __init__(self, instruction: Instruction, cpu: Cpu) -> None:
        self.instruction = instruction
        self.cpu = cpu
        self.size = MemorySizeExt.size(instruction.memory_size)
        self.width = 8 * self.size
        self._place: Place | None = None

    def locate(self, write: bool, extra: int = 0, align: int = 1) -> None:
        """Translate the memory operand. Raises Fault."""
        gva = _effective(self.instruction, self.cpu, extra)
        if gva & (align - 1):
            raise Fault(GENERAL_PROTECTION)
        self._place = _place(self.cpu, gva, self.size, write)

    def is_memory(self, operand: int) -> bool:
        return bool(self.instruction.op_kind(operand) == OpKind.MEMORY)

    def get(self, operand: int) -> int:
        """The operand's value; a sign-extended immediate is cut to the operation's width."""
        kind = self.instruction.op_kind(operand)
        if kind == OpKind.REGISTER:
            return read_register(self.cpu, self._general(operand))
        if kind == OpKind.MEMORY:
            assert self._place is not None
            return _load(self.cpu, self._place)
        return int(self.instruction.immediate(operand)) & _MASKS[self.size]

    def _general(self, operand: int) -> int:
        register = self.instruction.op_register(operand)
        if register not in _GPR:
            raise Unsupported(f"{self.instruction} on device memory")
        return int(register)

    def put(self, operand: int, value: int) -> None:
        if self.instruction.op_kind(operand) == OpKind.REGISTER:
            write_register(self.cpu, self._general(operand), value)
        else:
            assert self._place is not None
            _store(self.cpu, self._place, value)

    def set_flags(self, flags: int, mask: int = alu.STATUS) -> None:
        self.cpu.rflags = self.cpu.rflags & ~mask | flags & mask


def _mov(o: _Operation) -> None:
    o.locate(write=o.is_memory(0))
    o.put(0, o.get(1))


def _movsx(o: _Operation) -> None:
    o.locate(write=False)
    value = o.get(1)
    o.put(0, value - (1 << o.width) if value >> (o.width - 1) else value)


def _movbe(o: _Operation) -> None:
    o.locate(write=o.is_memory(0))
    o.put(0, int.from_bytes(o.get(1).to_bytes(o.size, "little"), "big"))


def _vector(aligned: bool) -> Callable[[_Operation], None]:
    def move(o: _Operation) -> None:
        o.locate(write=o.is_memory(0), align=16 if aligned else 1)
        assert o._place is not None
        register = o.instruction.op_register(1 if o.is_memory(0) else 0)
        if register not in _XMM:
            raise Unsupported(f"{o.instruction} on device memory")
        if o.is_memory(0):
            _store(o.cpu, o._place, o.cpu.get_xmm(_XMM[register]))
        else:
            o.cpu.set_xmm(_XMM[register], _load(o.cpu, o._place))

    return move


Arithmetic = Callable[[int, int, int, int], tuple[int, int]]


def _binary(compute: Arithmetic, store: bool = True) -> Callable[[_Operation], None]:
    def run(o: _Operation) -> None:
        o.locate(write=store and o.is_memory(0))
        result, flags = compute(o.get(0), o.get(1), o.cpu.rflags & alu.CF, o.width)
        if store:
            o.put(0, result)
        o.set_flags(flags)

    return run


def _unary(compute: Arithmetic, mask: int) -> Callable[[_Operation], None]:
    def run(o: _Operation) -> None:
        o.locate(write=True)
        result, flags = compute(o.get(0), 0, 0, o.width)
        o.put(0, result)
        o.set_flags(flags, mask)

    return run


def _xchg(o: _Operation) -> None:
    o.locate(write=True)
    first, second = o.get(0), o.get(1)
    memory = 0 if o.is_memory(0) else 1
    o.put(memory, second if memory == 0 else first)
    o.put(1 - memory, first if memory == 0 else second)


def _xadd(o: _Operation) -> None:
    o.locate(write=True)
    old = o.get(0)
    result, flags = alu.add(old, o.get(1), 0, o.width)
    o.put(0, result)
    o.put(1, old)
    o.set_flags(flags)


def _cmpxchg(o: _Operation) -> None:
    o.locate(write=True)
    accumulator = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}[o.size]
    found = o.get(0)
    _, flags = alu.subtract(read_register(o.cpu, accumulator), found, 0, o.width)
    # The processor writes either way: what it found, if they differ. [SDM] 2A CMPXCHG
    o.put(0, o.get(1) if flags & alu.ZF else found)
    if not flags & alu.ZF:
        write_register(o.cpu, accumulator, found)
    o.set_flags(flags)


def _bit(compute: Callable[[int, int], int] | None) -> Callable[[_Operation], None]:
    def run(o: _Operation) -> None:
        bit = o.get(1)
        extra = 0
        if o.instruction.op_kind(1) == OpKind.REGISTER:  # the offset is signed and may lead far away. [SDM] 2A BT
            signed = bit - (1 << o.width) if bit >> (o.width - 1) else bit
            extra = (signed >> (o.width.bit_length() - 1)) * o.size
        o.locate(write=compute is not None, extra=extra)
        mask = 1 << (bit & (o.width - 1))
        value = o.get(0)
        if compute is not None:
            o.put(0, compute(value, mask))
        o.set_flags(alu.CF if value & mask else 0, alu.CF)

    return run


def _sub(a: int, b: int, carry: int, width: int) -> tuple[int, int]:
    return alu.subtract(a, b, 0, width)


_and = _binary(lambda a, b, carry, width: alu.logic(a & b, width))
_NO_CARRY: Final = alu.STATUS & ~alu.CF

_HANDLERS: Final[dict[int, Callable[[_Operation], None]]] = {
    Mnemonic.MOV: _mov,
    Mnemonic.MOVNTI: _mov,
    Mnemonic.MOVZX: _mov,
    Mnemonic.MOVSX: _movsx,
    Mnemonic.MOVSXD: _movsx,
    Mnemonic.MOVBE: _movbe,
    Mnemonic.MOVDQU: _vector(aligned=False),
    Mnemonic.MOVUPS: _vector(aligned=False),
    Mnemonic.MOVUPD: _vector(aligned=False),
    Mnemonic.MOVDQA: _vector(aligned=True),
    Mnemonic.MOVAPS: _vector(aligned=True),
    Mnemonic.MOVAPD: _vector(aligned=True),
    Mnemonic.MOVNTDQ: _vector(aligned=True),
    Mnemonic.MOVNTPS: _vector(aligned=True),
    Mnemonic.AND: _and,
    Mnemonic.OR: _binary(lambda a, b, carry, width: alu.logic(a | b, width)),
    Mnemonic.XOR: _binary(lambda a, b, carry, width: alu.logic(a ^ b, width)),
    Mnemonic.TEST: _binary(lambda a, b, carry, width: alu.logic(a & b, width), store=False),
    Mnemonic.ADD: _binary(lambda a, b, carry, width: alu.add(a, b, 0, width)),
    Mnemonic.ADC: _binary(alu.add),
    Mnemonic.SUB: _binary(_sub),
    Mnemonic.SBB: _binary(alu.subtract),
    Mnemonic.CMP: _binary(_sub, store=False),
    Mnemonic.INC: _unary(lambda a, b, carry, width: alu.add(a, 1, 0, width), _NO_CARRY),
    Mnemonic.DEC: _unary(lambda a, b, carry, width: alu.subtract(a, 1, 0, width), _NO_CARRY),
    Mnemonic.NEG: _unary(lambda a, b, carry, width: alu.subtract(0, a, 0, width), alu.STATUS),
    Mnemonic.NOT: _unary(lambda a, b, carry, width: (~a & ((1 << width) - 1), 0), 0),
    Mnemonic.XCHG: _xchg,
    Mnemonic.XADD: _xadd,
    Mnemonic.CMPXCHG: _cmpxchg,
    Mnemonic.BT: _bit(None),
    Mnemonic.BTS: _bit(lambda value, mask: value | mask),
    Mnemonic.BTR: _bit(lambda value, mask: value & ~mask),
    Mnemonic.BTC: _bit(lambda value, mask: value ^ mask),
}

# mnemonic: (element size, what is read, what is written)
_MEMORY, _REGISTER, _PORT = "memory", "register", "port"
_STRING: Final[dict[int, tuple[int, str, str]]] = {
    getattr(Mnemonic, name + letter): (size, source, target)
    for name, source, target, letters in (
        ("MOVS", _MEMORY, _MEMORY, "BWDQ"),
        ("STOS", _REGISTER, _MEMORY, "BWDQ"),
        ("LODS", _MEMORY, _REGISTER, "BWDQ"),
        ("INS", _PORT, _MEMORY, "BWD"),
        ("OUTS", _MEMORY, _PORT, "BWD"),
    )
    for letter, size in zip(letters, (1, 2, 4, 8), strict=False)
}
_SOURCES: Final = {OpKind.MEMORY_SEG_SI: 2, OpKind.MEMORY_SEG_ESI: 4, OpKind.MEMORY_SEG_RSI: 8}
_TARGETS: Final = {OpKind.MEMORY_ESDI: 2, OpKind.MEMORY_ESEDI: 4, OpKind.MEMORY_ESRDI: 8}


def _is_string(instruction: Instruction) -> bool:
    """MOVSD is also the name of an SSE instruction."""
    kinds = (instruction.op_kind(0), instruction.op_kind(1))
    return any(kind in _SOURCES or kind in _TARGETS for kind in kinds)


def _string(instruction: Instruction, cpu: Cpu, size: int, source: str, target: str) -> None:
    kinds: Any = (instruction.op_kind(0), instruction.op_kind(1))
    address_size = next(_SOURCES.get(kind) or _TARGETS[kind] for kind in kinds if kind in _SOURCES or kind in _TARGETS)
    mask = _MASKS[address_size]
    repeat = instruction.has_rep_prefix or instruction.has_repne_prefix
    step = -size if cpu.rflags & alu.DF else size
    accumulator = {1: Register.AL, 2: Register.AX, 4: Register.EAX, 8: Register.RAX}[size]
    gpr = cpu.gpr

    def change(index: int, by: int) -> None:
        value = (gpr[index] + by) & mask
        gpr[index] = value if address_size >= 4 else gpr[index] & ~mask | value

    for _ in range(MAX_TURNS):
        if repeat and not gpr[RCX] & mask:
            break
        read_at = write_at = None
        if source == _MEMORY:
            read_at = _place(cpu, _linear(cpu, instruction.memory_segment, gpr[RSI] & mask), size, False)
        if target == _MEMORY:
            write_at = _place(cpu, _linear(cpu, Register.ES, gpr[RDI] & mask), size, True)
        try:
            if read_at is not None:
                value = _load(cpu, read_at)
            elif source == _PORT:
                value = cpu.port_in(gpr[RDX] & 0xFFFF, size)
            else:
                value = read_register(cpu, accumulator)
            if write_at is not None:
                _store(cpu, write_at, value)
            elif target == _PORT:
                cpu.port_out(gpr[RDX] & 0xFFFF, size, value)
            else:
                write_register(cpu, accumulator, value)
        finally:  # also when a device's handler raised: its access was made
            if read_at is not None:
                change(RSI, step)
            if write_at is not None:
                change(RDI, step)
            if repeat:
                change(RCX, -1)
            if not repeat:
                advance(instruction, cpu)
        if not repeat:
            return
    if not gpr[RCX] & mask:
        advance(instruction, cpu)

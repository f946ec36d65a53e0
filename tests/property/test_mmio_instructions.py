"""`hypervisor/x86_mmio.py` against the software CPU: the same instruction on the same memory, registers and flags."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

pytest.importorskip("iced_x86")

from microvm.bus import Bus
from microvm.errors import BackendUnavailable
from microvm.hypervisor import select, x86_mmio
from microvm.hypervisor.base import PartitionConfig, Registers, Segment, StopReason
from microvm.memory import GuestMemory

MEMORY, CODE, DATA, WINDOW = 1 << 20, 0x8000, 0x1_0000, 0x4000_0000
PML4, PDPT, PD0, PD1 = 0x1000, 0x2000, 0x3000, 0x4000
MIDDLE = WINDOW + 0x1000  # a page boundary inside the window
GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
FLAGS = 0xCD5
MASK64 = (1 << 64) - 1


class Store:
    """A device that remembers: two pages."""

    def __init__(self) -> None:
        self.data = bytearray(0x2000)
        self.accesses = 0

    def mmio_read(self, offset: int, size: int) -> int:
        self.accesses += 1
        return int.from_bytes(self.data[offset : offset + size], "little")

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.accesses += 1
        self.data[offset : offset + size] = value.to_bytes(size, "little")


class Soft:
    """The software CPU with the window, in 64-bit mode, code followed by HLT."""

    def __init__(self) -> None:
        self.partition = select.load("soft").create_partition(PartitionConfig())
        self.memory = GuestMemory.allocate(MEMORY)
        self.partition.map(0, self.memory.regions[0])
        self.memory.observe(self.partition.host_wrote)
        self.vcpu = self.partition.create_vcpu(0)
        self.device = Store()
        self.bus = Bus()
        self.bus.map_mmio(WINDOW, 0x2000, self.device)
        write = self.memory.write
        write(PML4, struct.pack("<Q", PDPT | 3))
        write(PDPT, struct.pack("<2Q", PD0 | 3, PD1 | 3))
        write(PD0, struct.pack("<Q", 0x83))
        write(PD1, struct.pack("<Q", WINDOW | 0x93))

    def registers(self, values: list[int], flags: int) -> Registers:
        data = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
        named: Any = dict(zip(GENERAL, values, strict=True))
        return Registers(
            **named, rip=CODE, rflags=flags, cr0=0x8005_0033, cr3=PML4, cr4=0x620, efer=0xD00,
            cs=Segment(8, 0, 0xFFFF_FFFF, 0xA09B), ds=data, es=data, ss=data, fs=data, gs=data,
        )  # fmt: skip


class Model:
    """What `x86_mmio.execute` works on, with the same memory as `Soft`."""

    bits = 64

    def __init__(self, values: list[int], flags: int, ram: bytes, device: bytes, xmm: list[int]) -> None:
        self.gpr = list(values)
        self.rip = CODE
        self.rflags = flags
        self.ram = bytearray(ram)
        self.device = bytearray(device)
        self.xmm = list(xmm)

    def segment_base(self, index: int) -> int:
        return 0

    def translate(self, gva: int, write: bool) -> int:
        if gva >= 2 << 20 and not WINDOW <= gva < WINDOW + 0x2000:
            raise x86_mmio.Fault(14, 0, gva)
        return gva

    def _where(self, gpa: int) -> tuple[bytearray, int]:
        return (self.device, gpa - WINDOW) if gpa >= WINDOW else (self.ram, gpa)

    def read(self, gpa: int, size: int) -> int:
        store, at = self._where(gpa)
        return int.from_bytes(store[at : at + size], "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        store, at = self._where(gpa)
        store[at : at + size] = value.to_bytes(size, "little")

    def port_in(self, port: int, size: int) -> int:
        raise AssertionError

    def port_out(self, port: int, size: int, value: int) -> None:
        raise AssertionError

    def get_xmm(self, index: int) -> int:
        return self.xmm[index]

    def set_xmm(self, index: int, value: int) -> None:
        self.xmm[index] = value


@pytest.fixture(scope="module")
def soft() -> Iterator[Soft]:
    try:
        made = Soft()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.partition.close()
    made.memory.close()


# opcode, immediate bytes (-1: 1, 2 or 4 by operand size), /digit or None for a register
FORMS: list[tuple[str, int, int | None]] = []
for _base in range(0, 0x40, 8):
    FORMS += [(f"{_base + i:02x}", 0, None) for i in range(4)]
FORMS += [(opcode, 0, None) for opcode in ("84", "85", "86", "87", "88", "89", "8a", "8b", "63")]
FORMS += [("80", 1, digit) for digit in range(8)] + [("81", -1, digit) for digit in range(8)]
FORMS += [("83", 1, digit) for digit in range(8)]
FORMS += [("c6", 1, 0), ("c7", -1, 0), ("f6", 1, 0), ("f7", -1, 0)]
FORMS += [(opcode, 0, digit) for opcode in ("f6", "f7") for digit in (2, 3)]
FORMS += [(opcode, 0, digit) for opcode in ("fe", "ff") for digit in (0, 1)]
FORMS += [("0f" + opcode, 0, None) for opcode in ("b6", "b7", "be", "bf", "b0", "b1", "c0", "c1", "c3")]
BIT_FORMS = ("0fa3", "0fab", "0fb3", "0fbb")
FORMS += [(opcode, 0, None) for opcode in BIT_FORMS] + [("0fba", 1, digit) for digit in (4, 5, 6, 7)]
FORMS += [("0f38f0", 0, None), ("0f38f1", 0, None)]
NO_PREFIX_66 = ("0fc3", "63")

values64 = st.one_of(
    st.integers(0, MASK64),
    st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 63, MASK64]),
)


def compare(soft: Soft, code: bytes, values: list[int], flags: int, xmm: list[int], device: bytes) -> None:
    """Run on both and hold every bit that the manual defines against each other."""
    instruction = x86_mmio.decode(code, 64)
    ram = bytes(soft.memory.read(DATA, 0x1000))
    model = Model(values, flags, bytes(DATA) + ram, device, xmm)
    soft.memory.write(CODE, code + b"\xf4")
    soft.device.data[:] = device
    area = bytearray(soft.vcpu.get_xsave())
    for index, value in enumerate(xmm):
        area[160 + 16 * index : 176 + 16 * index] = value.to_bytes(16, "little")
    soft.vcpu.set_registers(soft.registers(values, flags))
    soft.vcpu.set_xsave(bytes(area))
    stop = soft.vcpu.run(soft.bus)
    try:
        while model.rip == CODE:
            x86_mmio.execute(instruction, model)
    except x86_mmio.Fault:
        assert stop.reason == StopReason.CRASHED
        return
    assert stop.reason == StopReason.HALTED, stop
    found = soft.vcpu.get_registers()
    assert model.gpr == [getattr(found, name) for name in GENERAL]
    assert model.rip + 1 == found.rip
    undefined = instruction.rflags_undefined
    hidden = sum(bit for bit, ours in FLAG_BITS.items() if undefined & ours)
    assert (model.rflags ^ found.rflags) & FLAGS & ~hidden == 0, (hex(model.rflags), hex(found.rflags))
    assert model.device == soft.device.data
    assert model.ram[DATA:] == soft.memory.read(DATA, 0x1000)
    area = bytearray(soft.vcpu.get_xsave())
    assert model.xmm == [int.from_bytes(area[160 + 16 * i : 176 + 16 * i], "little") for i in range(16)]


# status flags in RFLAGS: in iced's RflagsBits
FLAG_BITS = {1 << 11: 1, 1 << 7: 2, 1 << 6: 4, 1 << 4: 8, 1 << 0: 0x10, 1 << 2: 0x20}
SLOW = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@SLOW
@given(
    form=st.sampled_from(FORMS),
    prefix=st.sampled_from(["", "66"]),
    rex=st.sampled_from([None, 0x40, 0x44, 0x48, 0x4C]),
    register=st.integers(0, 7),
    displacement=st.integers(-80, 80),
    index=st.booleans(),
    immediate=st.binary(min_size=4, max_size=4),
    values=st.lists(values64, min_size=16, max_size=16),
    flags=st.integers(0, FLAGS),
    seed=st.integers(0, 255),
)
def test_every_form_does_what_the_processor_does(
    soft: Soft,
    form: tuple[str, int, int | None],
    prefix: str,
    rex: int | None,
    register: int,
    displacement: int,
    index: bool,
    immediate: bytes,
    values: list[int],
    flags: int,
    seed: int,
) -> None:
    opcode, immediate_size, digit = form
    assume(not (prefix and opcode in NO_PREFIX_66))
    if digit is not None and rex is not None:
        rex &= ~4  # no register there to extend
    size = 8 if rex is not None and rex & 8 else 2 if prefix else 4
    values[3] = MIDDLE - 40  # rbx
    values[6] = 8  # rsi, an index
    if opcode in BIT_FORMS:
        number = register + (8 if rex is not None and rex & 4 else 0)
        assume(number not in (3, 6) or not index)
        mask = (1 << 8 * size) - 1
        values[number] = values[number] & ~mask | ((values[number] % 4000 - 2000) & mask)
        if number == 3:
            return  # the base itself
    middle = register if digit is None else digit
    modrm = bytes((0x44 | middle << 3, 0x73)) if index else bytes((0x43 | middle << 3,))  # [rbx + rsi*2 + d], [rbx + d]
    code = bytes.fromhex(prefix) + (b"" if rex is None else bytes((rex,))) + bytes.fromhex(opcode) + modrm
    code += struct.pack("b", displacement)
    code += immediate[: immediate_size if immediate_size >= 0 else min(size, 4)]
    device = bytes((seed + 37 * i) & 0xFF for i in range(0x2000))
    compare(soft, code, values, flags & FLAGS | 2, [0] * 16, device)


@SLOW
@given(
    opcode=st.sampled_from(["a4", "a5", "aa", "ab", "ac", "ad"]),
    prefix=st.sampled_from(["", "66", "f3", "66f3", "67", "f367"]),
    wide=st.booleans(),
    count=st.integers(0, 40),
    source=st.sampled_from([MIDDLE - 20, DATA + 0x400, WINDOW + 0x100]),
    target=st.sampled_from([MIDDLE + 5, DATA + 0x7FD, MIDDLE - 3]),
    backwards=st.booleans(),
    rax=values64,
)
def test_string_instructions_do_what_the_processor_does(
    soft: Soft, opcode: str, prefix: str, wide: bool, count: int, source: int, target: int, backwards: bool, rax: int
) -> None:
    code = bytes.fromhex(prefix) + (b"\x48" if wide else b"") + bytes.fromhex(opcode)
    values = [rax, count, *range(2, 16)]
    values[6], values[7] = source, target
    device = bytes(11 * i & 0xFF for i in range(0x2000))
    soft.memory.write(DATA, bytes(7 * i & 0xFF for i in range(0x1000)))
    compare(soft, code, values, 0x402 if backwards else 2, [0] * 16, device)


@SLOW
@given(
    opcode=st.sampled_from(
        ["0f10", "0f11", "660f10", "660f11", "0f28", "0f29", "660f6f", "660f7f", "f30f6f", "f30f7f"]
    ),
    register=st.integers(0, 7),
    offset=st.sampled_from([0, 8, 16, 0xFF0, 0xFF8, 0xFFD]),
    xmm=st.lists(st.integers(0, (1 << 128) - 1), min_size=16, max_size=16),
)
def test_vector_moves_do_what_the_processor_does(
    soft: Soft, opcode: str, register: int, offset: int, xmm: list[int]
) -> None:
    if opcode in ("0f28", "0f29", "660f6f", "660f7f"):
        offset &= ~0xF  # the software CPU does not check alignment; the executor does, see below
    code = bytes.fromhex(opcode) + bytes((0x03 | register << 3,))
    values = [0] * 16
    values[3] = WINDOW + offset
    compare(soft, code, values, 2, xmm, bytes(13 * i & 0xFF for i in range(0x2000)))


@SLOW
@given(
    opcode=st.sampled_from(["a0", "a1", "a2", "a3"]), wide=st.booleans(), offset=st.integers(0, 0x1FF0), rax=values64
)
def test_absolute_addresses_do_what_the_processor_does(
    soft: Soft, opcode: str, wide: bool, offset: int, rax: int
) -> None:
    code = (b"\x48" if wide else b"") + bytes.fromhex(opcode) + struct.pack("<Q", WINDOW + offset)
    compare(soft, code, [rax, *range(1, 16)], 2, [0] * 16, bytes(17 * i & 0xFF for i in range(0x2000)))


def model(values: list[int] | None = None) -> Model:
    return Model(values or [0] * 16, 2, bytes(0x1000), bytes(0x2000), [0] * 16)


def test_misaligned_vector_move_is_a_general_protection_fault() -> None:
    cpu = model([0, 0, 0, WINDOW + 8, *[0] * 12])
    with pytest.raises(x86_mmio.Fault) as caught:
        x86_mmio.execute(x86_mmio.decode(bytes.fromhex("0f2903"), 64), cpu)
    assert caught.value.vector == 13
    assert cpu.rip == CODE


def test_page_fault_on_one_operand_leaves_everything_as_it_was() -> None:
    cpu = model([0, 3, 0, 0, 0, 0, 0x9999_0000, WINDOW, *[0] * 8])
    with pytest.raises(x86_mmio.Fault) as caught:
        x86_mmio.execute(x86_mmio.decode(bytes.fromhex("f3a4"), 64), cpu)
    assert (caught.value.vector, caught.value.address) == (14, 0x9999_0000)
    assert (cpu.rip, cpu.gpr[1], cpu.gpr[7]) == (CODE, 3, WINDOW)


def test_long_repetition_returns_for_interrupts_in_between() -> None:
    cpu = model([0, 1500, *[0] * 5, WINDOW, *[0] * 8])
    instruction = x86_mmio.decode(bytes.fromhex("f3aa"), 64)
    x86_mmio.execute(instruction, cpu)
    assert (cpu.rip, cpu.gpr[1]) == (CODE, 1500 - x86_mmio.MAX_TURNS)
    x86_mmio.execute(instruction, cpu)
    assert (cpu.rip, cpu.gpr[1]) == (CODE + 2, 0)


@pytest.mark.parametrize("code", ["8b", "c703", "48a100", ""])
def test_cut_instruction_asks_for_more_bytes(code: str) -> None:
    with pytest.raises(x86_mmio.TooShort):
        x86_mmio.decode(bytes.fromhex(code), 64)


@pytest.mark.parametrize("code", ["ff23", "d803", "0fc70f", "f6e3", "c5fe6f03", "0fae03"])
def test_what_is_not_supported_says_so(code: str) -> None:
    with pytest.raises(x86_mmio.Unsupported, match="device memory"):
        x86_mmio.execute(x86_mmio.decode(bytes.fromhex(code), 64), model())


@given(code=st.binary(min_size=1, max_size=15), bits=st.sampled_from([16, 32, 64]), value=values64)
@settings(max_examples=500, deadline=None)
def test_any_bytes_are_executed_or_refused(code: bytes, bits: int, value: int) -> None:
    cpu = model([value] * 16)
    cpu.bits = bits
    cpu.port_in = lambda port, size: 0  # type: ignore[method-assign]
    cpu.port_out = lambda port, size, value: None  # type: ignore[method-assign]
    cpu.translate = lambda gva, write: WINDOW + (gva & 0xFFF)  # type: ignore[method-assign]
    try:
        x86_mmio.execute(x86_mmio.decode(code, bits), cpu)
    except (x86_mmio.Fault, x86_mmio.TooShort, x86_mmio.Unsupported):
        pass
    assert all(0 <= each <= MASK64 for each in cpu.gpr)

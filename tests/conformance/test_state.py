"""Registers, XSAVE, kicks, guest time, and saving on one instance to restore on another."""

from __future__ import annotations

import os
import random
import struct
import threading
import time
from collections.abc import Callable

import pytest

from microvm.bus import Bus
from microvm.errors import ConfigError, SnapshotError
from microvm.hypervisor.base import PartitionConfig, Registers, Segment, StopReason, Table

from .asm import Code
from .machine import DATA, PORT_LOG, Machine
from .test_interrupts import LVT_TIMER, MSI, VECTOR, enabled, handler

KICKS = int(os.environ.get("MICROVM_KICKS", "20000"))  # the 100,000 in the nightly run


def test_registers_after_creation_are_those_after_reset(machine: Machine) -> None:
    found, reset = machine.vcpu.get_registers(), Registers()
    found.cs.attributes |= 1  # accessed: AMD leaves it clear
    for name in ("rip", "rflags", "cs", "cr2", "cr3", "cr4", "efer"):
        assert getattr(found, name) == getattr(reset, name), name
    assert found.cr0 & 0x8000_0001 == 0


def test_every_register_comes_back(machine: Machine) -> None:
    registers = machine.long(Code())
    names = [
        "rax",
        "rcx",
        "rdx",
        "rbx",
        "rsp",
        "rbp",
        "rsi",
        "rdi",
        "r8",
        "r9",
        "r10",
        "r11",
        "r12",
        "r13",
        "r14",
        "r15",
    ]
    for number, name in enumerate(names):
        setattr(registers, name, 0x1111_1111_1111_1111 * number ^ 0xF0F0)
    registers.rip = 0xFFFF_8000_1234_5678
    registers.rflags = 0xCD7
    registers.gdtr, registers.idtr = Table(0xFFFF_8000_0000_1000, 0x7F), Table(0xFFFF_9000_0000_2000, 0xFFF)
    registers.cr2, registers.cr8 = 0xFFFF_8000_DEAD_BEEF, 5
    machine.vcpu.set_registers(registers)
    assert machine.vcpu.get_registers() == registers


@pytest.mark.parametrize("dpl", [0, 3])
@pytest.mark.parametrize("attributes", [0x91, 0x93, 0x95, 0x97, 0xC093, 0x5093, 0xD093])
def test_data_segment_attributes_come_back(machine: Machine, attributes: int, dpl: int) -> None:
    registers = machine.protected(Code(32))
    limit = 0xFFFF_FFFF if attributes & 0x8000 else 0xF_FFFF
    registers.es = Segment(0x10 | dpl, 0x1234_5000, limit, attributes | dpl << 5)
    registers.gs = Segment(0x10 | dpl, 0xFFFF_0000, limit, attributes | dpl << 5)
    machine.vcpu.set_registers(registers)
    found = machine.vcpu.get_registers()
    assert found.es == registers.es
    assert found.gs == registers.gs


@pytest.mark.parametrize(
    "name_and_segment",
    [
        ("cs", Segment(0x38, 0, 0xFFFF_FFFF, 0xC09B)),
        ("cs", Segment(0x38, 0x1000, 0xFFFF, 0x9B)),
        ("tr", Segment(0x28, 0x7000, 0x67, 0x8B)),
        ("ldtr", Segment(0x30, 0x7800, 0xFF, 0x82)),
    ],
)
def test_code_and_system_segments_come_back(machine: Machine, name_and_segment: tuple[str, Segment]) -> None:
    name, segment = name_and_segment
    registers = machine.protected(Code(32))
    setattr(registers, name, segment)
    machine.vcpu.set_registers(registers)
    assert getattr(machine.vcpu.get_registers(), name) == segment


def test_xsave_area_comes_back(machine: Machine) -> None:
    machine.vcpu.set_registers(machine.long(Code()))
    state = bytearray(machine.vcpu.get_xsave())
    assert len(state) >= 576
    struct.pack_into("<H", state, 0, 0x27F)  # FCW
    struct.pack_into("<I", state, 24, 0x1FA0)  # MXCSR
    state[32:42] = bytes(range(10))  # ST0
    state[160:176] = bytes(range(16))  # XMM0
    state[160 + 15 * 16 : 160 + 16 * 16] = bytes(range(100, 116))  # XMM15
    struct.pack_into("<Q", state, 512, 3)  # XSTATE_BV: x87, SSE
    machine.vcpu.set_xsave(bytes(state))
    found = machine.vcpu.get_xsave()
    for start, end in ((0, 2), (24, 28), (32, 42), (160, 176), (400, 416)):
        assert found[start:end] == state[start:end], start


def test_guest_computes_with_the_vector_state_it_was_given(machine: Machine) -> None:
    state = bytearray(machine.vcpu.get_xsave())
    state[160:168] = struct.pack("<Q", 40)
    struct.pack_into("<I", state, 24, 0x1F80)
    struct.pack_into("<Q", state, 512, 3)
    code = Code().raw("66 48 0f 7e c0")  # movq rax, xmm0
    code.add("rax", 2).raw("66 48 0f 6e c8").stop()  # movq xmm1, rax
    machine.vcpu.set_registers(machine.long(code))
    machine.vcpu.set_xsave(bytes(state))
    assert machine.finish() == 42
    assert machine.vcpu.get_xsave()[176:184] == struct.pack("<Q", 42)


def test_a_kick_before_run_makes_it_return_at_once(machine: Machine) -> None:
    registers = machine.long(Code().label("spin").jmp("spin"))
    machine.vcpu.set_registers(registers)
    machine.vcpu.kick()
    machine.vcpu.kick()
    assert machine.go().reason == StopReason.KICKED
    timer = threading.Timer(0.05, machine.vcpu.kick)
    timer.start()
    started = time.perf_counter()
    assert machine.go().reason == StopReason.KICKED
    assert time.perf_counter() - started > 0.03, "two kicks before a run are one"
    timer.join()


def test_a_kick_ends_a_guest_that_never_exits(machine: Machine) -> None:
    machine.vcpu.set_registers(machine.long(Code().cli().label("spin").jmp("spin")))
    for _ in range(3):
        running = machine.spawn(0)
        time.sleep(0.02)
        started = time.perf_counter()
        assert running.join(kick=True).reason == StopReason.KICKED
        assert time.perf_counter() - started < 1


def test_a_kick_wakes_a_sleeping_vcpu(machine: Machine) -> None:
    machine.vcpu.set_registers(machine.long(enabled().sti().label("sleep").hlt().jmp("sleep")))
    for _ in range(3):
        running = machine.spawn(0)
        time.sleep(0.03)
        assert running.join(kick=True).reason == StopReason.KICKED


@pytest.mark.parametrize("what", ["spin", "port", "sleep"])
def test_no_kick_is_ever_lost(machine: Machine, what: str) -> None:
    """Random kicks from another thread at every point of the loop: each is followed by a return."""
    code = enabled().sti().label("again")
    if what == "port":
        code.out(PORT_LOG)
    elif what == "sleep":
        code.hlt()
    machine.vcpu.set_registers(machine.long(code.jmp("again")))
    kicks = KICKS // 10 if what != "port" else KICKS
    returned = threading.Semaphore(0)
    finished = False
    bus = Bus()
    reasons: set[str] = set()

    def run() -> None:
        while not finished:
            reasons.add(machine.vcpu.run(bus).reason)
            returned.release()

    thread = threading.Thread(target=run)
    thread.start()
    dice = random.Random(5)
    lost = 0
    for _ in range(kicks):
        for _ in range(dice.randrange(60)):
            pass
        machine.vcpu.kick()
        if not returned.acquire(timeout=10):
            lost += 1
            break
    finished = True
    machine.vcpu.kick()
    thread.join()
    assert lost == 0
    assert reasons == {StopReason.KICKED}


def test_kicks_leave_no_trace_in_the_guest(machine: Machine) -> None:
    """A read-modify-write that an ill-timed stop would run twice."""
    turns = 3_000 if machine.backend.name == "kvm" else 300_000
    code = Code().mov("rbx", DATA).mov("ecx", turns).label("next").raw("ff 03")  # inc dword [rbx]
    machine.vcpu.set_registers(machine.long(code.dec("ecx").j("nz", "next").mov("al", 1).stop()))
    done = threading.Event()

    def kicker() -> None:
        while not done.is_set():
            machine.vcpu.kick()
            time.sleep(0.0003)

    thread = threading.Thread(target=kicker)
    thread.start()
    try:
        deadline = time.monotonic() + 20
        while not machine.stops and time.monotonic() < deadline:
            machine.vcpu.run(machine.bus)
    finally:
        done.set()
        thread.join()
    assert machine.stops == [1]
    assert machine.memory.load_u32(DATA) == turns


def test_time_stands_still_while_paused(machine: Machine) -> None:
    partition = machine.partition
    before = partition.time()
    time.sleep(0.02)
    assert partition.time() - before >= 15_000_000
    partition.pause_time()
    stopped = partition.time()
    time.sleep(0.1)
    assert partition.time() == stopped
    partition.resume_time()
    assert partition.time() - stopped < 50_000_000


def rdtsc(machine: Machine) -> int:
    # rdtsc; shl rdx, 32; or rax, rdx
    code = Code().raw("0f 31 48 c1 e2 20 48 09 d0 48 89 c3").mov("al", 1).stop()  # mov rbx, rax
    machine.finish(machine.long(code))
    return machine.vcpu.get_registers().rbx


def test_tsc_stands_still_while_paused(machine: Machine) -> None:
    first = rdtsc(machine)
    time.sleep(0.2)
    running = rdtsc(machine) - first
    first = rdtsc(machine)
    machine.partition.pause_time()
    time.sleep(0.4)
    machine.partition.resume_time()
    counted = machine.vcpu.get_msr(0x10) - first
    paused = rdtsc(machine) - first
    machine.unless(max(counted, paused) < running, "the time stamp counter cannot be turned back")
    assert min(counted, paused) > 0


def test_deadline_timer_waits_for_the_end_of_a_pause(machine: Machine) -> None:
    code = enabled().apic(LVT_TIMER, VECTOR | 2 << 17).raw("0f 31 48 c1 e2 20 48 09 d0")
    code.raw("48 05").raw((500_000_000).to_bytes(4, "little"))  # add rax, some 0.2 s
    code.raw("48 89 c2 48 c1 ea 20").mov("ecx", 0x6E0).raw("0f 30").mov("al", 1).stop()
    code.sti().hlt().mov("al", 2).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    machine.finish(registers)
    machine.partition.pause_time()
    time.sleep(0.6)
    machine.partition.resume_time()
    started = time.perf_counter()
    assert machine.resume() == 2
    machine.unless(time.perf_counter() - started > 0.05, "the time stamp counter cannot be turned back")
    assert machine.log.values == [0x77]


def test_message_sent_during_a_pause_arrives_after_it(machine: Machine) -> None:
    code = enabled().mov("al", 1).stop().sti().hlt().mov("al", 2).stop()
    registers = machine.long(code)
    machine.handler(VECTOR, handler(0x77))
    machine.finish(registers)
    machine.partition.pause_time()
    machine.partition.signal_msi(MSI, VECTOR)
    machine.partition.resume_time()
    assert machine.resume() == 2


def test_pausing_twice_and_resuming_twice_is_harmless(machine: Machine) -> None:
    for _ in range(2):
        machine.partition.pause_time()
    for _ in range(2):
        machine.partition.resume_time()
    assert machine.finish(machine.long(Code().mov("al", 1).stop())) == 1


COUNTER = Code().label("next").inc("ecx").move("eax", "ecx").out(PORT_LOG, 4).cmp("ecx", 20).j("nz", "next").stop()


def move(source: Machine, target: Machine) -> None:
    """Everything of ``source`` into ``target``."""
    source.partition.pause_time()
    target.partition.pause_time()
    target.memory.view(0, target.memory.size)[:] = source.memory.view(0, source.memory.size)
    target.memory.written(0, target.memory.size)
    target.partition.restore(source.partition.save())
    for theirs, ours in zip(source.vcpus, target.vcpus, strict=True):
        ours.restore(theirs.save())
    source.close()
    target.partition.resume_time()


def test_saved_on_one_and_restored_on_another_has_the_same_future(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(), make_machine()
    if not first.partition.caps.save:
        pytest.skip("this backend cannot save")

    def stop_at_ten(offset: int, size: int, value: int) -> None:
        if value == 10:
            first.vcpu.kick()

    first.log.on_write = stop_at_ten
    assert first.go(first.long(COUNTER)).reason == StopReason.KICKED
    before = list(first.log.values)
    move(first, second)
    second.finish()
    assert before + second.log.values == list(range(1, 21))


def test_restored_vcpu_has_every_register(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(), make_machine()
    registers = first.long(Code().stop())
    registers.r13, registers.fs = 0x1234_5678_9ABC_DEF0, Segment(0x10, 0xFFFF_8000_0000_0000, 0xFFFF_FFFF, 0xC093)
    first.vcpu.set_registers(registers)
    first.vcpu.set_msr(0xC000_0082, 0xFFFF_8000_0000_1111)
    state = bytearray(first.vcpu.get_xsave())
    state[160:176] = bytes(range(16))
    struct.pack_into("<Q", state, 512, 3)
    first.vcpu.set_xsave(bytes(state))
    second.vcpu.restore(first.vcpu.save())
    assert second.vcpu.get_registers() == registers
    assert second.vcpu.get_msr(0xC000_0082) == 0xFFFF_8000_0000_1111
    assert second.vcpu.get_xsave()[160:176] == bytes(range(16))


def test_pending_interrupt_and_armed_timer_survive(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(), make_machine()
    code = enabled().apic(LVT_TIMER, (VECTOR + 1) | 2 << 17).raw("0f 31 48 c1 e2 20 48 09 d0")
    code.raw("48 05").raw((300_000_000).to_bytes(4, "little"))
    code.raw("48 89 c2 48 c1 ea 20").mov("ecx", 0x6E0).raw("0f 30").mov("al", 1).stop()
    code.sti().label("sleep").hlt().in_(PORT_LOG).raw("84 c0").j("z", "sleep").mov("al", 2).stop()
    registers = first.long(code)
    first.handler(VECTOR, handler(0x77))
    first.handler(VECTOR + 1, handler(0x78, 0x9100))
    first.finish(registers)
    first.partition.signal_msi(MSI, VECTOR)
    move(first, second)
    second.log.answer = lambda offset, size: int(len(second.log.values) == 2)
    assert second.resume() == 2
    assert second.log.values == [0x77, 0x78]


def test_debug_registers_survive(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(), make_machine()
    code = Code().mov("rax", 0x1234_5000).raw("0f 23 c0").mov("al", 1).stop()  # mov dr0, rax
    first.finish(first.long(code))
    move(first, second)
    read = Code().raw("0f 21 c0").stop(4)  # mov rax, dr0
    assert second.finish(second.long(read)) == 0x1234_5000


def test_time_goes_on_where_it_was_saved(make_machine: Callable[..., Machine]) -> None:
    first, second = make_machine(), make_machine()
    time.sleep(0.05)
    tsc = rdtsc(first)
    first.partition.pause_time()
    saved = first.partition.time()
    move(first, second)
    assert 0 <= second.partition.time() - saved < 100_000_000
    assert 0 < rdtsc(second) - tsc < 2_000_000_000


@pytest.mark.parametrize("damage", [b"", b"x", b"garbage" * 100, None, "cut", "flip"])
def test_a_blob_that_is_not_ours_is_refused(machine: Machine, damage: bytes | str | None) -> None:
    for thing in (machine.partition, machine.vcpu):
        blob = thing.save()
        if damage == "cut":
            blob = blob[: len(blob) // 2]
        elif damage == "flip":
            blob = bytes((blob[0] ^ 0xFF,)) + blob[1:]
        elif damage is None:
            blob = b"WHPstate" + blob[8:]
        else:
            assert isinstance(damage, bytes)
            blob = damage
        with pytest.raises(SnapshotError):
            thing.restore(blob)
    assert machine.finish(machine.long(Code().mov("al", 1).stop())) == 1


def test_impossible_partitions_are_refused(machine: Machine) -> None:
    for vcpus in (0, -1, 100_000):
        with pytest.raises(ConfigError):
            machine.backend.create_partition(PartitionConfig(vcpus=vcpus))
    for index in (0, 1, -1):
        with pytest.raises(ConfigError):
            machine.partition.create_vcpu(index)


def test_closing_twice_is_harmless_and_frees_every_descriptor(make_machine: Callable[..., Machine]) -> None:
    make_machine().close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        machine = make_machine(vcpus=2)
        machine.finish(machine.long(Code().mov("al", 1).stop()))
        machine.partition.route_irq(3, MSI, VECTOR)
        machine.close()
        machine.close()
    assert len(os.listdir("/proc/self/fd")) == before

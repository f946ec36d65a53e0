"""What the engine gets wrong by itself and the shim puts right, each as a guest would meet it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm.bus import Bus
from microvm.errors import BackendUnavailable, ConfigError, SnapshotError
from microvm.hypervisor.base import PartitionConfig, Perm, Registers, Segment, StopReason
from microvm.memory import GuestMemory

from .asm import Code
from .machine import CODE, DATA, IDT, MEMORY, MMIO, PD, PORT_LOG, PORT_STOP, TSS, Machine


@pytest.fixture
def soft() -> object:
    from microvm.hypervisor import select

    try:
        backend = select.load("soft")
        backend.create_partition(PartitionConfig()).close()
    except BackendUnavailable as error:
        if "soft" in os.environ.get("MICROVM_REQUIRE", "").split(","):
            raise
        pytest.skip(str(error))
    return backend


@pytest.fixture
def machine(soft: object) -> Iterator[Machine]:
    with Machine(soft) as machine:  # type: ignore[arg-type]
        yield machine


def stop(code: Code) -> Code:
    return code.out(PORT_STOP, 4).hlt()


LAPIC = 0xFEE0_0000
FUNCTION = 0x20_0000
ALIAS = 0x60_0000


def _constant(value: int) -> bytes:
    return Code(64).mov("eax", value).raw("c3").build()


def test_code_written_through_an_alias_runs_new_not_stale(machine: Machine) -> None:
    """One physical page at two addresses: written through the second, run through the first."""
    code = Code(64, CODE).mov("rbx", FUNCTION).mov("rdi", ALIAS + 1).mov("ecx", 1000).raw("31 f6")  # xor esi, esi
    code.label("again").raw("ff d3")  # call rbx
    code.raw("01 c6")  # add esi, eax
    code.inc("eax").store("rdi", "eax")  # the immediate of the function's mov
    code.dec("ecx").j("nz", "again").move("eax", "esi")
    registers = machine.long(stop(code))
    machine.memory.write(PD + 8 * (ALIAS >> 21), (FUNCTION | 0x87).to_bytes(8, "little"))
    machine.memory.write(FUNCTION, _constant(1))
    assert machine.finish(registers) == sum(range(1, 1001))


def test_code_the_host_wrote_runs_new_not_stale(machine: Machine) -> None:
    code = Code(64, CODE).mov("rbx", FUNCTION).mov("ecx", 200).raw("31 f6")
    code.label("again").raw("ff d3").raw("01 c6").out(PORT_LOG).dec("ecx").j("nz", "again").move("eax", "esi")
    registers = machine.long(stop(code))
    machine.memory.write(FUNCTION, _constant(1))
    count = 1

    def dma(offset: int, size: int, value: int) -> None:
        nonlocal count
        count += 1
        machine.memory.write(FUNCTION, _constant(count))

    machine.log.on_write = dma
    assert machine.finish(registers) == sum(range(1, 201))


def test_kicks_never_run_an_instruction_twice(machine: Machine) -> None:
    """A read-modify-write counts its own executions against a register while another thread kicks."""
    turns = 20_000_000
    code = Code(64, CODE).mov("rdi", DATA).mov("ecx", turns).mov("eax", 1)
    code.label("again").add_memory("rdi", "eax").dec("ecx").j("nz", "again").load("eax", "rdi")
    machine.vcpu.set_registers(machine.long(stop(code)))
    done = threading.Event()

    def kick() -> None:
        while not done.is_set():
            machine.vcpu.kick()
            time.sleep(0.0002)

    thread = threading.Thread(target=kick)
    thread.start()
    kicks = 0
    try:
        while not machine.stops:
            assert machine.go().reason == StopReason.KICKED
            kicks += 1
    finally:
        done.set()
        thread.join()
    assert machine.stops == [turns]
    assert kicks > 10


def test_port_in_user_mode_without_permission_is_a_general_protection_fault(machine: Machine) -> None:
    code = Code(64, CODE).raw("e4 80").raw("eb fe")  # in al, 0x80; jmp $
    registers = machine.long(code, ring=3)
    machine.memory.write(TSS + 0x66, (0x68).to_bytes(2, "little"))  # beyond the limit: no permission map
    machine.go(registers)
    assert machine.faults == [13]


def test_port_in_user_mode_is_allowed_by_the_permission_map(machine: Machine) -> None:
    code = Code(64, CODE).mov("eax", 7).out(PORT_STOP, 4).raw("eb fe")
    registers = machine.long(code, ring=3)
    machine.memory.write(TSS + 0x66, (0x68).to_bytes(2, "little"))
    machine.memory.write(TSS + 0x68, bytes(0x70))
    registers.tr.limit = 0xD7
    machine.go(registers)
    assert machine.stops == [7]
    assert machine.faults == []


def test_user_fault_with_a_broken_tss_ends_the_guest_not_the_process(machine: Machine) -> None:
    registers = machine.long(Code(64, CODE).raw("0f 0b"), ring=3)  # ud2
    registers.tr = Segment(0, 0, 0, 0)
    stopped = machine.go(registers)
    assert stopped.reason == StopReason.CRASHED
    assert "tss" in stopped.detail  # said where it was noticed: not by abort(), which is caught as well


def test_triple_fault_is_reported_as_such(machine: Machine) -> None:
    registers = machine.long(Code(64, CODE).raw("0f 0b"))
    registers.idtr.limit = 0
    assert machine.go(registers).triple_fault


def test_unknown_msr_is_a_general_protection_fault(machine: Machine) -> None:
    machine.go(machine.long(Code(64, CODE).rdmsr(0x1234_5678).hlt()))
    assert machine.faults == [13]


def test_second_page_fault_is_not_a_double_fault(machine: Machine) -> None:
    code = Code(64, CODE).mov("rbx", 0x1_0000_0000_00).mov("ecx", 5)
    code.label("again").load("eax", "rbx").raw("90").dec("ecx").j("nz", "again").mov("eax", 1)
    registers = machine.long(stop(code))
    # The handler skips the two-byte load and counts on a port.
    machine.handler(14, Code(64, 0x9000).mov("al", 0xEE).out(PORT_LOG).raw("48 83 c4 08 48 83 04 24 02").iretq())
    assert machine.finish(registers) == 1
    assert machine.log.values == [0xEE] * 5


@pytest.mark.parametrize("mode", ["one shot", "periodic", "deadline"])
def test_apic_timer_wakes_a_halted_guest(machine: Machine, mode: str) -> None:
    lvt = {"one shot": 0x40, "periodic": 0x2_0040, "deadline": 0x4_0040}[mode]
    code = Code(64, CODE).mov("rbx", LAPIC)
    for offset, value in ((0xF0, 0x1FF), (0x3E0, 0xB), (0x320, lvt)):
        code.mov("rbx", LAPIC + offset).mov("eax", value).store("rbx", "eax")
    ticks = 3 if mode == "periodic" else 1
    if mode == "deadline":
        code.raw("0f 31")  # rdtsc
        code.raw("05").raw((5_000_000).to_bytes(4, "little")).raw("83 d2 00")  # add eax, 5 ms; adc edx, 0
        code.mov("ecx", 0x6E0).raw("0f 30")  # wrmsr
    else:
        code.mov("rbx", LAPIC + 0x380).mov("eax", 125_000).store("rbx", "eax")  # 5 ms at 25 MHz
    code.mov("rsi", DATA)
    code.label("sleep").sti().hlt().cli().load("eax", "rsi").cmp("eax", ticks).j("ne", "sleep")
    registers = machine.long(stop(code))
    handler = Code(64, 0x9000).raw("50 53 f0 ff 06")  # push rax; push rbx; lock inc dword [rsi]
    handler.mov("rbx", LAPIC + 0xB0).mov("eax", 0).store("rbx", "eax").raw("5b 58").iretq()
    machine.handler(0x40, handler)
    before = machine.partition.time()
    assert machine.finish(registers) == ticks
    assert machine.partition.time() - before >= ticks * 5_000_000


def test_paused_guest_time_stands_still(machine: Machine) -> None:
    machine.partition.pause_time()
    first = machine.partition.time()
    time.sleep(0.02)
    assert machine.partition.time() == first
    machine.partition.resume_time()
    assert 0 <= machine.partition.time() - first < 10_000_000


def test_four_vcpus_increment_one_word_without_loss(soft: object) -> None:
    """Started by INIT and SIPI, time-sliced on one engine; each adds with LOCK."""
    turns = 200_000
    with Machine(soft, vcpus=4) as machine:  # type: ignore[arg-type]
        # Real mode at 0xc000 for the others: lock inc dword [0x500] so many times, then arrive.
        other = Code(16, 0xC000).raw("31 c0 8e d8").raw("66 b9").raw(turns.to_bytes(4, "little"))
        other.label("again").raw("f0 66 ff 06 00 05").raw("66 49").j("nz", "again")
        other.raw("f0 66 ff 06 40 05").cli().hlt()
        machine.memory.write(0xC000, other.build())
        code = Code(64, CODE).mov("rbx", LAPIC + 0xF0).mov("eax", 0x1FF).store("rbx", "eax")
        code.mov("rbx", LAPIC + 0x300)
        for command in (0xC_4500, 0xC_460C):  # INIT, then SIPI to vector 12, to all but self
            code.mov("eax", command).store("rbx", "eax")
        code.mov("rdi", 0x500).mov("ecx", turns)
        code.label("again").raw("f0 ff 07").dec("ecx").j("nz", "again")
        code.mov("rdi", 0x540).label("wait").raw("f3 90").load("eax", "rdi").cmp("eax", 3).j("ne", "wait")
        code.mov("rdi", 0x500).load("eax", "rdi")
        machine.vcpu.set_registers(machine.long(stop(code)))
        others = [threading.Thread(target=vcpu.run, args=(machine.bus,)) for vcpu in machine.vcpus[1:]]
        for thread in others:
            thread.start()
        assert machine.finish() == 4 * turns
        for vcpu in machine.vcpus[1:]:
            vcpu.kick()
        for thread in others:
            thread.join()


def test_writes_to_a_page_that_is_also_executed_are_logged_dirty(soft: object) -> None:
    with Machine(soft, track_dirty=True) as machine:  # type: ignore[arg-type]
        code = Code(64, CODE).mov("rbx", FUNCTION).mov("rdi", FUNCTION + 0x800).raw("ff d3").store("rdi", "eax")
        registers = machine.long(stop(code.mov("eax", 1)))
        machine.memory.write(FUNCTION, _constant(3))
        machine.partition.dirty(0, machine.memory.size)
        machine.finish(registers)
        bitmap = machine.partition.dirty(0, machine.memory.size)
        page = FUNCTION >> 12
        assert bitmap[page >> 3] >> (page & 7) & 1


def test_store_to_a_read_only_mapping_reaches_the_bus_and_changes_nothing(machine: Machine) -> None:
    rom = GuestMemory.allocate(0x1000)
    try:
        rom.write(0, b"\x11\x22\x33\x44" * 16)
        machine.partition.map(MMIO + 0x10_0000, rom.regions[0], Perm.READ | Perm.EXEC)
        written: list[tuple[int, int, int]] = []

        class Device:
            def mmio_read(self, offset: int, size: int) -> int:
                return 0

            def mmio_write(self, offset: int, size: int, value: int) -> None:
                written.append((offset, size, value))

        machine.bus.map_mmio(MMIO + 0x10_0000, 0x1000, Device())
        code = Code(64, CODE).mov("rbx", MMIO + 0x10_0000).mov("eax", 0xDEAD).store("rbx", "eax").load("eax", "rbx")
        assert machine.finish(machine.long(stop(code))) == 0x4433_2211
        assert written == [(0, 4, 0xDEAD)]
        machine.partition.unmap(MMIO + 0x10_0000, 0x1000)
    finally:
        machine.partition.close()
        rom.close()


def test_saved_guest_goes_on_in_another_partition(soft: object) -> None:
    code = Code(64, CODE).mov("ecx", 50)
    code.label("again").move("eax", "ecx").out(PORT_LOG, 4).dec("ecx").j("nz", "again").mov("eax", 9)
    with Machine(soft) as first, Machine(soft) as second:  # type: ignore[arg-type]
        first.log.on_write = lambda offset, size, value: first.vcpu.kick() if value == 20 else None
        assert first.go(first.long(stop(code))).reason == StopReason.KICKED
        second.memory.write(0, first.memory.read(0, first.memory.size))
        second.partition.restore(first.partition.save())
        second.vcpu.restore(first.vcpu.save())
        assert second.finish() == 9
        assert first.log.values + second.log.values == list(range(50, 0, -1))


def test_foreign_state_is_refused(machine: Machine) -> None:
    with pytest.raises(SnapshotError):
        machine.vcpu.restore(b"kvm-v1\0\0" + bytes(64))
    with pytest.raises(SnapshotError):
        machine.partition.restore(b"")


def test_exception_in_a_bus_handler_comes_out_of_run_and_the_guest_can_go_on(machine: Machine) -> None:
    code = Code(64, CODE).mov("al", 1).out(PORT_LOG).jmp("on").label("on").mov("eax", 2)
    failures = [ZeroDivisionError()]

    def fail(offset: int, size: int, value: int) -> None:
        if failures:
            raise failures.pop()

    machine.log.on_write = fail
    with pytest.raises(ZeroDivisionError):
        machine.go(machine.long(stop(code)))
    assert machine.finish() == 2


def test_partition_beyond_its_processors_is_refused(soft: object) -> None:
    with pytest.raises(ConfigError):
        soft.create_partition(PartitionConfig(vcpus=0))  # type: ignore[attr-defined]
    partition = soft.create_partition(PartitionConfig(vcpus=1))  # type: ignore[attr-defined]
    try:
        with pytest.raises(ConfigError):
            partition.create_vcpu(1)
    finally:
        partition.close()


def test_closing_frees_the_engine(soft: object) -> None:
    """A hundred engines one after another: the process keeps neither their memory nor their threads."""

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    def once() -> None:
        with Machine(soft) as machine:  # type: ignore[arg-type]
            assert machine.finish(machine.long(stop(Code(64, CODE).mov("eax", 5)))) == 5

    for _ in range(10):
        once()
    before, threads = resident(), threading.active_count()
    for _ in range(100):
        once()
    assert threading.active_count() == threads
    assert resident() - before < 16 << 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_child_forked_beside_a_running_guest_can_close_its_copy(machine: Machine) -> None:
    machine.vcpu.set_registers(machine.long(Code(64, CODE).label("spin").jmp("spin")))
    thread = threading.Thread(target=machine.vcpu.run, args=(machine.bus,))
    thread.start()
    time.sleep(0.05)
    child = os.fork()
    if child == 0:
        machine.partition.close()
        os._exit(0)
    deadline = time.monotonic() + 10
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    machine.vcpu.kick()
    thread.join()
    assert ended == child, "the child waits for a thread that did not come along"
    assert os.waitstatus_to_exitcode(status) == 0


def test_real_mode_guest_without_interrupts_halts(machine: Machine) -> None:
    registers = Registers(rip=0x1000, cs=Segment(0, 0, 0xFFFF, 0x9B))
    machine.memory.write(0x1000, b"\xfa\xf4")
    machine.vcpu.set_registers(registers)
    assert machine.vcpu.run(Bus()).reason == StopReason.HALTED


def test_instruction_the_engine_gives_up_on_ends_the_guest_not_the_process() -> None:
    """LOCK BTS of a register, which any user program can execute, makes the library's translator call abort()."""
    program = """
        import sys
        from microvm.hypervisor import select
        from tests.conformance.asm import Code
        from tests.conformance.machine import CODE, Machine
        with Machine(select.load("soft"), vcpus=2) as machine:
            stop = machine.go(machine.long(Code(64, CODE).raw("f0 0f ab dd"), ring=3))
            assert stop.reason == "crashed" and "cannot translate" in stop.detail, stop
            assert machine.go(vcpu=machine.vcpus[1]).reason == "crashed"  # nothing runs on that engine again
        with Machine(select.load("soft")) as machine:
            machine.finish(machine.long(Code(64, CODE).mov("eax", 1).out(0x320, 4).hlt()))
    """
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_vcpu_that_crashes_leaves_the_running_one_alone(soft: object) -> None:
    """The registers of the crash are kept: fetching them must not exchange state under another vCPU's feet."""
    for _ in range(20):
        with Machine(soft, vcpus=2) as machine:  # type: ignore[arg-type]
            busy = Code(64, CODE).mov("ecx", 30_000_000).label("again").dec("ecx").j("nz", "again").mov("eax", 7)
            crashing = Code(64, 0xA000).mov("rdx", 0x1234).mov("ecx", 100_000)
            crashing.label("spin").dec("ecx").j("nz", "spin").raw("0f 0b")
            machine.memory.write(0xA000, crashing.build())
            registers = machine.long(stop(busy))
            other = machine.long(crashing)
            other.idtr.limit = 0
            machine.vcpus[1].set_registers(other)
            saved = machine.vcpus[1].save()
            saved = saved[:8] + (1).to_bytes(4, "little") + saved[12:]  # runnable without a SIPI
            machine.vcpus[1].restore(saved)
            machine.vcpu.set_registers(registers)
            first, second = machine.spawn(0), machine.spawn(1)
            crash = second.join()
            assert crash.triple_fault
            assert crash.registers is not None
            assert crash.registers.rdx == 0x1234
            assert first.join().reason == StopReason.KICKED
            assert machine.stops == [7]


def test_page_tables_outside_memory_translate_to_nothing(machine: Machine) -> None:
    registers = machine.long(stop(Code(64, CODE).mov("eax", 1)))
    machine.finish(registers)
    registers.cr3 = MMIO
    machine.vcpu.set_registers(registers)
    assert machine.vcpu.translate(0x1234) is None


ENDLESS = {
    "page faults on the handler": (14, "", 0x80_0000_0000),
    "invalid instructions in the handler": (6, "0f 0b", 0x9000),
    "protection faults in the handler": (13, "b9 78 56 34 12 0f 32", 0x9000),  # rdmsr of what there is not
    "breakpoints in the handler": (3, "cc", 0x9000),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_endless_exceptions_can_be_kicked(machine: Machine, what: str) -> None:
    """Faults that deliver faults for ever, each on the same interrupt stack, so that none becomes a triple fault."""
    vector, body, handler = ENDLESS[what]
    machine.expected_faults = frozenset(range(32))
    code = Code(64, CODE).mov("rbx", 0x80_0000_0000).raw("ff e3") if vector == 14 else Code(64, CODE).raw(body)
    registers = machine.long(code)
    if body:
        machine.memory.write(handler, bytes.fromhex(body))
    machine.gate(vector, handler, ist=1)
    machine.memory.write(IDT + 16 * vector + 8, (handler >> 32).to_bytes(4, "little"))
    running = machine.spawn(0, registers)
    time.sleep(0.05)
    begin = time.monotonic()
    assert running.join(kick=True).reason == StopReason.KICKED
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    ("msr", "value"),
    [
        pytest.param(0xC000_0080, 0x1D01, id="EFER.SVME"),
        pytest.param(0xC000_0082, 0x8000_0000_0000, id="LSTAR not canonical"),
        pytest.param(0xC000_0100, 0x8000_0000_0000, id="FS base not canonical"),
        pytest.param(0x1B, 0xFED0_0900, id="APIC moved"),
        pytest.param(0x1B, 0xFEE0_0000, id="APIC off"),
        pytest.param(0x4B56_4D00, 0x1001, id="odd wall clock"),
    ],
)
def test_msr_values_that_must_not_be_are_protection_faults(machine: Machine, msr: int, value: int) -> None:
    code = Code(64, CODE).mov("ecx", msr).mov("eax", value & 0xFFFF_FFFF).mov("edx", value >> 32).raw("0f 30")
    machine.go(machine.long(code.hlt()))
    assert machine.faults == [13]


@pytest.mark.parametrize("gpa", [MEMORY - 8, MEMORY, MMIO, 0xFEE0_0000, 1 << 51, (1 << 64) - 32])
@pytest.mark.parametrize("msr", [0x4B56_4D00, 0x4B56_4D01])
def test_clock_outside_memory_is_written_nowhere(machine: Machine, msr: int, gpa: int) -> None:
    value = gpa | (msr & 1)
    code = Code(64, CODE).mov("ecx", msr).mov("eax", value & 0xFFFF_FFFF).mov("edx", value >> 32).raw("0f 30")
    registers = machine.long(stop(code.mov("eax", 1)))
    before = machine.memory.read(DATA, MEMORY - DATA)
    assert machine.finish(registers) == 1
    assert machine.memory.read(DATA, MEMORY - DATA) == before
    assert machine.window.writes == []


def _timer(machine: Machine, lvt: int, initial: int, deadline: int | None = None) -> Registers:
    """A guest that sleeps for ever and counts timer interrupts at DATA."""
    code = Code(64, CODE)
    for offset, value in ((0xF0, 0x1FF), (0x3E0, 0xB), (0x320, lvt), (0x380, initial)):
        code.mov("rbx", LAPIC + offset).mov("eax", value).store("rbx", "eax")
    if deadline is not None:
        code.mov("ecx", 0x6E0).mov("eax", deadline & 0xFFFF_FFFF).mov("edx", deadline >> 32).raw("0f 30")
    code.mov("rsi", DATA).label("sleep").sti().hlt().jmp("sleep")
    registers = machine.long(code)
    handler = Code(64, 0x9000).raw("50 53 ff 06").mov("rbx", LAPIC + 0xB0).mov("eax", 0).store("rbx", "eax")
    machine.handler(0x40, handler.raw("5b 58").iretq())
    return registers


def _interrupts_in(machine: Machine, registers: Registers, seconds: float) -> int:
    running = machine.spawn(0, registers)
    time.sleep(seconds)
    assert running.join(kick=True).reason == StopReason.KICKED
    return machine.memory.load_u32(DATA)


@pytest.mark.parametrize("deadline", [(1 << 64) - 1, 1 << 63, (1 << 63) + (1 << 62)])
def test_deadline_in_the_far_future_never_comes(machine: Machine, deadline: int) -> None:
    assert _interrupts_in(machine, _timer(machine, 0x4_0040, 0, deadline), 0.05) == 0


def test_timer_of_a_nanosecond_does_not_drive_the_host(machine: Machine) -> None:
    begin = machine.partition.time()
    count = _interrupts_in(machine, _timer(machine, 0x2_0040, 1), 0.3)
    assert 10 < count <= (machine.partition.time() - begin) / 20_000 + 2


def test_saved_state_from_a_file_is_mended_before_the_engine_indexes_with_it(machine: Machine) -> None:
    """Offsets of the engine's fields from its first register: the FPU's stack top, and flags that mean SMM and SVM."""
    fpu_top, flags = 604, 176
    registers = machine.long(stop(Code(64, CODE).raw("d9 e8").mov("eax", 3)))  # fld1
    registers.rax = 0x1122_3344_5566_7788
    machine.vcpu.set_registers(registers)
    blob = bytearray(machine.vcpu.save())
    context = blob.index(registers.rax.to_bytes(8, "little"))
    blob[context + fpu_top : context + fpu_top + 4] = (0x7FFF_FFFF).to_bytes(4, "little")
    blob[context + flags + 2] |= 7 << 3
    machine.vcpu.restore(bytes(blob))
    mended = machine.vcpu.save()
    assert int.from_bytes(mended[context + fpu_top : context + fpu_top + 4], "little") == 7
    assert not mended[context + flags + 2] & 7 << 3
    assert machine.finish() == 3

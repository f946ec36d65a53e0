"""What a backend does on this machine, found by asking it: the questions of ``microvm selftest``.

A report from a machine we do not have must answer what documentation leaves open: whether HLT waits in the hypervisor,
whether a cancel sticks, whether the dirty log starts anew, what the clock does while nothing runs. Each question runs a
tiny guest on a partition of its own and returns what was seen; whether that is good is a second value, None where
either answer is.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from ..bus import Bus
from ..errors import MicroVMError
from ..memory import GuestMemory
from .base import Hypervisor, PartitionConfig, Segment, Table, VcpuStop
from .trial import run_trial

TIME_LIMIT_S: Final = 3.0
_MEMORY: Final = 2 << 20
_PML4, _PDPT, _PD, _APIC_PD, _GDT, _IDT, _CODE, _HANDLER, _STACK, _AP = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x8000, 0x9000, 0xB000, 0xC000,
)  # fmt: skip
_DATA: Final = 0x10_0000
_LAPIC: Final = 0xFEE0_0000
_VECTOR: Final = 0x41
_PORT_NOTE, _PORT_STOP = 0xE0, 0xE4


@dataclass(frozen=True, slots=True)
class Answer:
    """``good`` is None where both answers are. ``question`` is a short name that stays the same."""

    question: str
    answer: str
    good: bool | None = None


@dataclass(slots=True)
class _Ports:
    notes: list[tuple[float, int]] = field(default_factory=list)
    stop: Callable[[], None] = lambda: None

    def pio_read(self, offset: int, size: int) -> int:
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        if _PORT_NOTE + offset == _PORT_STOP:
            self.stop()
        else:
            self.notes.append((time.perf_counter(), value))


def apic(register: int, value: int) -> bytes:
    """mov ebx, register; mov dword [rbx], value"""
    return b"\xbb" + struct.pack("<I", _LAPIC + register) + b"\xc7\x03" + struct.pack("<I", value)


NOTE: Final = bytes((0xE7, _PORT_NOTE))  # out 0xe0, eax
STOP: Final = bytes((0xE6, _PORT_STOP, 0xEB, 0xFE))  # out 0xe4, al; jmp $
RDTSC: Final = bytes.fromhex("0f 31 48 c1 e2 20 48 09 d0")  # rdtsc; shl rdx, 32; or rax, rdx
APIC_ON: Final = apic(0xF0, 0x1FF)
STI, CLI, HLT = b"\xfb", b"\xfa", b"\xf4"


class Guest:
    """One partition with a little memory and 64-bit code at ring 0. Vector 0x41 notes itself and returns."""

    def __init__(self, backend: Hypervisor, code: bytes, vcpus: int = 1, track_dirty: bool = False) -> None:
        self.partition: Any = backend.create_partition(PartitionConfig(vcpus=vcpus))
        self.memory = GuestMemory.allocate(_MEMORY)
        self.ports = _Ports()
        self.bus = Bus()
        self.bus.map_pio(_PORT_NOTE, 8, self.ports)
        try:
            self.partition.map(0, self.memory.regions[0], track_dirty=track_dirty)
            self.vcpus = [self.partition.create_vcpu(index) for index in range(vcpus)]
            self.vcpu: Any = self.vcpus[0]
            self.ports.stop = self.vcpu.kick
            if self.partition.caps.host_writes:
                self.memory.observe(self.partition.host_wrote)
            self._fill(code)
            self.restart()
        except BaseException:
            self.close()
            raise

    def _fill(self, code: bytes) -> None:
        write = self.memory.write
        write(_PML4, struct.pack("<Q", _PDPT | 3))
        write(_PDPT, struct.pack("<4Q", _PD | 3, 0, 0, _APIC_PD | 3))
        write(_PD, struct.pack("<Q", 0x83))
        write(_APIC_PD + 8 * (_LAPIC >> 21 & 0x1FF), struct.pack("<Q", _LAPIC & ~0x1F_FFFF | 0x9B))
        write(_GDT, struct.pack("<3Q", 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF))
        write(_IDT + 16 * _VECTOR, struct.pack("<HHBBHII", _HANDLER, 8, 0, 0x8E, 0, 0, 0))
        write(_HANDLER, b"\xb8" + struct.pack("<I", _VECTOR) + NOTE + apic(0xB0, 0) + b"\x48\xcf")  # iretq
        write(_CODE, code)

    def restart(self) -> None:
        """Put vCPU 0 at the beginning of the code."""
        registers = self.vcpu.get_registers()
        data = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
        registers.rip, registers.rsp, registers.rflags = _CODE, _STACK, 2
        registers.cs = Segment(8, 0, 0xFFFF_FFFF, 0xA09B)
        registers.ds = registers.es = registers.ss = registers.fs = registers.gs = data
        registers.tr = Segment(0, 0, 0xFFFF, 0x8B)
        registers.gdtr, registers.idtr = Table(_GDT, 23), Table(_IDT, 16 * 256 - 1)
        registers.cr0, registers.cr3, registers.cr4, registers.efer = 0x8005_0033, _PML4, 0x620, 0xD00
        self.vcpu.set_registers(registers)

    def run(self, limit_s: float = TIME_LIMIT_S) -> tuple[VcpuStop, bool]:
        """Run vCPU 0 until it stops; the flag says whether the time was up."""
        late = threading.Event()

        def time_out() -> None:
            late.set()
            self.vcpu.kick()

        timer = threading.Timer(limit_s, time_out)
        timer.daemon = True
        timer.start()
        try:
            stop: VcpuStop = self.vcpu.run(self.bus)
        finally:
            timer.cancel()
            timer.join()
        return stop, late.is_set()

    @property
    def values(self) -> list[int]:
        return [value for _, value in self.ports.notes]

    def close(self) -> None:
        self.partition.close()
        self.memory.close()


@contextmanager
def guest(backend: Hypervisor, code: bytes, vcpus: int = 1, track_dirty: bool = False) -> Iterator[Guest]:
    """A `Guest` that is closed afterwards."""
    made = Guest(backend, code, vcpus, track_dirty)
    try:
        yield made
    finally:
        made.close()


def speed(backend: Hypervisor) -> tuple[str, bool]:
    trial = run_trial(backend)
    text = f"{trial.mips:.0f} million instructions/s, {trial.exits_per_second:,.0f} port exits/s"
    return (trial.failure, False) if trial.failure else (text, True)


def capabilities(backend: Hypervisor) -> tuple[str, None]:
    with guest(backend, STOP) as made:
        return str(made.partition.caps), None


def second_partition(backend: Hypervisor) -> tuple[str, bool]:
    with guest(backend, STOP) as first, guest(backend, STOP) as second:
        ended = [not made.run()[1] for made in (first, second)]
        first.restart()
        ended.append(not first.run()[1])
    return ("both run" if all(ended) else f"who ended: {ended}"), all(ended)


def sticky_kick(backend: Hypervisor) -> tuple[str, bool]:
    with guest(backend, b"\xeb\xfe") as made:  # jmp $
        made.vcpu.kick()
        begin = time.perf_counter()
        _, late = made.run(0.5)
        return f"a kick before run ends it after {1e3 * (time.perf_counter() - begin):.2f} ms", not late


def kick_latency(backend: Hypervisor) -> tuple[str, bool]:
    with guest(backend, b"\xeb\xfe") as made:
        kicked = 0.0

        def kick() -> None:
            nonlocal kicked
            kicked = time.perf_counter()
            made.vcpu.kick()

        timer = threading.Timer(0.1, kick)
        timer.start()
        _, late = made.run()
        took = time.perf_counter() - kicked
        timer.join()
        return f"a guest that never exits stops {1e3 * took:.2f} ms after the kick", not late


def halt(backend: Hypervisor) -> tuple[str, bool]:
    code = APIC_ON + STI + b"\x31\xc0" + NOTE + HLT + STOP  # xor eax, eax
    with guest(backend, code) as made:
        timer = threading.Timer(0.3, made.partition.signal_msi, (_LAPIC, _VECTOR))
        timer.start()
        used = time.process_time()
        _, late = made.run()
        used = time.process_time() - used
        timer.join()
        exits = getattr(made.vcpu, "exits", None)
        halts = "" if exits is None else f", {exits.get(8, 0)} halt exits"
        woke = _VECTOR in made.values and not late
        return f"HLT {'ends' if woke else 'does not end'} with an interrupt, {used:.3f} s of processor{halts}", woke


def halt_for_good(backend: Hypervisor) -> tuple[str, bool]:
    with guest(backend, CLI + HLT) as made:
        stop, late = made.run(1.0)
        return f"HLT with interrupts off: {'waits until kicked' if late else stop.reason}", True


def dirty_log(backend: Hypervisor) -> tuple[str, bool | None]:
    code = b"\xbb" + struct.pack("<I", _DATA) + b"\xff\x03" + STOP  # mov ebx, _DATA; inc dword [rbx]
    with guest(backend, STOP) as made:
        if not made.partition.caps.dirty_log:
            return "no dirty log", None
    with guest(backend, code, track_dirty=True) as made:
        page = _DATA >> 12

        def seen() -> bool:
            bitmap: bytes = made.partition.dirty(0, _MEMORY)
            return bool(bitmap[page >> 3] >> (page & 7) & 1)

        made.run()
        found = [seen(), seen()]
        made.restart()
        made.run()
        found.append(seen())
        return f"written, asked again, written again: {found}", found == [True, False, True]


def clock(backend: Hypervisor) -> tuple[str, None]:
    code = RDTSC + b"\x48\x89\xc1" + STOP  # mov rcx, rax
    with guest(backend, code) as made:

        def tsc() -> int:
            made.restart()
            made.run()
            return int(made.vcpu.get_registers().rcx)

        tsc()
        first, begin = tsc(), time.perf_counter()
        time.sleep(0.2)
        idle = tsc() - first
        rate = idle / (time.perf_counter() - begin)
        first = tsc()
        made.partition.pause_time()
        time.sleep(0.2)
        made.partition.resume_time()
        paused = tsc() - first
        return f"TSC {rate / 1e6:.0f} MHz while nothing runs, {paused / max(idle, 1):.0%} of that while paused", None


def deadline_timer(backend: Hypervisor) -> tuple[str, bool]:
    code = APIC_ON + apic(0x320, _VECTOR | 2 << 17) + RDTSC + bytes.fromhex("48 05 80 96 98 00")  # add rax, 10,000,000
    code += bytes.fromhex("48 89 c2 48 c1 ea 20 b9 e0 06 00 00 0f 30")  # mov rdx, rax; shr rdx, 32; wrmsr 0x6e0
    code += STI + HLT + STOP
    with guest(backend, code) as made:
        stop, late = made.run()
        fired = _VECTOR in made.values and not late
        return ("the TSC deadline timer fires" if fired else f"it does not fire ({stop.reason})"), fired


def second_processor(backend: Hypervisor) -> tuple[str, bool]:
    ipi = apic(0x310, 1 << 24) + apic(0x300, 0x4500) + apic(0x310, 1 << 24) + apic(0x300, 0x4600 | _AP >> 12)
    wait = b"\xf3\x90\xeb\xfc"  # pause; jmp
    with guest(backend, APIC_ON + ipi + wait, vcpus=2) as made:
        made.memory.write(_AP, bytes((0xB0, 0x77, 0xE6, _PORT_NOTE, 0xE6, _PORT_STOP, 0xF4)))  # mov al; out; out; hlt
        second = threading.Thread(target=made.vcpus[1].run, args=(made.bus,))
        second.start()
        _, late = made.run()
        made.vcpus[1].kick()
        second.join()
        up = 0x77 in made.values and not late
        return ("started by INIT and SIPI" if up else "did not start"), up


def saved_state(backend: Hypervisor) -> tuple[str, bool | None]:
    with guest(backend, STOP) as first, guest(backend, STOP) as second:
        if not first.partition.caps.save:
            return "cannot be saved", None
        first.run()
        blob = first.vcpu.save()
        second.vcpu.restore(blob)
        same = first.vcpu.get_registers() == second.vcpu.get_registers()
        return f"{len(blob)} bytes, {'the same registers' if same else 'other registers'} after restoring", same


QUESTIONS: Final[dict[str, Callable[[Hypervisor], tuple[str, bool | None]]]] = {
    "capabilities": capabilities,
    "speed": speed,
    "second partition": second_partition,
    "sticky kick": sticky_kick,
    "kick latency": kick_latency,
    "halt": halt,
    "halt for good": halt_for_good,
    "dirty log": dirty_log,
    "clock": clock,
    "deadline timer": deadline_timer,
    "second processor": second_processor,
    "saved state": saved_state,
}


def ask(backend: Hypervisor) -> list[Answer]:
    """Every question, a backend's own (its ``questions`` attribute) included. Raises BackendUnavailable."""
    backend.create_partition(PartitionConfig()).close()
    own: dict[str, Callable[[], tuple[str, bool | None]]] = getattr(backend, "questions", dict)()
    answers = []
    for name, question in [*((name, lambda q=q: q(backend)) for name, q in QUESTIONS.items()), *own.items()]:
        try:
            text, good = question()
        except MicroVMError as error:
            text, good = f"{type(error).__name__}: {error}", False
        except Exception as error:  # noqa: BLE001 - the report is to come out whatever happens
            text, good = f"{type(error).__name__}: {error}", False
        answers.append(Answer(name, text, good))
    return answers

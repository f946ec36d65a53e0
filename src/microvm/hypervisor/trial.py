"""The tiny guest a probe runs: proof that a backend executes code as a processor would, and how fast.

A device node that opens proves nothing. Some hosts offer KVM without hardware beneath it and interpret whatever the
guest's kernel does; there a SYSCALL from ring 3 may fault and CMPXCHG16B may not be known, and no distribution's
kernel gets far. So the guest counts in a supervisor-mode loop, writes a port many times, exchanges 16 bytes, drops
to ring 3 and comes back by SYSCALL.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from ..bus import Bus
from ..memory import GuestMemory
from .base import Hypervisor, PartitionConfig, Registers, Segment, StopReason, Table, Vcpu

TIME_LIMIT_S: Final = 2.0
LOOP_WARM_UP: Final = 500  # fills caches, and makes translations where the processor is itself emulated
LOOP_TURNS: Final = (2_000, 200_000, 5_000_000)  # tried in turn until one always takes LOOP_ENOUGH_S
LOOP_TRIES: Final = 3  # one slow run may be a busy host's doing, not the backend's: the best counts
LOOP_ENOUGH_S: Final = 0.001
PORT_WRITES: Final = 100

_MEMORY: Final = 2 << 20
_PML4, _PDPT, _PD, _GDT, _IDT, _TSS, _STUBS, _CODE, _STACK, _DATA = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x8000, 0xA000, 0xB000,
)  # fmt: skip
_PORT_COUNT: Final = 0xE0  # read: the next number of turns
_PORT_WRITE: Final = 0xE4  # written PORT_WRITES times
_PORT_STAGE: Final = 0xE8  # 1: the 16-byte exchange worked, 2: the SYSCALL arrived
_PORT_FAULT: Final = 0xEC  # an exception's vector
_EXCEPTIONS: Final = {0: "#DE", 1: "#DB", 3: "#BP", 6: "#UD", 8: "#DF", 13: "#GP", 14: "#PF"}

_SUPERVISOR_CODE: Final = bytes.fromhex(
    "e5 e0"  # next:  in eax, 0xe0
    "85 c0"  #        test eax, eax
    "74 08"  #        jz measured
    "89 c1"  #        mov ecx, eax
    "ff c9"  # loop:  dec ecx
    "75 fc"  #        jnz loop
    "eb f2"  #        jmp next
    "b9 64 00 00 00"  # measured: mov ecx, PORT_WRITES
    "e6 e4"  # write: out 0xe4, al
    "ff c9"  #        dec ecx
    "75 fa"  #        jnz write
    "bf 00 b0 00 00"  # mov edi, _DATA
    "f0 48 0f c7 0f"  # lock cmpxchg16b [rdi]
    "b0 01"  #        mov al, 1
    "e6 e8"  #        out 0xe8, al
    "b9 00 81 00 00"  # mov ecx, user
    "41 bb 02 00 00 00"  # mov r11d, 2
    "48 0f 07"  #     sysretq
)
_USER_CODE: Final = bytes.fromhex("0f 05")  # at _CODE + 0x100: syscall
_SYSCALL_CODE: Final = bytes.fromhex("b0 02 e6 e8 f4")  # at _CODE + 0x200: mov al, 2; out 0xe8, al; hlt


@dataclass(slots=True)
class Trial:
    """What happened. ``failure`` is one clause, empty if all went well."""

    mips: float = 0.0
    exits_per_second: float = 0.0
    stage: int = 0
    failure: str = ""


class _Device:
    """Answers the guest and holds the stopwatch."""

    def __init__(self, trial: Trial, vcpu: Vcpu) -> None:
        self._trial = trial
        self._vcpu = vcpu
        self._measuring = self._measure()
        self._running = False
        self._started = time.perf_counter()
        self._writes = 0

    def _measure(self) -> Generator[int, float, None]:
        """Yields a number of turns, is sent the seconds they took."""
        yield LOOP_WARM_UP
        for turns in LOOP_TURNS:
            for _ in range(LOOP_TRIES):
                took = max((yield turns), 1e-9)
                self._trial.mips = max(self._trial.mips, 2 * turns / took / 1e6)
                if took < LOOP_ENOUGH_S:
                    break
            else:
                return

    def pio_read(self, offset: int, size: int) -> int:
        took = time.perf_counter() - self._started
        try:
            turns = self._measuring.send(took) if self._running else next(self._measuring)
        except StopIteration:
            return 0
        self._running = True
        self._started = time.perf_counter()
        return turns

    def pio_write(self, offset: int, size: int, value: int) -> None:
        port = _PORT_COUNT + offset
        if port == _PORT_WRITE:
            self._writes += 1
            if self._writes == 1:
                self._started = time.perf_counter()
            elif self._writes == PORT_WRITES:
                self._trial.exits_per_second = (PORT_WRITES - 1) / max(time.perf_counter() - self._started, 1e-9)
        elif port == _PORT_STAGE:
            self._trial.stage = value
            if value == 2:
                self._vcpu.kick()
        elif port == _PORT_FAULT:
            name = _EXCEPTIONS.get(value, f"exception {value}")
            what = "SYSCALL from ring 3" if self._trial.stage else "supervisor code"
            self._trial.failure = f"{what} raises {name}"
            self._vcpu.kick()


def run_trial(hypervisor: Hypervisor) -> Trial:
    """Run the guest on a partition of its own. Raises what `Hypervisor.create_partition` raises."""
    trial = Trial()
    partition = hypervisor.create_partition(PartitionConfig(vcpus=1))
    memory = GuestMemory.allocate(_MEMORY)
    try:
        partition.map(0, memory.regions[0])
        vcpu = partition.create_vcpu(0)
        _load(memory)
        _set_up(vcpu)
        bus = Bus()
        bus.map_pio(_PORT_COUNT, 16, _Device(trial, vcpu))
        watchdog = threading.Timer(TIME_LIMIT_S, vcpu.kick)
        watchdog.daemon = True
        watchdog.start()
        try:
            stop = vcpu.run(bus)
        finally:
            watchdog.cancel()
            watchdog.join()
        if stop.reason == StopReason.CRASHED and not trial.failure:
            trial.failure = stop.detail
        elif trial.stage != 2 and not trial.failure:
            trial.failure = f"a test program did not end within {TIME_LIMIT_S:g} s"
    finally:
        partition.close()
        memory.close()
    return trial


def _load(memory: GuestMemory) -> None:
    memory.write(_PML4, struct.pack("<Q", _PDPT | 7))
    memory.write(_PDPT, struct.pack("<Q", _PD | 7))
    memory.write(_PD, struct.pack("<Q", 0x87))  # 2 MiB, present, writable, user
    # null, code 0 (8), data 0 (0x10), data 3 (0x18), code 3 (0x20), TSS (0x28)
    tss = 0x67 | (_TSS & 0xFF_FFFF) << 16 | 0x8B << 40
    gdt = (0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF, tss, 0)
    memory.write(_GDT, struct.pack("<7Q", *gdt))
    memory.write(_TSS, struct.pack("<IQ", 0, _STACK))
    for vector in range(32):
        # stub: mov al, vector; out 0xec, al; hlt
        stub = _STUBS + 8 * vector
        memory.write(stub, bytes((0xB0, vector, 0xE6, _PORT_FAULT, 0xF4)))
        memory.write(_IDT + 16 * vector, struct.pack("<HHBBHII", stub, 8, 0, 0x8E, 0, 0, 0))
    memory.write(_CODE, _SUPERVISOR_CODE)
    memory.write(_CODE + 0x100, _USER_CODE)
    memory.write(_CODE + 0x200, _SYSCALL_CODE)


def _set_up(vcpu: Vcpu) -> None:
    """Long mode, ring 0, SYSCALL on."""
    data = Segment(0x10, 0, 0xFFFF_FFFF, 0xC093)
    registers = Registers(
        rip=_CODE,
        rsp=_STACK,
        cs=Segment(8, 0, 0xFFFF_FFFF, 0xA09B),
        ds=data,
        es=data,
        ss=data,
        fs=data,
        gs=data,
        tr=Segment(0x28, _TSS, 0x67, 0x8B),
        ldtr=Segment(0, 0, 0xFFFF, 0),
        gdtr=Table(_GDT, 55),
        idtr=Table(_IDT, 16 * 32 - 1),
        cr0=0x8005_0033,
        cr3=_PML4,
        cr4=0x620,
        efer=0xD01,
    )
    vcpu.set_registers(registers)
    vcpu.set_msr(0xC000_0081, 0x10 << 48 | 8 << 32)  # STAR
    vcpu.set_msr(0xC000_0082, _CODE + 0x200)  # LSTAR
    vcpu.set_msr(0xC000_0084, 0x200)  # SFMASK: interrupts off

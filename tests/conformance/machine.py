"""The bench on which the tiny guests run: one partition, its memory, and devices that note everything."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from microvm.bus import Bus
from microvm.hypervisor.base import (
    Hypervisor,
    PartitionConfig,
    Registers,
    Segment,
    StopReason,
    Table,
    Vcpu,
    VcpuStop,
)
from microvm.memory import GuestMemory

from .asm import LAPIC as LAPIC
from .asm import PORT_STOP, Code

MEMORY = 4 << 20
PML4, PDPT, PD, DEVICE_PD, GDT, IDT, TSS, IST_STACK, STACK, STUBS = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x1_8000, 0x1_6000, 0x1_0000,
)  # fmt: skip
CODE = 0x8000
DATA = 0x20_0000

PORT_LOG = 0x300  # 16 ports: writes are noted, reads answered from `Machine.answers`
PORT_FAULT = 0x330  # exception stubs write the vector here
MMIO = 0xD000_0000
TIME_LIMIT_S = 20.0

CODE0, DATA0, DATA3, CODE3, TSS_SELECTOR, CODE32 = 0x08, 0x10, 0x18, 0x20, 0x28, 0x38

REAL_DATA = Segment(0, 0, 0xFFFF, 0x93)
FLAT_DATA = Segment(DATA0, 0, 0xFFFF_FFFF, 0xC093)
USER_DATA = Segment(DATA3 | 3, 0, 0xFFFF_FFFF, 0xC0F3)


class Log:
    """Ports PORT_LOG on: notes writes as (port, size, value)."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, int, int]] = []
        self.answer: Callable[[int, int], int] = lambda offset, size: 0
        self.on_write: Callable[[int, int, int], None] | None = None

    def pio_read(self, offset: int, size: int) -> int:
        return self.answer(offset, size)

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        if self.on_write is not None:
            self.on_write(offset, size, value)

    @property
    def values(self) -> list[int]:
        return [value for _, _, value in self.writes]


class Window:
    """MMIO: notes accesses as (offset, size, value)."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int, int]] = []
        self.answer: Callable[[int, int], int] = lambda offset, size: 0

    def mmio_read(self, offset: int, size: int) -> int:
        self.reads.append((offset, size))
        return self.answer(offset, size)

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))

    def written_bytes(self) -> dict[int, int]:
        """Every byte written, by offset: whatever pieces the backend made of it."""
        found: dict[int, int] = {}
        for offset, size, value in self.writes:
            for i in range(size):
                found[offset + i] = value >> 8 * i & 0xFF
        return found


class _Stop:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def pio_read(self, offset: int, size: int) -> int:
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self._machine.stops.append(value)
        self._machine.vcpu.kick()


class _Fault:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def pio_read(self, offset: int, size: int) -> int:
        return 0

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self._machine.faults.append(value)
        if value not in self._machine.expected_faults:
            for vcpu in self._machine.vcpus:
                vcpu.kick()


class Machine:
    """One partition under test. A context manager."""

    def __init__(self, backend: Hypervisor, vcpus: int = 1, memory: int = MEMORY, track_dirty: bool = False) -> None:
        self.backend = backend
        self.partition = backend.create_partition(PartitionConfig(vcpus=vcpus))
        self.memory = GuestMemory.allocate(memory)
        self.bus = Bus()
        self.log = Log()
        self.window = Window()
        self.stops: list[int] = []
        self.faults: list[int] = []
        self.expected_faults: frozenset[int] = frozenset()
        self.bus.map_pio(PORT_LOG, 16, self.log)
        self.bus.map_pio(PORT_STOP, 4, _Stop(self))
        self.bus.map_pio(PORT_FAULT, 4, _Fault(self))
        self.bus.map_mmio(MMIO, 0x2000, self.window)
        try:
            for region in self.memory:
                self.partition.map(region.gpa, region, track_dirty=track_dirty)
            self.vcpus = [self.partition.create_vcpu(index) for index in range(vcpus)]
        except BaseException:
            self.close()
            raise
        if self.partition.caps.host_writes:
            self.memory.observe(self.partition.host_wrote)

    @property
    def vcpu(self) -> Vcpu:
        return self.vcpus[0]

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.partition.close()
        self.memory.close()

    # Modes

    def real(self, code: Code) -> Registers:
        """Real mode at ``code``'s origin, segments at 0."""
        self.memory.write(code.origin, code.build())
        return self._registers(
            rip=code.origin, rsp=0x7000, cs=Segment(0, 0, 0xFFFF, 0x9B), ds=REAL_DATA, es=REAL_DATA, ss=REAL_DATA,
            fs=REAL_DATA, gs=REAL_DATA,
        )  # fmt: skip

    def protected(self, code: Code) -> Registers:
        """Protected mode without paging, flat segments."""
        self.memory.write(code.origin, code.build())
        self.tables()
        return self._registers(
            rip=code.origin, rsp=STACK, cr0=0x11, cs=Segment(CODE32, 0, 0xFFFF_FFFF, 0xC09B), ds=FLAT_DATA,
            es=FLAT_DATA, ss=FLAT_DATA, fs=FLAT_DATA, gs=FLAT_DATA, gdtr=Table(GDT, 63),
            tr=Segment(TSS_SELECTOR, TSS, 0x67, 0x8B), ldtr=Segment(0, 0, 0, 0),
        )  # fmt: skip

    def long(self, code: Code, ring: int = 0) -> Registers:
        """64-bit mode, identity-mapped, an IDT whose stubs report every exception."""
        self.memory.write(code.origin, code.build())
        self.tables()
        data = USER_DATA if ring else FLAT_DATA
        cs = Segment(CODE3 | 3, 0, 0xFFFF_FFFF, 0xA0FB) if ring else Segment(CODE0, 0, 0xFFFF_FFFF, 0xA09B)
        return self._registers(
            rip=code.origin, rsp=STACK, cr0=0x8005_0033, cr3=PML4, cr4=0x620, efer=0xD01, cs=cs, ds=data, es=data,
            ss=data, fs=data, gs=data, gdtr=Table(GDT, 63), idtr=Table(IDT, 16 * 256 - 1),
            tr=Segment(TSS_SELECTOR, TSS, 0x67, 0x8B), ldtr=Segment(0, 0, 0, 0),
        )  # fmt: skip

    def _registers(self, **values: Any) -> Registers:
        return Registers(**values)

    def tables(self) -> None:
        """Page tables (the first GiB and, uncached, the fourth; 2 MiB pages, user), GDT, TSS and IDT."""
        write = self.memory.write
        write(PML4, struct.pack("<Q", PDPT | 7))
        write(PDPT, struct.pack("<4Q", PD | 7, 0, 0, DEVICE_PD | 7))
        write(DEVICE_PD, b"".join(struct.pack("<Q", 3 << 30 | i << 21 | 0x9F) for i in range(512)))
        write(PD, b"".join(struct.pack("<Q", i << 21 | 0x87) for i in range(512)))
        tss = 0x67 | (TSS & 0xFF_FFFF) << 16 | 0x8B << 40
        gdt = (
            0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_F300_0000_FFFF, 0x00AF_FB00_0000_FFFF, tss, 0,
            0x00CF_9B00_0000_FFFF,
        )  # fmt: skip
        write(GDT, struct.pack("<8Q", *gdt))
        # rsp0, IST1, and no I/O permission bitmap: its offset is the limit's end
        write(TSS, struct.pack("<I3Q8xQ58xH", 0, STACK, 0, 0, IST_STACK, 0x68))
        for vector in range(32):
            stub = STUBS + 16 * vector
            # mov al, vector; mov dx, PORT_FAULT; out dx, al; hlt
            write(stub, Code(64, stub).mov("al", vector).out(PORT_FAULT).hlt().build())
            self.gate(vector, stub)

    def gate(self, vector: int, handler: int, ist: int = 0, dpl: int = 0) -> None:
        """Point the IDT at ``handler``. Call after `long`."""
        entry = struct.pack("<HHBBHII", handler & 0xFFFF, CODE0, ist, 0x8E | dpl << 5, handler >> 16 & 0xFFFF, 0, 0)
        self.memory.write(IDT + 16 * vector, entry)

    def handler(self, vector: int, code: Code, ist: int = 0, dpl: int = 0) -> None:
        """Place a handler and point the IDT at it. Call after `long`."""
        self.memory.write(code.origin, code.build())
        self.gate(vector, code.origin, ist, dpl)

    # Running

    def go(self, registers: Registers | None = None, vcpu: Vcpu | None = None) -> VcpuStop:
        """Run on this thread until a stop; after TIME_LIMIT_S the vCPU is kicked and the test fails."""
        vcpu = vcpu or self.vcpu
        if registers is not None:
            vcpu.set_registers(registers)
        late: list[bool] = []

        def time_out() -> None:
            late.append(True)
            vcpu.kick()

        watchdog = threading.Timer(TIME_LIMIT_S, time_out)
        watchdog.daemon = True
        watchdog.start()
        try:
            stop = vcpu.run(self.bus)
        finally:
            watchdog.cancel()
            watchdog.join()
        assert not late, f"the guest did not end; rip {vcpu.get_registers().rip:#x}"
        return stop

    def spawn(self, index: int, registers: Registers | None = None) -> Running:
        """Run a vCPU on a thread of its own."""
        return Running(self, self.vcpus[index], registers)

    def unless(self, condition: bool, reason: str) -> None:
        """Where ``condition`` does not hold, this host withholds something: see `conftest.gap`."""
        if not condition:
            from .conftest import gap

            gap(self.backend, reason)

    def resume(self) -> int:
        """Go on behind the last `Code.stop`."""
        registers = self.vcpu.get_registers()
        registers.rip += 2  # its jmp $
        return self.finish(registers)

    def finish(self, registers: Registers | None = None) -> int:
        """Run until the guest writes PORT_STOP; returns what it wrote. Fails on an unexpected exception."""
        before = len(self.stops)
        stop = self.go(registers)
        skip_if_not_emulated(self.backend, stop)
        assert stop.reason == StopReason.KICKED, stop
        unexpected = [vector for vector in self.faults if vector not in self.expected_faults]
        assert not unexpected, f"exception {unexpected} at rip {self.vcpu.get_registers().rip:#x}"
        assert len(self.stops) == before + 1
        return self.stops[-1]


def skip_if_not_emulated(backend: Hypervisor, stop: VcpuStop) -> None:
    """An instruction that a host without hardware beneath its KVM cannot interpret is that host's gap, not ours."""
    if stop.reason == StopReason.CRASHED and "could not emulate" in stop.detail:
        from .conftest import gap

        gap(backend, f"{stop.detail}")


class Running:
    """A vCPU on its own thread."""

    def __init__(self, machine: Machine, vcpu: Vcpu, registers: Registers | None) -> None:
        self.vcpu = vcpu
        self.stop: VcpuStop | None = None
        self.error: BaseException | None = None

        def body() -> None:
            try:
                self.stop = machine.go(registers, vcpu)
            except BaseException as error:  # noqa: BLE001 - raised again by join
                self.error = error

        self._thread = threading.Thread(target=body, name=f"vcpu {vcpu.index}")
        self._thread.start()

    def join(self, kick: bool = False) -> VcpuStop:
        """Wait for its stop, after a kick if asked."""
        if kick:
            self.vcpu.kick()
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.stop is not None
        return self.stop

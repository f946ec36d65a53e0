"""The contract between the machine and whatever executes guest instructions.

A `Hypervisor` makes `Partition`s (Hyper-V's word for the VM as the hypervisor knows it), a partition makes `Vcpu`s,
and a vCPU runs. Exits, the hardware's returns, are served inside `Vcpu.run`: port and memory-mapped I/O goes into the
`Bus`, and only a cold reason comes out. Who advances RIP after an exit, who decodes an MMIO instruction and where
the local APIC lives stay inside the backend. Every backend has the local APICs in itself; the one I/O APIC is ours
(`devices/ioapic.py`) and reaches them through `Partition.signal_msi`.

Threads: the machine gives each vCPU a thread that calls `run` again and again. A bus handler runs on one of these
threads, not always on that of the vCPU whose exit it serves. `kick`, `signal_msi` and the doorbell
events may come from any thread. Everything else is called while no vCPU of the partition runs, unless it says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol

from .._os.event import Event
from ..bus import Bus
from ..memory import MemoryRegion


class Perm:
    """Access rights of a mapping, to be ORed."""

    READ: Final = 1
    WRITE: Final = 2
    EXEC: Final = 4
    RWX: Final = 7


@dataclass(frozen=True, slots=True)
class Availability:
    """What probing a backend found.

    ``reason`` is one sentence either way; ``hint`` says what to enable when not usable. ``mips`` is the measured
    speed of a supervisor-mode loop in million instructions a second, ``exits_per_second`` that of port writes; both
    are 0.0 where not measured.
    """

    name: str
    usable: bool
    reason: str
    hint: str = ""
    accelerated: bool = False
    mips: float = 0.0
    exits_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class PartitionConfig:
    """What a partition is made with. ``vcpus`` is the number that will be created, APIC ids 0 to vcpus-1."""

    vcpus: int = 1


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this partition can do beyond the minimum.

    ``doorbells``: `Partition.doorbell` works. ``dirty_log``: `Partition.dirty` works. ``save``: state can be saved.
    ``pio_latch``: `Partition.latch_pio` works. ``irqfd``: `Partition.route_irq` works. ``max_vcpus`` is the limit.
    ``fork``: the process may fork while no vCPU runs; the child has a partition of its own then, with doorbells to be
    connected anew. ``host_writes``: `Partition.host_wrote` must be told of every write the host makes to guest memory.
    """

    max_vcpus: int
    doorbells: bool = False
    dirty_log: bool = False
    save: bool = False
    pio_latch: bool = False
    irqfd: bool = False
    host_writes: bool = False
    fork: bool = False


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part.

    ``attributes`` has the layout of Hyper-V's WHV_X64_SEGMENT_REGISTER: bits 0-3 type, 4 S (not system), 5-6 DPL,
    7 present, 12 AVL, 13 L, 14 D/B, 15 G. [SDM] 3A 3.4.5. ``limit`` is in bytes, already scaled by G.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    attributes: int = 0x93


@dataclass(slots=True)
class Table:
    """GDTR or IDTR. ``limit`` is the last valid byte offset."""

    base: int = 0
    limit: int = 0xFFFF


@dataclass(slots=True)
class Registers:
    """The registers every backend has; as constructed, those of a vCPU after reset. [SDM] 3A 10.1.1."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0xFFF0
    rflags: int = 2
    es: Segment = field(default_factory=Segment)
    cs: Segment = field(default_factory=lambda: Segment(0xF000, 0xFFFF_0000, 0xFFFF, 0x9B))
    ss: Segment = field(default_factory=Segment)
    ds: Segment = field(default_factory=Segment)
    fs: Segment = field(default_factory=Segment)
    gs: Segment = field(default_factory=Segment)
    ldtr: Segment = field(default_factory=lambda: Segment(attributes=0x82))
    tr: Segment = field(default_factory=lambda: Segment(attributes=0x8B))
    gdtr: Table = field(default_factory=Table)
    idtr: Table = field(default_factory=Table)
    cr0: int = 0x6000_0010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0


class StopReason:
    """Why `Vcpu.run` returned."""

    KICKED: Final = "kicked"
    HALTED: Final = "halted"
    POWERED_OFF: Final = "powered off"
    CRASHED: Final = "crashed"


@dataclass(frozen=True, slots=True)
class VcpuStop:
    """`Vcpu.run` returned.

    KICKED: `kick` was called; run again to go on. HALTED: HLT with interrupts off, nothing but an NMI or INIT could
    wake it. POWERED_OFF: the guest asked the hypervisor itself to stop. CRASHED: a triple fault, or an instruction
    the backend cannot carry out; ``detail`` is one sentence, ``registers`` the state if it could be read.
    """

    reason: str
    detail: str = ""
    registers: Registers | None = None

    @property
    def triple_fault(self) -> bool:
        """Whether a PC would have reset here. [SDM] 3A 6.15, double fault."""
        return self.reason == StopReason.CRASHED and self.detail == TRIPLE_FAULT


TRIPLE_FAULT: Final = "triple fault"
STOP_KICKED: Final = VcpuStop(StopReason.KICKED)
STOP_HALTED: Final = VcpuStop(StopReason.HALTED)


class Vcpu(Protocol):
    """One virtual processor. `run` is called on its own thread; `kick` from anywhere."""

    index: int

    def run(self, bus: Bus) -> VcpuStop:
        """Execute until a cold reason. An exception from a bus handler stops the vCPU and is raised here.

        vCPU 0 starts with the registers it was given; the others wait for INIT and SIPI. The wait counts as running:
        `run` blocks, and returns when kicked. HLT with interrupts enabled blocks too, without using the processor.
        """

    def kick(self) -> None:
        """Make `run` return KICKED. Sticky: if it is not running, its next `run` returns at once. Any thread."""

    def get_registers(self) -> Registers: ...

    def set_registers(self, registers: Registers) -> None:
        """Raises HostError where a processor cannot be in that state. A vCPU in HLT goes on from the new RIP."""

    def get_msr(self, index: int) -> int:
        """Read a model-specific register. Raises KeyError if the backend does not have it."""

    def set_msr(self, index: int, value: int) -> None:
        """Write a model-specific register. Raises KeyError if the backend does not have it."""

    def get_xsave(self) -> bytes:
        """FPU, SSE and AVX state in the standard (not compacted) XSAVE format. [SDM] 1 13.4."""

    def set_xsave(self, state: bytes) -> None: ...

    def translate(self, gva: int) -> int | None:
        """The guest-physical address ``gva`` maps to under the present CR3 and mode, or None. No side effects."""

    def save(self) -> bytes:
        """All of this vCPU's state, APIC and pending events included, as an opaque blob tagged with the backend."""

    def restore(self, blob: bytes) -> None:
        """Put a saved state in place. Raises SnapshotError if it is not this backend's."""


class Partition(Protocol):
    """The VM as the hypervisor knows it: an address space, local APICs, time and vCPUs."""

    caps: Capabilities

    def map(self, gpa: int, region: MemoryRegion, perms: int = Perm.RWX, track_dirty: bool = False) -> None:
        """Show ``region`` to the guest at ``gpa``. Writes to a mapping without WRITE exit as MMIO.

        Raises ConfigError on overlap, HostError if the host refuses.
        """

    def unmap(self, gpa: int, size: int) -> None:
        """Remove a mapping made with exactly this address and size. Raises ConfigError if there is none."""

    def dirty(self, gpa: int, size: int) -> bytes:
        """A bitmap, one bit a 4 KiB page, least significant first, of pages the guest wrote since last asked.

        Reads and clears. ``gpa`` and ``size`` are those of a mapping made with ``track_dirty``. Host writes are not
        in it (`GuestMemory.observe`).
        """

    def host_wrote(self, gpa: int, size: int) -> None:
        """The host changed guest memory (`GuestMemory.observe`): code translated from it is stale. Any thread.

        Called before the guest is told of the change. Does nothing where the processor is real.
        """

    def signal_msi(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt. Any thread. Vectors below 16 are dropped."""

    def doorbell(self, gpa: int, size: int, value: int, event: Event) -> bool:
        """Turn guest writes of ``value`` (``size`` bytes at ``gpa``) into ``event.set()`` without entering Python.

        Asked again for the same write, the new event replaces the old one. Returns False where the backend cannot; the
        write then reaches the bus as ever, so the MMIO path must do the same work.
        """

    def latch_pio(self, port: int, value: int | None) -> bool:
        """Answer one-byte reads of ``port`` with ``value`` without an exit to the bus; None takes it back.

        A hint for status registers that are polled. Returns False where unsupported. Any thread.
        """

    def route_irq(self, gsi: int, address: int, data: int) -> Event | None:
        """An event that, when set, delivers this message without entering Python, or None where unsupported.

        Calling again for the same ``gsi`` changes the route and returns the same event. Any thread.
        """

    def time(self) -> int:
        """Guest time in nanoseconds since the partition was made; stands still while paused."""

    def pause_time(self) -> None:
        """Stop guest time (TSC, paravirtual clock, APIC timers). No vCPU may be running."""

    def resume_time(self) -> None:
        """Let guest time go on from where it stood."""

    def create_vcpu(self, index: int) -> Vcpu:
        """Make vCPU ``index`` (its APIC id). Each is made once. Raises ConfigError, HostError."""

    def save(self) -> bytes:
        """Partition-wide state (clock) as an opaque blob; vCPUs are saved each for itself."""

    def restore(self, blob: bytes) -> None: ...

    def close(self) -> None:
        """Free everything. No vCPU may be running. Idempotent."""


class Hypervisor(Protocol):
    """A backend."""

    name: str

    def probe(self) -> Availability:
        """Whether it works here, found by running a tiny guest, and how fast. Takes well under a second."""

    def create_partition(self, config: PartitionConfig) -> Partition:
        """Make an empty partition. Raises BackendUnavailable with a hint, ConfigError."""

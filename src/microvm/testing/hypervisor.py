"""A hypervisor whose guests are Python: machines can be tested without a processor.

A guest is a function that is called with the vCPU on its thread. It reaches devices through ``vcpu.bus``, calls
``vcpu.idle`` where a processor would halt, and what it returns is the vCPU's stop.
"""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable
from typing import Final

from .._os.event import Event
from ..bus import Bus
from ..hypervisor.base import (
    STOP_KICKED,
    Availability,
    Capabilities,
    Partition,
    PartitionConfig,
    Perm,
    Registers,
    Vcpu,
    VcpuStop,
)
from ..memory import MemoryRegion

TEXT_GPA: Final = 0x10_0000


class Kicked(Exception):
    """Raised out of `FakeVcpu.idle` to unwind a guest that is kicked; its next run starts it anew."""


Guest = Callable[["FakeVcpu"], VcpuStop]


def wait_forever(vcpu: FakeVcpu) -> VcpuStop:
    """The guest that does nothing."""
    while True:
        vcpu.idle()


class FakeVcpu:
    """Runs a Python guest. ``index`` tells the guest which one it is."""

    def __init__(self, index: int, guest: Guest) -> None:
        self.index = index
        self.bus = Bus()
        self.exits = 0
        self._guest = guest
        self._kicked = threading.Event()
        self._registers = Registers()

    def idle(self) -> None:
        """Wait for a kick and leave the guest."""
        self._kicked.wait()
        raise Kicked

    def run(self, bus: Bus) -> VcpuStop:
        self.bus = bus
        self.exits += 1
        if self._kicked.is_set():
            self._kicked.clear()
            return STOP_KICKED
        try:
            return self._guest(self)
        except Kicked:
            self._kicked.clear()
            return STOP_KICKED

    def kick(self) -> None:
        self._kicked.set()

    def get_registers(self) -> Registers:
        return self._registers

    def set_registers(self, registers: Registers) -> None:
        self._registers = registers

    def get_msr(self, index: int) -> int:
        raise KeyError(index)

    def set_msr(self, index: int, value: int) -> None:
        raise KeyError(index)

    def get_xsave(self) -> bytes:
        return bytes(576)

    def set_xsave(self, state: bytes) -> None:
        pass

    def translate(self, gva: int) -> int | None:
        return gva

    def save(self) -> bytes:
        return b""

    def restore(self, blob: bytes) -> None:
        pass


class FakePartition:
    """Remembers what it was told. ``time`` is the host's, less the time it was paused."""

    def __init__(self, config: PartitionConfig, guest: Guest, doorbells: bool) -> None:
        self.caps = Capabilities(max_vcpus=32, doorbells=doorbells)
        self.doorbells: dict[tuple[int, int], Event] = {}
        self.mapped: list[tuple[int, int]] = []
        self.messages: list[tuple[int, int]] = []
        self.closed = False
        self._guest = guest
        self._vcpus = config.vcpus
        self._paused_at: int | None = None
        self._offset = time.monotonic_ns()

    def map(self, gpa: int, region: MemoryRegion, perms: int = Perm.RWX, track_dirty: bool = False) -> None:
        self.mapped.append((gpa, region.size))

    def unmap(self, gpa: int, size: int) -> None:
        self.mapped.remove((gpa, size))

    def dirty(self, gpa: int, size: int) -> bytes:
        return bytes(size >> 15)

    def host_wrote(self, gpa: int, size: int) -> None:
        pass

    def signal_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def doorbell(self, gpa: int, size: int, value: int, event: Event) -> bool:
        if self.caps.doorbells:
            self.doorbells[gpa, value] = event
        return self.caps.doorbells

    def latch_pio(self, port: int, value: int | None) -> bool:
        return False

    def route_irq(self, gsi: int, address: int, data: int) -> Event | None:
        return None

    def time(self) -> int:
        return (self._paused_at or time.monotonic_ns()) - self._offset

    def pause_time(self) -> None:
        if self._paused_at is None:
            self._paused_at = time.monotonic_ns()

    def resume_time(self) -> None:
        if self._paused_at is not None:
            self._offset += time.monotonic_ns() - self._paused_at
            self._paused_at = None

    def create_vcpu(self, index: int) -> Vcpu:
        return FakeVcpu(index, self._guest)

    def save(self) -> bytes:
        return b""

    def restore(self, blob: bytes) -> None:
        pass

    def close(self) -> None:
        self.closed = True


class FakeHypervisor:
    """Makes partitions that run ``guest`` on every vCPU. The last one made is ``partition``."""

    name = "fake"

    def __init__(self, guest: Guest = wait_forever, doorbells: bool = False) -> None:
        self.partition: FakePartition | None = None
        self._guest = guest
        self._doorbells = doorbells

    def probe(self) -> Availability:
        return Availability(self.name, True, "made of Python")

    def create_partition(self, config: PartitionConfig) -> Partition:
        self.partition = FakePartition(config, self._guest, self._doorbells)
        return self.partition


def tiny_kernel(code: bytes = b"\xf4") -> bytes:
    """An ELF file with a PVH note whose entry is ``code``, loaded at 1 MiB."""
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", TEXT_GPA)
    data = 64 + 2 * 56
    header = struct.pack("<4sBBBBB7xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 0, 2, 62, 1, TEXT_GPA, 64, 0, 0, 64, 56, 2,
                         64, 0, 0)  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, data + len(note), TEXT_GPA, TEXT_GPA, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, data, 0, 0, len(note), len(note), 4)
    return header + load + notes + note + code

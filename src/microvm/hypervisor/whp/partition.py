"""A Hyper-V partition made by an ordinary program: memory, interrupts, time and virtual processors.

The local APICs are the hypervisor's (XApic mode), the I/O APIC is ours and reaches them by WHvRequestInterrupt. The
order of calls is the one all programs share: capability, create, properties, set-up, then processors and memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from ..._os.event import Event
from ...errors import BackendUnavailable, ConfigError, SnapshotError, StateError
from ...memory import MemoryRegion
from ..base import Capabilities, PartitionConfig, Perm
from . import abi, codes, features, flags, registers
from .api import Api
from .vcpu import WhpVcpu

MAX_VCPUS: Final = 32
PAGE: Final = 4096
MIN_VECTOR: Final = 16  # below, the hypervisor answers 0xC0350005
_TAG: Final = b"whp-p1\0\0"
_SAVED: Final = struct.Struct("<8sQ")
# MSI delivery modes that have a WHvRequestInterrupt type of the same number. [SDM] 3A 11.11.2
_FIXED, _LOWEST, _NMI, _INIT = 0, 1, 4, 5
_LEVEL: Final = 1 << 15


@dataclass(slots=True)
class _Mapping:
    gpa: int
    size: int
    region: MemoryRegion
    writable: bool
    track_dirty: bool
    touched: set[int] = field(default_factory=set)  # pages that we wrote for the guest, which the hypervisor missed


class WhpPartition:
    """See `base.Partition`. ``refused`` names the properties that this Windows does not have."""

    def __init__(self, api: Api, config: PartitionConfig) -> None:
        if not 1 <= config.vcpus <= MAX_VCPUS:
            raise ConfigError("vcpus", config.vcpus, f"1 to {MAX_VCPUS}")
        if not api.has("WHvRequestInterrupt"):
            raise BackendUnavailable(
                "GetProcAddress", 127, "this Windows cannot interrupt a guest", "update to Windows 10 1809 or later"
            )
        self.api = api
        self.handle = 0
        self._config = config
        self._mappings: list[_Mapping] = []
        self._vcpus: dict[int, WhpVcpu] = {}
        self._lock = threading.Lock()
        self._offset = -time.monotonic_ns()  # guest time = host monotonic + this
        self._paused_at: int | None = None
        self._stopped_clocks: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        self.dropped_interrupts = 0
        self.known_registers: dict[int, bool] = {}  # found by `state.has_register`
        possible = flags.WHV_CAPABILITY_FEATURES()
        features.capability(api, codes.WHvCapabilityCodeFeatures, possible)
        if not possible.LocalApicEmulation:
            raise BackendUnavailable(
                "WHvGetCapability",
                0,
                "this Windows does not emulate the local APIC",
                "update to Windows 10 1809 or later",
            )
        self._tracks_dirty = bool(possible.DirtyPageTracking) and api.has("WHvQueryGpaRangeDirtyBitmap")
        handle = ctypes.c_void_p()
        api.call("WHvCreatePartition", ctypes.byref(handle))
        self.handle = handle.value or 0
        try:
            self.refused = features.configure(api, self.handle, config.vcpus)
            api.call("WHvSetupPartition", self.handle)
        except BaseException:
            api.attempt("WHvDeletePartition", self.handle)
            self.handle = 0
            raise
        self.caps = Capabilities(
            max_vcpus=MAX_VCPUS,
            dirty_log=self._tracks_dirty,
            save=True,
            host_writes=api.on_host_write is not None,
        )

    def _open(self) -> int:
        if not self.handle:
            raise StateError("the partition is closed")
        return self.handle

    # Memory

    def map(self, gpa: int, region: MemoryRegion, perms: int = Perm.RWX, track_dirty: bool = False) -> None:
        handle = self._open()
        if gpa < 0 or gpa % PAGE or gpa + region.size > 1 << 52:
            raise ConfigError("mapping", hex(gpa), "a page-aligned guest-physical address below 2**52")
        for other in self._mappings:
            if gpa < other.gpa + other.size and other.gpa < gpa + region.size:
                raise ConfigError("mapping", hex(gpa), f"overlaps the mapping at {other.gpa:#x}")
        access = perms & Perm.RWX  # READ, WRITE and EXEC have WHP's numbers
        if track_dirty:
            if not self._tracks_dirty:
                raise ConfigError("mapping", hex(gpa), "this Windows does not track dirty pages")
            access |= codes.WHvMapGpaRangeFlagTrackDirtyPages
        self.api.call("WHvMapGpaRange", handle, region.hva, gpa, region.size, access)
        self._mappings.append(_Mapping(gpa, region.size, region, bool(perms & Perm.WRITE), track_dirty))

    def unmap(self, gpa: int, size: int) -> None:
        mapping = self._mapping(gpa, size)
        self.api.call("WHvUnmapGpaRange", self._open(), gpa, size)
        self._mappings.remove(mapping)

    def _mapping(self, gpa: int, size: int) -> _Mapping:
        for mapping in self._mappings:
            if mapping.gpa == gpa and mapping.size == size:
                return mapping
        raise ConfigError("mapping", hex(gpa), f"nothing of {size:#x} bytes is mapped there")

    def dirty(self, gpa: int, size: int) -> bytes:
        mapping = self._mapping(gpa, size)
        if not mapping.track_dirty:
            raise ConfigError("mapping", hex(gpa), "was not made with track_dirty")
        pages = size // PAGE
        words = (ctypes.c_uint64 * ((pages + 63) // 64))()
        self.api.call("WHvQueryGpaRangeDirtyBitmap", self._open(), gpa, size, words, ctypes.sizeof(words))
        bitmap = bytearray(bytes(words)[: (pages + 7) // 8])
        while mapping.touched:
            page = mapping.touched.pop()
            bitmap[page >> 3] |= 1 << (page & 7)
        return bytes(bitmap)

    def memory_at(self, gpa: int, size: int) -> memoryview | None:
        """``size`` bytes of guest memory that an instruction we carry out reads, or None where a device is."""
        for mapping in self._mappings:
            if mapping.gpa <= gpa and gpa + size <= mapping.gpa + mapping.size:
                at = gpa - mapping.gpa
                return mapping.region.view[at : at + size]
        return None

    def write_memory(self, gpa: int, data: bytes) -> bool:
        """Write for the guest, inside one page. Returns False where there is no writable memory."""
        for mapping in self._mappings:
            if mapping.gpa <= gpa and gpa + len(data) <= mapping.gpa + mapping.size:
                if not mapping.writable:
                    return False
                at = gpa - mapping.gpa
                mapping.region.view[at : at + len(data)] = data
                if mapping.track_dirty:
                    mapping.touched.add(at // PAGE)
                self.host_wrote(gpa, len(data))
                return True
        return False

    def host_wrote(self, gpa: int, size: int) -> None:
        if self.api.on_host_write is not None and self.handle:
            self.api.on_host_write(self.handle, gpa, size)

    # Interrupts

    def signal_msi(self, address: int, data: int) -> None:
        """See `base.Partition.signal_msi`. A message that no APIC can take is counted and dropped."""
        mode = data >> 8 & 7
        vector = data & 0xFF
        if mode not in (_FIXED, _LOWEST, _NMI, _INIT) or (mode in (_FIXED, _LOWEST) and vector < MIN_VECTOR):
            self.dropped_interrupts += 1
            return
        control = abi.WHV_INTERRUPT_CONTROL(
            Type=mode,
            DestinationMode=address >> 2 & 1,
            TriggerMode=int(bool(data & _LEVEL)),
            Destination=address >> 12 & 0xFF,
            Vector=vector,
        )
        with self._lock:  # `close` must not free the partition under us
            if not self.handle:
                return
            result = self.api.attempt(
                "WHvRequestInterrupt", self.handle, ctypes.byref(control), ctypes.sizeof(control)
            )  # fmt: skip
        if result:
            self.dropped_interrupts += 1
        for vcpu in self._vcpus.values():
            vcpu.wake()

    def doorbell(self, gpa: int, size: int, value: int, event: Event) -> bool:
        """Never: WHP wants a kernel event object, and an `Event` here is what a selector can wait for, a socket."""
        return False

    def latch_pio(self, port: int, value: int | None) -> bool:
        """WHP has no such thing."""
        return False

    def route_irq(self, gsi: int, address: int, data: int) -> Event | None:
        """WHP has no such thing."""
        return None

    # Time

    def time(self) -> int:
        self._open()
        return self._paused_at if self._paused_at is not None else time.monotonic_ns() + self._offset

    def pause_time(self) -> None:
        """See `base.Partition.pause_time`. Where Windows cannot stop time, the TSCs are set back afterwards."""
        handle = self._open()
        if self._paused_at is not None:
            return
        if self.api.has("WHvSuspendPartitionTime"):
            self.api.call("WHvSuspendPartitionTime", handle)
        else:
            self._stopped_clocks = {vcpu.index: vcpu.clocks() for vcpu in self._vcpus.values()}
        self._paused_at = time.monotonic_ns() + self._offset

    def resume_time(self) -> None:
        handle = self._open()
        if self._paused_at is None:
            return
        self._offset = self._paused_at - time.monotonic_ns()
        self._paused_at = None
        if self.api.has("WHvResumePartitionTime"):
            self.api.call("WHvResumePartitionTime", handle)
        for index, clocks in self._stopped_clocks.items():
            registers.put(self.api, handle, index, clocks)
        self._stopped_clocks = {}

    def clocks_restored(self, index: int, clocks: list[tuple[int, tuple[int, int]]]) -> None:
        """A restored vCPU's clocks replace those that `resume_time` would set."""
        if index in self._stopped_clocks:
            self._stopped_clocks[index] = clocks

    # Processors and state

    def create_vcpu(self, index: int) -> WhpVcpu:
        handle = self._open()
        if not 0 <= index < self._config.vcpus or index in self._vcpus:
            raise ConfigError("vcpu", index, f"each of 0 to {self._config.vcpus - 1} once")
        self.api.call("WHvCreateVirtualProcessor", handle, index, 0)
        vcpu = WhpVcpu(self, index)
        self._vcpus[index] = vcpu
        vcpu.reset()
        if len(self._vcpus) == self._config.vcpus:
            self._start_clocks_together()
        return vcpu

    def _start_clocks_together(self) -> None:
        """Every TSC to 0 at one moment: processors made one after the other differ, and Linux then distrusts them."""
        if not self.api.has("WHvSuspendPartitionTime") or self._paused_at is not None:
            return
        self.api.call("WHvSuspendPartitionTime", self.handle)
        for index in self._vcpus:
            registers.put(self.api, self.handle, index, [(codes.WHvX64RegisterTsc, (0, 0))])
        self.api.call("WHvResumePartitionTime", self.handle)
        self._offset = -time.monotonic_ns()

    def save(self) -> bytes:
        return _SAVED.pack(_TAG, self.time())

    def restore(self, blob: bytes) -> None:
        """See `base.Partition.restore`. Raises SnapshotError."""
        self._open()
        if len(blob) != _SAVED.size or blob[:8] != _TAG:
            raise SnapshotError("the saved partition state is not Windows Hypervisor Platform's")
        saved = _SAVED.unpack(blob)[1]
        if self._paused_at is not None:
            self._paused_at = saved
        else:
            self._offset = saved - time.monotonic_ns()

    def close(self) -> None:
        with self._lock:
            handle, self.handle = self.handle, 0
            if not handle:
                return
            for vcpu in self._vcpus.values():
                vcpu.close()
                self.api.attempt("WHvDeleteVirtualProcessor", handle, vcpu.index)
            self.api.attempt("WHvDeletePartition", handle)
        self._mappings.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

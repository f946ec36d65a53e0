"""One partition on the software CPU. The work is in the shim (`shim/partition.c`); this keeps the contract."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import struct
import weakref
from collections.abc import Callable
from typing import Any, Final

from ..._os.event import Event
from ...bus import Bus
from ...errors import BackendUnavailable, ConfigError, HostError, SnapshotError, StateError
from ...memory import MemoryRegion
from .. import limits
from ..base import Capabilities, PartitionConfig, Perm
from . import cpuid, library
from .vcpu import SoftVcpu

MAX_VCPUS: Final = 32
CODE_BUFFER: Final = 128 << 20
"""Bytes of translated code kept; when full it is thrown away whole. Address space only until used."""

ROOM_FOR_THE_REST: Final = 16 << 20

_TAG: Final = b"soft-p1\0"
_SAVED: Final = struct.Struct("<8sq")


def _check_room(size: int) -> None:
    """The engine ends the process where it gets no room for its code: look first. Raises BackendUnavailable."""
    try:
        mmap.mmap(-1, size + ROOM_FOR_THE_REST).close()
    except (OSError, MemoryError):
        message = f"no {size >> 20} MiB of address space for the software CPU's code"
        raise BackendUnavailable("mmap", errno.ENOMEM, message, limits.memory_hint()) from None


class SoftPartition:
    """See `hypervisor.base.Partition`. Time runs from creation on; vCPUs share one engine and take turns."""

    def __init__(self, config: PartitionConfig) -> None:
        if not 1 <= config.vcpus <= MAX_VCPUS:
            raise ConfigError("cpus", config.vcpus, f"the software CPU has 1 to {MAX_VCPUS} virtual processors")
        self.caps = Capabilities(
            max_vcpus=MAX_VCPUS,
            doorbells=True,
            dirty_log=True,
            save=True,
            pio_latch=True,
            host_writes=True,
            fork=True,
        )
        self._shim = library.load()
        self._bus: Bus | None = None
        self.error: BaseException | None = None
        self._vcpus: dict[int, SoftVcpu] = {}
        self._regions: dict[tuple[int, int], MemoryRegion] = {}
        self._events: dict[tuple[int, int, int], Event] = {}
        self._callbacks = self._make_callbacks()
        _check_room(CODE_BUFFER)
        message = ctypes.create_string_buffer(200)
        handle = self._shim.mv_partition_new(
            config.vcpus, CODE_BUFFER, ctypes.byref(self._callbacks), message, len(message)
        )
        if not handle:
            raise HostError("uc_open", 0, message.value.decode(errors="replace"))
        self.handle: int | None = handle
        self.vcpu_count = config.vcpus
        self._set_cpuid()
        _live.add(self)

    def _make_callbacks(self) -> library.Callbacks:
        this = weakref.proxy(self)

        def guarded(function: Callable[..., Any], default: Any) -> Callable[..., Any]:
            def call(*arguments: int) -> Any:
                try:
                    return function(this._bus, *arguments)
                except BaseException as error:  # noqa: BLE001 - must not cross the C frames; raised again from run()
                    this._callback_raised(error)
                    return default

            return call

        return library.Callbacks(
            library.PIO_READ(guarded(lambda bus, port, size: bus.pio_read(port, size), 0)),
            library.PIO_WRITE(guarded(lambda bus, port, size, value: bus.pio_write(port, size, value), None)),
            library.MMIO_READ(guarded(lambda bus, gpa, size: bus.mmio_read(gpa, size), 0)),
            library.MMIO_WRITE(guarded(lambda bus, gpa, size, value: bus.mmio_write(gpa, size, value), None)),
            library.EOI(guarded(lambda bus, vector: bus.apic_eoi(vector), None)),
        )

    def _callback_raised(self, error: BaseException) -> None:
        if self.error is None:
            self.error = error
        self._shim.mv_callback_failed(self._open(), 1)

    def _set_cpuid(self) -> None:
        out = (ctypes.c_uint32 * 4)()

        def engine(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
            self._shim.mv_engine_cpuid(self.handle, leaf, subleaf, out)
            return out[0], out[1], out[2], out[3]

        table = cpuid.leaves(engine)
        entries = (library.CpuidEntry * len(table))(*(library.CpuidEntry(*leaf) for leaf in table))
        self._shim.mv_set_cpuid(self.handle, entries, len(table))

    def _open(self) -> int:
        if self.handle is None:
            raise StateError("the partition is closed")
        return self.handle

    def attach(self, bus: Bus) -> None:
        """Remember where exits go. Every vCPU of a partition runs with the same bus."""
        self._bus = bus

    def take_callback_error(self) -> BaseException | None:
        """What a bus handler raised, for the first vCPU thread that asks; the others were only stopped with it."""
        error, self.error = self.error, None
        self._shim.mv_callback_failed(self._open(), 0)
        return error

    def map(self, gpa: int, region: MemoryRegion, perms: int = Perm.RWX, track_dirty: bool = False) -> None:
        result = self._shim.mv_map(self._open(), gpa, region.hva, region.size, perms, int(track_dirty))
        if result == -1:
            raise ConfigError("memory region", hex(gpa), "overlaps another region, or there are too many")
        if result:
            raise HostError("uc_mem_map_ptr", result, f"the engine refused memory at {gpa:#x}")
        self._regions[gpa, region.size] = region

    def unmap(self, gpa: int, size: int) -> None:
        if (gpa, size) not in self._regions or self._shim.mv_unmap(self._open(), gpa, size):
            raise ConfigError("memory region", hex(gpa), "was not mapped like this")
        del self._regions[gpa, size]

    def dirty(self, gpa: int, size: int) -> bytes:
        bitmap = ctypes.create_string_buffer((size // 4096 + 7) // 8)
        if self._shim.mv_dirty(self._open(), gpa, size, bitmap):
            raise ConfigError("memory region", hex(gpa), "was not mapped with dirty tracking")
        return bitmap.raw

    def host_wrote(self, gpa: int, size: int) -> None:
        if self.handle is not None:
            self._shim.mv_dma(self.handle, gpa, size)

    def signal_msi(self, address: int, data: int) -> None:
        if self.handle is not None:
            self._shim.mv_signal_msi(self.handle, address, data)

    def doorbell(self, gpa: int, size: int, value: int, event: Event) -> bool:
        taken = bool(self._shim.mv_doorbell(self._open(), gpa, size, value, event.fileno()))
        if taken:
            self._events[gpa, size, value] = event
        return taken

    def latch_pio(self, port: int, value: int | None) -> bool:
        if self.handle is None:
            return False
        return bool(self._shim.mv_latch_pio(self.handle, port, -1 if value is None else value))

    def route_irq(self, gsi: int, address: int, data: int) -> Event | None:
        return None

    def time(self) -> int:
        return int(self._shim.mv_time(self._open()))

    def pause_time(self) -> None:
        self._shim.mv_pause_time(self._open())

    def resume_time(self) -> None:
        self._shim.mv_resume_time(self._open())

    def create_vcpu(self, index: int) -> SoftVcpu:
        if not 0 <= index < self.vcpu_count or index in self._vcpus:
            raise ConfigError("vcpu", index, f"each of 0 to {self.vcpu_count - 1} is created once")
        vcpu = SoftVcpu(self, index, self._shim)
        self._vcpus[index] = vcpu
        return vcpu

    def save(self) -> bytes:
        return _SAVED.pack(_TAG, self.time())

    def restore(self, blob: bytes) -> None:
        if len(blob) != _SAVED.size or blob[:8] != _TAG:
            raise SnapshotError("the saved partition state is not the software CPU's")
        self._shim.mv_set_time(self._open(), _SAVED.unpack(blob)[1])

    def counters(self) -> dict[str, int]:
        """How often what happened since creation, for statistics."""
        raw = ctypes.cast(self._shim.mv_counters(self._open()), ctypes.POINTER(library.Counters)).contents
        return {name: getattr(raw, name) for name in library.COUNTERS}

    def close(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None:
            _live.discard(self)
            self._shim.mv_partition_free(handle)
        self._regions.clear()
        self._events.clear()
        self._vcpus.clear()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


_live: weakref.WeakSet[SoftPartition] = weakref.WeakSet()


def _before_fork() -> None:
    for partition in list(_live):
        if partition.handle is not None:
            partition._shim.mv_before_fork(partition.handle)


def _after_fork() -> None:
    for partition in list(_live):
        if partition.handle is not None:
            partition._shim.mv_after_fork(partition.handle)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)

"""A KVM virtual machine: memory slots, doorbells, interrupts, time and vCPUs.

The interrupt controller is split: local APICs in the kernel, the I/O APIC ours. That is the shape Hyper-V's platform
has as well, and no PIC or PIT comes with it.
"""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from dataclasses import dataclass
from typing import Final

from ..._os.event import Event
from ...errors import ConfigError, SnapshotError, StateError
from ...memory import MemoryRegion
from ..base import Capabilities, PartitionConfig, Perm
from . import abi, state
from .api import Api
from .clock import Clock
from .cpuid import Leaf, machine_cpuid
from .interrupts import LEVEL_SLOTS, Interrupts
from .vcpu import KvmVcpu

# Guest-physical pages KVM needs for itself on Intel, in the hole below 4 GiB (boot/layout.py: KVM_TSS and
# KVM_IDENTITY_MAP). Above 2**31, which is why no call may go through fcntl.ioctl.
TSS_GPA: Final = 0xFFFB_D000
IDENTITY_MAP_GPA: Final = 0xFFFB_C000
MAX_VCPUS: Final = 32
PAGE: Final = 4096
MAGIC: Final = b"mvKVMvm\0"
VERSION: Final = 1
_CPUID: Final = struct.Struct("<7I12x")


@dataclass(slots=True)
class _Mapping:
    slot: int
    gpa: int
    size: int
    region: MemoryRegion
    track_dirty: bool


class KvmPartition:
    """See `base.Partition`. Made by `KvmHypervisor.create_partition`; owns ``kvm_fd``."""

    def __init__(self, api: Api, kvm_fd: int, config: PartitionConfig) -> None:
        self.api = api
        self.kvm_fd = kvm_fd
        self.vm_fd = -1
        self._config = config
        self._mappings: dict[int, _Mapping] = {}
        self._doorbells: dict[tuple[int, int, int], Event] = {}
        self._vcpus: dict[int, KvmVcpu] = {}
        self._msrs: tuple[int, ...] | None = None
        self._supported: list[Leaf] | None = None
        self._tsc_khz = 0
        self._closed = False
        self._lock = threading.Lock()
        try:
            self._create()
        except BaseException:
            if self.vm_fd >= 0:
                api.close(self.vm_fd)
            api.close(kvm_fd)
            raise
        self._interrupts = Interrupts(api, self.vm_fd)
        self.clock = Clock(api, self.vm_fd, self._interrupts)

    def _create(self) -> None:
        api, kvm = self.api, self.kvm_fd
        most = min(api.has(kvm, abi.KVM_CAP_MAX_VCPUS) or 1, MAX_VCPUS)
        if not 1 <= self._config.vcpus <= most:
            raise ConfigError("vcpus", self._config.vcpus, f"1 to {most} on KVM here")
        self.vm_fd = api.ioctl(kvm, abi.KVM_CREATE_VM, 0)
        if api.has(kvm, abi.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            api.ioctl(self.vm_fd, abi.KVM_SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(IDENTITY_MAP_GPA))
        if api.has(kvm, abi.KVM_CAP_SET_TSS_ADDR):
            api.ioctl(self.vm_fd, abi.KVM_SET_TSS_ADDR, TSS_GPA)
        split = abi.kvm_enable_cap(cap=abi.KVM_CAP_SPLIT_IRQCHIP)
        split.args[0] = LEVEL_SLOTS
        api.ioctl(self.vm_fd, abi.KVM_ENABLE_CAP, split)
        self.run_size = api.ioctl(kvm, abi.KVM_GET_VCPU_MMAP_SIZE)
        self.xsave_size = max(4096, api.has(self.vm_fd, abi.KVM_CAP_XSAVE2))
        self._read_only = bool(api.has(kvm, abi.KVM_CAP_READONLY_MEM))
        self._tsc_deadline = bool(api.has(kvm, abi.KVM_CAP_TSC_DEADLINE_TIMER))
        self._max_slots = api.has(kvm, abi.KVM_CAP_NR_MEMSLOTS) or 32
        self.caps = Capabilities(
            max_vcpus=most,
            doorbells=bool(api.has(kvm, abi.KVM_CAP_IOEVENTFD)),
            dirty_log=True,
            save=True,
            pio_latch=False,
            irqfd=bool(api.has(kvm, abi.KVM_CAP_IRQFD)),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the partition is closed")

    def map(self, gpa: int, region: MemoryRegion, perms: int = Perm.RWX, track_dirty: bool = False) -> None:
        """See `base.Partition.map`. KVM cannot withhold EXEC or READ; without WRITE the mapping is read-only."""
        self._check_open()
        if gpa < 0 or gpa % PAGE or gpa + region.size > 1 << 52:
            raise ConfigError("mapping", hex(gpa), "a page-aligned guest-physical address below 2**52")
        for other in self._mappings.values():
            if gpa < other.gpa + other.size and other.gpa < gpa + region.size:
                raise ConfigError("mapping", hex(gpa), f"overlaps the mapping at {other.gpa:#x}")
        flags = abi.KVM_MEM_LOG_DIRTY_PAGES if track_dirty else 0
        if not perms & Perm.WRITE:
            if not self._read_only:
                raise ConfigError("mapping", hex(gpa), "this host's KVM has no read-only memory")
            flags |= abi.KVM_MEM_READONLY
        used = {mapping.slot for mapping in self._mappings.values()}
        slot = next(i for i in range(len(used) + 1) if i not in used)
        if slot >= self._max_slots:
            raise ConfigError("mapping", hex(gpa), f"KVM has {self._max_slots} memory slots here")
        self._set_region(slot, flags, gpa, region.size, region.hva)
        self._mappings[gpa] = _Mapping(slot, gpa, region.size, region, track_dirty)

    def _set_region(self, slot: int, flags: int, gpa: int, size: int, hva: int) -> None:
        region = abi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        self.api.ioctl(self.vm_fd, abi.KVM_SET_USER_MEMORY_REGION, region)

    def _mapping(self, gpa: int, size: int) -> _Mapping:
        self._check_open()
        mapping = self._mappings.get(gpa)
        if mapping is None or mapping.size != size:
            raise ConfigError("mapping", hex(gpa), f"nothing of {size:#x} bytes is mapped there")
        return mapping

    def unmap(self, gpa: int, size: int) -> None:
        mapping = self._mapping(gpa, size)
        self._set_region(mapping.slot, 0, gpa, 0, 0)
        del self._mappings[gpa]

    def dirty(self, gpa: int, size: int) -> bytes:
        mapping = self._mapping(gpa, size)
        if not mapping.track_dirty:
            raise ConfigError("mapping", hex(gpa), "was not made with track_dirty")
        pages = size // PAGE
        bitmap = ctypes.create_string_buffer((pages + 63) // 64 * 8)
        log = abi.kvm_dirty_log(slot=mapping.slot, dirty_bitmap=ctypes.addressof(bitmap))
        self.api.ioctl(self.vm_fd, abi.KVM_GET_DIRTY_LOG, log)
        return bitmap.raw[: (pages + 7) // 8]

    def host_wrote(self, gpa: int, size: int) -> None:
        """The processor sees the host's writes by itself."""

    def signal_msi(self, address: int, data: int) -> None:
        self._interrupts.signal(address, data)

    def doorbell(self, gpa: int, size: int, value: int, event: Event) -> bool:
        """See `base.Partition.doorbell`. A second call for the same write replaces the event."""
        self._check_open()
        if not self.caps.doorbells or size not in (1, 2, 4, 8):
            return False
        with self._lock:
            old = self._doorbells.pop((gpa, size, value), None)
            if old is not None:
                self._ioeventfd(gpa, size, value, old, abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
            code = self._ioeventfd(gpa, size, value, event, 0)
            if code == 0:
                self._doorbells[gpa, size, value] = event
        return code == 0

    def _ioeventfd(self, gpa: int, size: int, value: int, event: Event, flags: int) -> int:
        request = abi.kvm_ioeventfd(
            datamatch=value, addr=gpa, len=size, fd=event.fd, flags=flags | abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        )
        code = self.api.try_ioctl(self.vm_fd, abi.KVM_IOEVENTFD, request)
        if code < 0 and code not in (-errno.ENOSPC, -errno.EEXIST, -errno.ENOENT):
            self.api.ioctl(self.vm_fd, abi.KVM_IOEVENTFD, request)
        return code

    def latch_pio(self, port: int, value: int | None) -> bool:
        """KVM has no such thing."""
        return False

    def route_irq(self, gsi: int, address: int, data: int) -> Event | None:
        self._check_open()
        if not self.caps.irqfd:
            return None
        return self._interrupts.route(gsi, address, data)

    def time(self) -> int:
        self._check_open()
        return self.clock.now()

    def pause_time(self) -> None:
        self._check_open()
        self.clock.pause(self._in_order())

    def resume_time(self) -> None:
        self._check_open()
        self.clock.resume(self._in_order())

    def _in_order(self) -> list[KvmVcpu]:
        return [self._vcpus[index] for index in sorted(self._vcpus)]

    def create_vcpu(self, index: int) -> KvmVcpu:
        self._check_open()
        if not 0 <= index < self._config.vcpus or index in self._vcpus:
            raise ConfigError("vcpu", index, f"each of 0 to {self._config.vcpus - 1} once")
        fd = self.api.ioctl(self.vm_fd, abi.KVM_CREATE_VCPU, index)
        vcpu = KvmVcpu(self.api, self, index, fd, self.run_size)
        try:
            state.set_cpuid(vcpu, self.cpuid_for(index, fd))
            # What firmware would have done: string instructions fast (Linux asks on Intel), memory write-back.
            state.set_msrs(self.api, fd, {abi.MSR_IA32_MISC_ENABLE: vcpu_misc_enable(self.api, fd)})
            state.set_msrs(self.api, fd, {abi.MSR_MTRRdefType: 1 << 11 | 6})
            if self.clock.paused:
                self.clock.stop_new(vcpu)
        except BaseException:
            vcpu.close()
            raise
        self._vcpus[index] = vcpu
        return vcpu

    def cpuid_for(self, index: int, vcpu_fd: int | None = None) -> bytes:
        """The CPUID leaves of vCPU ``index``, packed for KVM."""
        if vcpu_fd is not None and not self._tsc_khz:
            self._tsc_khz = self.api.ioctl(vcpu_fd, abi.KVM_GET_TSC_KHZ)
        if self._supported is None:
            self._supported = supported_cpuid(self.api, self.kvm_fd)
        leaves = machine_cpuid(self._supported, index, self._config.vcpus, self._tsc_khz, self._tsc_deadline)
        return b"".join(
            _CPUID.pack(leaf.function, leaf.index, leaf.flags, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx)
            for leaf in leaves
        )

    def saved_msrs(self, vcpu: KvmVcpu) -> tuple[int, ...]:
        """The MSRs that make up a vCPU's state on this host."""
        if self._msrs is None:
            self._msrs = state.saved_msrs(self.api, self.kvm_fd, vcpu.fd)
        return self._msrs

    def save(self) -> bytes:
        return state.pack(MAGIC, VERSION, ((b"CLCK", struct.pack("<Q", self.time())),))

    def restore(self, blob: bytes) -> None:
        """See `base.Partition.restore`. Raises SnapshotError."""
        self._check_open()
        clock = state.parse(blob, MAGIC, VERSION, "a partition").get(b"CLCK")
        if clock is None or len(clock) != 8:
            raise SnapshotError("the state of a partition is damaged")
        self.clock.set(struct.unpack("<Q", clock)[0])

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for vcpu in self._vcpus.values():
            vcpu.close()
        self._interrupts.close()
        self.api.close(self.vm_fd)
        self.api.close(self.kvm_fd)
        self._mappings.clear()
        self._doorbells.clear()


def vcpu_misc_enable(api: Api, fd: int) -> int:
    """IA32_MISC_ENABLE after reset with fast strings on. [SDM] 4 2.1"""
    try:
        return state.get_msrs(api, fd, (abi.MSR_IA32_MISC_ENABLE,))[abi.MSR_IA32_MISC_ENABLE] | 1
    except KeyError:
        return 1


def supported_cpuid(api: Api, kvm_fd: int) -> list[Leaf]:
    """What KVM can show a guest on this host."""
    count = 128
    while True:
        size = 8 + _CPUID.size * count
        argument = ctypes.create_string_buffer(struct.pack("<II", count, 0), size)
        code = api.try_ioctl(kvm_fd, abi.KVM_GET_SUPPORTED_CPUID, argument)
        if code >= 0:
            break
        if code != -errno.E2BIG or count >= 4096:
            api.ioctl(kvm_fd, abi.KVM_GET_SUPPORTED_CPUID, argument)
        count *= 2
    found: int = struct.unpack_from("<I", argument)[0]
    return [Leaf(*_CPUID.unpack_from(argument, 8 + _CPUID.size * i)) for i in range(min(found, count))]

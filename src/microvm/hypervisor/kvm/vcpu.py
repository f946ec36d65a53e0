"""One KVM vCPU: the run loop, registers, and the way in and out.

How a run goes. `run` calls KVM_RUN, a C function that releases the GIL, over and over. The kernel returns with a
reason in the shared ``kvm_run`` page; port and memory accesses are served on the bus and completed by the next
KVM_RUN, which first takes the data we left in the page. Local APICs, HLT, INIT and SIPI live in the kernel; the
loop sees none of them. The page is read through four views of itself (8, 16, 32 and 64 bits), whose offsets are
fixed by `abi.kvm_run`. The first access of a kind goes through the bus; the loop then remembers the device's own
function and where the data lie, so that the next one costs two reads of the page and a look-up.

How a kick gets in. ``immediate_exit`` is set in the page, then the thread gets a signal. If the vCPU is in the
guest, the signal makes KVM_RUN return EINTR; if it is about to enter, the flag does; if it is not running, the flag
waits. The flag is taken back only together with ``_kicked``, under a lock, when `run` returns KICKED: a kick is never
lost, and any number before that count as one. KVM finishes the pending access before it looks at the flag, so a
vCPU that returned KICKED has no half-done instruction. Every other way out of `run` may leave one behind: ``_open``
says so, and whoever reads or writes state next calls `settle` first.

Threads: `run` on one thread at a time, any thread; `kick` from anywhere; everything else while not running.
"""

from __future__ import annotations

import ctypes
import errno
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any, Final

from ...bus import PAGE_SHIFT, Bus
from ...errors import HostError
from ..base import STOP_HALTED, STOP_KICKED, TRIPLE_FAULT, Registers, StopReason, VcpuStop
from . import abi, state
from .api import Api, host_error, kvm_run
from .exits import crash_detail
from .kick import Poke, kick_signal, unblock_kick_signal
from .registers import load_registers, store_registers

if TYPE_CHECKING:
    from .clock import PausedTime
    from .partition import KvmPartition

_U: Final = abi.kvm_run.u.offset
_EXIT_REASON_U32: Final = abi.kvm_run.exit_reason.offset // 4
_IMMEDIATE_EXIT: Final = abi.kvm_run.immediate_exit.offset
_IO_WHAT_U64: Final = _U // 8  # direction, size, port and count
_IO_DIRECTION: Final = _U + abi._run_io.direction.offset
_IO_SIZE: Final = _U + abi._run_io.size.offset
_IO_PORT_U16: Final = (_U + abi._run_io.port.offset) // 2
_IO_COUNT_U32: Final = (_U + abi._run_io.count.offset) // 4
_IO_DATA_OFFSET_U64: Final = (_U + abi._run_io.data_offset.offset) // 8
_MMIO_GPA_U64: Final = (_U + abi._run_mmio.phys_addr.offset) // 8
_MMIO_DATA: Final = _U + abi._run_mmio.data.offset
_MMIO_LEN_U32: Final = (_U + abi._run_mmio.len.offset) // 4
_MMIO_IS_WRITE: Final = _U + abi._run_mmio.is_write.offset
_MMIO_WHAT_U64: Final = _MMIO_LEN_U32 // 2  # length and direction, then 24 bits of anything
_MMIO_WHAT_MASK: Final = (1 << 40) - 1
_MMIO_READ_4: Final = 4
_MMIO_WRITE_4: Final = 1 << 32 | 4
_RFLAGS_IF: Final = 1 << 9
_SETTLE_LIMIT: Final = 4096  # exits one instruction may still cost; a page of bytes by REP INS is the most


class KvmVcpu:
    """A vCPU of a `KvmPartition`; made by its `create_vcpu`."""

    def __init__(self, api: Api, partition: KvmPartition, index: int, fd: int, run_size: int) -> None:
        self.index = index
        self.fd = fd
        self.api = api
        self.partition = partition
        self.paused: PausedTime | None = None  # set by `clock.py` while guest time stands still
        self.cpuid = b""  # what KVM_SET_CPUID2 was last given
        self._kicked = False
        self._open = False
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._signal = kick_signal()
        self._ready_thread = 0
        self._poke: Poke | None = None
        try:
            self._page = api.map_run(fd, run_size)
        except BaseException:
            api.close(fd)
            raise
        self._u8 = memoryview(self._page)
        self._u16 = self._u8.cast("H")
        self._u32 = self._u8.cast("I")
        self._u64 = self._u8.cast("Q")
        self._data = self._u8[_MMIO_DATA : _MMIO_DATA + 8]
        self._run = kvm_run()
        # Who answers: by direction, size, port and count of a port access as the page has them, and by MMIO page.
        self._ports: dict[int, tuple[Any, int, int, memoryview, int, int]] = {}
        self._pages: dict[int, tuple[Any, Any, int]] = {}
        self._bus: Bus | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<KvmVcpu {self.index}>"

    def run(self, bus: Bus) -> VcpuStop:
        """See `base.Vcpu.run`. Raises HostError if the host withdraws memory or the device."""
        try:
            self._enter()
            self._open = True
            return self._loop(bus)
        finally:
            if self._poke is not None:
                self._poke.stop()
            with self._lock:
                self._thread = None

    def _enter(self) -> None:
        """Make this thread the one that kicks go to."""
        native = threading.get_native_id()
        if native != self._ready_thread:
            unblock_kick_signal()
            if self._poke is not None:
                self._poke.close()
            self._poke = Poke(native)
            self._ready_thread = native
        assert self._poke is not None
        with self._lock:
            self._thread = threading.get_ident()
        self._poke.start()

    def _loop(self, bus: Bus) -> VcpuStop:
        run, fd, kvm_run = self._run, self.fd, abi.KVM_RUN
        u32, u64 = self._u32, self._u64
        if bus is not self._bus:
            self._bus = bus
            self._ports.clear()
            self._pages.clear()
        port_entry, page_entry = self._ports.get, self._pages.get
        while True:
            try:
                run(fd, kvm_run)
            except OSError as error:
                stop = self._interrupted(error.errno or errno.EIO)
                if stop is None:
                    continue
                return stop
            reason = u32[_EXIT_REASON_U32]
            if reason == abi.KVM_EXIT_IO:
                port = port_entry(u64[_IO_WHAT_U64])
                if port is None:
                    self._io(bus)
                    continue
                function, offset, size, view, at, mask = port
                if mask:
                    view[at] = function(offset, size) & mask
                else:
                    function(offset, size, view[at])
            elif reason == abi.KVM_EXIT_MMIO:
                gpa = u64[_MMIO_GPA_U64]
                page = page_entry(gpa >> PAGE_SHIFT)
                what = u64[_MMIO_WHAT_U64] & _MMIO_WHAT_MASK
                if page is None:
                    self._mmio(bus)
                elif what == _MMIO_WRITE_4:
                    page[1](gpa - page[2], 4, u32[_MMIO_DATA >> 2])
                elif what == _MMIO_READ_4:
                    u32[_MMIO_DATA >> 2] = page[0](gpa - page[2], 4) & 0xFFFF_FFFF
                else:
                    self._mmio(bus)
            elif reason == abi.KVM_EXIT_IOAPIC_EOI:
                bus.apic_eoi(self._u8[_U])
            elif reason != abi.KVM_EXIT_INTR:
                return self._cold(reason)

    def _interrupted(self, code: int) -> VcpuStop | None:
        """KVM_RUN failed with ``code``. Returns why to stop, or None to go on."""
        if code == errno.EINTR:
            with self._lock:
                kicked = self._kicked
                self._kicked = False
                self._u8[_IMMEDIATE_EXIT] = 0
            if kicked:
                self._open = False
                return STOP_KICKED
            if self._halted_for_good():
                self._open = False
                return STOP_HALTED
            return None
        if code == errno.EAGAIN:
            return None  # a vCPU that waited for INIT or SIPI got it
        if code == errno.EFAULT:
            message = "the host cannot provide a page of guest memory"
            raise HostError("KVM_RUN", code, message, "the memory file was truncated, or the host ran out of memory")
        raise host_error("KVM_RUN", code)

    def _halted_for_good(self) -> bool:
        """Whether the vCPU sits in HLT with interrupts off."""
        if self._mp_state() != abi.KVM_MP_STATE_HALTED:
            return False
        regs = abi.kvm_regs()
        self.api.ioctl(self.fd, abi.KVM_GET_REGS, regs)
        return not regs.rflags & _RFLAGS_IF

    def _mp_state(self) -> int:
        mp_state = abi.kvm_mp_state()
        self.api.ioctl(self.fd, abi.KVM_GET_MP_STATE, mp_state)
        return int(mp_state.mp_state)

    def _io(self, bus: Bus) -> None:
        """Any port access. ``count`` elements lie one after the other in the page: more than one is INS or OUTS.

        Remembers who answers a single access, for the loop. The guest decides how many kinds of access there are, the
        bus how many ports answer: at most 6 entries for each of those.
        """
        u8 = self._u8
        size, port, count = u8[_IO_SIZE], self._u16[_IO_PORT_U16], self._u32[_IO_COUNT_U32]
        at = self._u64[_IO_DATA_OFFSET_U64]
        end = at + size * count
        write = u8[_IO_DIRECTION]
        what = self._u64[_IO_WHAT_U64]
        if write:
            for start in range(at, end, size):
                bus.pio_write(port, size, int.from_bytes(u8[start : start + size], "little"))
        else:
            for start in range(at, end, size):
                u8[start : start + size] = bus.pio_read(port, size).to_bytes(size, "little")
        claimed = bus.port(port)
        if claimed is not None and count == 1:
            device, first = claimed
            view = {1: u8, 2: self._u16, 4: self._u32}[size]
            # The data lie in a page of their own, always at the same place.
            if write:
                self._ports[what] = (device.pio_write, port - first, size, view, at // size, 0)
            else:
                self._ports[what] = (device.pio_read, port - first, size, view, at // size, (1 << 8 * size) - 1)

    def _mmio(self, bus: Bus) -> None:
        """Any access to device memory. Remembers who answers in that page, for the loop."""
        u64 = self._u64
        size, gpa = self._u32[_MMIO_LEN_U32], u64[_MMIO_GPA_U64]
        if size not in (1, 2, 4, 8):
            self._odd_mmio(bus, size)
        elif self._u8[_MMIO_IS_WRITE]:
            bus.mmio_write(gpa, size, int.from_bytes(self._data[:size], "little"))
        else:
            u64[_MMIO_DATA >> 3] = bus.mmio_read(gpa, size)
        claimed = bus.page(gpa)
        if claimed is not None:
            device, base = claimed
            self._pages[gpa >> PAGE_SHIFT] = (device.mmio_read, device.mmio_write, base)

    def _odd_mmio(self, bus: Bus, size: int) -> None:
        """An access of 3, 5, 6 or 7 bytes: one half of an access that crosses a page. Served in aligned pieces."""
        gpa = self._u64[_MMIO_GPA_U64]
        write = self._u8[_MMIO_IS_WRITE]
        done = 0
        while done < min(size, 8):
            piece = 4
            while piece > size - done or (gpa + done) & (piece - 1):
                piece >>= 1
            if write:
                value = int.from_bytes(self._data[done : done + piece], "little")
                bus.mmio_write(gpa + done, piece, value)
            else:
                value = bus.mmio_read(gpa + done, piece)
                self._data[done : done + piece] = value.to_bytes(piece, "little")
            done += piece

    def _cold(self, reason: int) -> VcpuStop:
        """Every exit that ends a run."""
        if reason == abi.KVM_EXIT_SHUTDOWN:
            return self._crashed(TRIPLE_FAULT)
        if reason == abi.KVM_EXIT_SYSTEM_EVENT:
            event = abi.kvm_run.from_buffer_copy(self._u8[: ctypes.sizeof(abi.kvm_run)]).system_event.type
            if event == abi.KVM_SYSTEM_EVENT_SHUTDOWN:
                return VcpuStop(StopReason.POWERED_OFF, "the guest asked the hypervisor to power off")
            if event == abi.KVM_SYSTEM_EVENT_RESET:
                return self._crashed(TRIPLE_FAULT)
        return self._crashed(crash_detail(abi.kvm_run.from_buffer_copy(self._u8[: ctypes.sizeof(abi.kvm_run)])))

    def _crashed(self, detail: str) -> VcpuStop:
        try:
            registers = self._read_registers()
        except HostError:
            registers = None
        return VcpuStop(StopReason.CRASHED, detail, registers)

    def kick(self) -> None:
        """See `base.Vcpu.kick`."""
        if sys.platform != "linux":
            raise AssertionError("KVM is Linux")
        with self._lock:
            if self._closed:
                return
            self._kicked = True
            self._u8[_IMMEDIATE_EXIT] = 1
            if self._thread is not None:
                signal.pthread_kill(self._thread, self._signal)

    def settle(self) -> None:
        """Finish the access an interrupted run left half done, so that state can be read and written.

        Reads that nobody answered see what the page held. The guest executes nothing more.
        """
        if not self._open:
            return
        self._u8[_IMMEDIATE_EXIT] = 1
        try:
            for _ in range(_SETTLE_LIMIT):
                try:
                    self._run(self.fd, abi.KVM_RUN)
                except OSError:
                    break
                if self._u32[_EXIT_REASON_U32] not in (abi.KVM_EXIT_IO, abi.KVM_EXIT_MMIO):
                    break
        finally:
            with self._lock:
                self._u8[_IMMEDIATE_EXIT] = 1 if self._kicked else 0
        self._open = False

    def _read_registers(self) -> Registers:
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        self.api.ioctl(self.fd, abi.KVM_GET_REGS, regs)
        self.api.ioctl(self.fd, abi.KVM_GET_SREGS, sregs)
        return load_registers(regs, sregs)

    def get_registers(self) -> Registers:
        self.settle()
        return self._read_registers()

    def set_registers(self, registers: Registers) -> None:
        """See `base.Vcpu`. A vCPU in HLT goes on from the new RIP. Raises HostError for an impossible state."""
        self.settle()
        regs, sregs = abi.kvm_regs(), abi.kvm_sregs()
        self.api.ioctl(self.fd, abi.KVM_GET_SREGS, sregs)
        store_registers(registers, regs, sregs)
        self.api.ioctl(self.fd, abi.KVM_SET_SREGS, sregs)
        self.api.ioctl(self.fd, abi.KVM_SET_REGS, regs)
        if self._mp_state() == abi.KVM_MP_STATE_HALTED:
            self.api.ioctl(self.fd, abi.KVM_SET_MP_STATE, abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))

    def get_msr(self, index: int) -> int:
        self.settle()
        values = state.get_msrs(self.api, self.fd, (index,))
        return values[index]

    def set_msr(self, index: int, value: int) -> None:
        self.settle()
        if state.set_msrs(self.api, self.fd, {index: value}):
            raise KeyError(index)

    def get_xsave(self) -> bytes:
        self.settle()
        return state.get_xsave(self.api, self.fd, self.partition.xsave_size)

    def set_xsave(self, state_bytes: bytes) -> None:
        self.settle()
        state.set_xsave(self.api, self.fd, state_bytes, self.partition.xsave_size)

    def translate(self, gva: int) -> int | None:
        self.settle()
        translation = abi.kvm_translation(linear_address=gva)
        self.api.ioctl(self.fd, abi.KVM_TRANSLATE, translation)
        return translation.physical_address if translation.valid else None

    def save(self) -> bytes:
        """See `base.Vcpu.save`; while guest time is paused, its clocks are those of the moment of the pause."""
        self.settle()
        return state.save_vcpu(self)

    def restore(self, blob: bytes) -> None:
        """See `base.Vcpu.restore`. Raises SnapshotError, also if this processor lacks what the guest was shown."""
        self.settle()
        state.restore_vcpu(self, blob)

    def close(self) -> None:
        """Free the vCPU; called by its partition. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._poke is not None:
            self._poke.close()
        for view in (self._data, self._u16, self._u32, self._u64, self._u8):
            view.release()
        self._page.close()
        self.api.close(self.fd)

"""One virtual processor on the software CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ...bus import Bus
from ...errors import SnapshotError, StateError
from ..base import STOP_HALTED, STOP_KICKED, TRIPLE_FAULT, Registers, Segment, StopReason, Table, VcpuStop

if TYPE_CHECKING:
    from .partition import SoftPartition

# Stop codes of soft.h.
_KICKED: Final = 1
_HALTED: Final = 2
_TRIPLE_FAULT: Final = 3
_CALLBACK: Final = 6

_GENERAL: Final = (
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "rsp",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rip",
    "rflags",
)
_SEGMENTS: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")
_TABLES: Final = ("gdtr", "idtr")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")
_FLAT_WORDS: Final = len(_GENERAL) + 3 * len(_SEGMENTS) + 2 * len(_TABLES) + len(_CONTROL)
_MASK64: Final = (1 << 64) - 1
_XSAVE_SIZE: Final = 576
_TAG: Final = b"soft-v1\0"


class SoftVcpu:
    """See `hypervisor.base.Vcpu`. All methods but `run` and `kick` are for a stopped partition."""

    def __init__(self, partition: SoftPartition, index: int, shim: ctypes.CDLL) -> None:
        self.index = index
        self._partition = partition
        self._shim = shim
        shim.mv_vcpu_create(partition.handle, index)

    @property
    def _handle(self) -> int:
        handle = self._partition.handle
        if handle is None:
            raise StateError("the partition is closed")
        return handle

    def run(self, bus: Bus) -> VcpuStop:
        self._partition.attach(bus)
        stop = self._shim.mv_vcpu_run(self._handle, self.index)
        if stop == _KICKED:
            return STOP_KICKED
        if stop == _HALTED:
            return STOP_HALTED
        if stop == _CALLBACK:
            error = self._partition.take_callback_error()
            if error is not None:
                raise error
            return STOP_KICKED
        detail = self._shim.mv_vcpu_detail(self._handle, self.index).decode(errors="replace")
        # As they were then: by now another vCPU may run on the engine, which must not be touched under it.
        registers = self._decode(self._shim.mv_vcpu_crashed(self._handle, self.index)[:_FLAT_WORDS])
        return VcpuStop(StopReason.CRASHED, TRIPLE_FAULT if stop == _TRIPLE_FAULT else detail, registers)

    def kick(self) -> None:
        handle = self._partition.handle
        if handle is not None:
            self._shim.mv_vcpu_kick(handle, self.index)

    def _env(self) -> int:
        return int(self._shim.mv_vcpu_env(self._handle, self.index))

    def get_registers(self) -> Registers:
        flat = (ctypes.c_uint64 * _FLAT_WORDS)()
        self._shim.mv_env_get(self._env(), flat)
        return self._decode(flat)

    def _decode(self, flat: Iterable[int]) -> Registers:
        registers = Registers()
        words = iter(flat)
        for name in _GENERAL:
            setattr(registers, name, next(words))
        for name in _SEGMENTS:
            selector, base, packed = next(words), next(words), next(words)
            setattr(registers, name, Segment(selector, base, packed >> 32, packed & 0xFFFF))
        for name in _TABLES:
            setattr(registers, name, Table(next(words), next(words)))
        for name in _CONTROL:
            setattr(registers, name, next(words))
        registers.cr8 = self._shim.mv_vcpu_tpr(self._handle, self.index, 0, 0) >> 4
        return registers

    def set_registers(self, registers: Registers) -> None:
        words: list[int] = [getattr(registers, name) & _MASK64 for name in _GENERAL]
        for name in _SEGMENTS:
            segment: Segment = getattr(registers, name)
            words += [
                segment.selector,
                segment.base & _MASK64,
                (segment.limit & 0xFFFF_FFFF) << 32 | segment.attributes & 0xFFFF,
            ]
        for name in _TABLES:
            table: Table = getattr(registers, name)
            words += [table.base & _MASK64, table.limit]
        words += [getattr(registers, name) & _MASK64 for name in _CONTROL]
        self._shim.mv_env_set(self._env(), (ctypes.c_uint64 * _FLAT_WORDS)(*words))
        self._shim.mv_vcpu_tpr(self._handle, self.index, 1, (registers.cr8 & 0xF) << 4)
        self._shim.mv_vcpu_registers_set(self._handle, self.index)

    def get_msr(self, index: int) -> int:
        value = ctypes.c_uint64()
        if not self._shim.mv_vcpu_msr(self._handle, self.index, index, ctypes.byref(value), 0):
            raise KeyError(index)
        return value.value

    def set_msr(self, index: int, value: int) -> None:
        if not self._shim.mv_vcpu_msr(self._handle, self.index, index, ctypes.byref(ctypes.c_uint64(value)), 1):
            raise KeyError(index)

    def get_debug_registers(self) -> tuple[int, ...]:
        """DR0 to DR7; 4 and 5 are aliases and read as 0."""
        words = (ctypes.c_uint64 * 8)()
        self._shim.mv_env_debug(self._env(), words, 0)
        return tuple(words)

    def set_debug_registers(self, values: tuple[int, ...]) -> None:
        self._shim.mv_env_debug(self._env(), (ctypes.c_uint64 * 8)(*values), 1)

    def get_xcr0(self) -> int:
        return ctypes.c_uint64.from_address(self._shim.mv_env_xcr0(self._env())).value

    def set_xcr0(self, value: int) -> None:
        ctypes.c_uint64.from_address(self._shim.mv_env_xcr0(self._env())).value = value

    def get_xsave(self) -> bytes:
        area = ctypes.create_string_buffer(_XSAVE_SIZE)
        self._shim.mv_env_get_xsave(self._env(), area)
        return area.raw

    def set_xsave(self, state: bytes) -> None:
        if len(state) < _XSAVE_SIZE:
            raise ValueError(f"an XSAVE area has at least {_XSAVE_SIZE} bytes")
        self._shim.mv_env_set_xsave(self._env(), state)

    def translate(self, gva: int) -> int | None:
        gpa = int(self._shim.mv_vcpu_translate(self._handle, self.index, gva & _MASK64))
        return None if gpa < 0 else gpa

    def save(self) -> bytes:
        size = self._shim.mv_vcpu_state_size()
        out = ctypes.create_string_buffer(size)
        self._shim.mv_vcpu_save(self._handle, self.index, out)
        return _TAG + out.raw

    def restore(self, blob: bytes) -> None:
        if blob[:8] != _TAG or len(blob) != 8 + self._shim.mv_vcpu_state_size():
            raise SnapshotError("the saved vCPU state is not this build of the software CPU's")
        self._shim.mv_vcpu_restore(self._handle, self.index, blob[8:])

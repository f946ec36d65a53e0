"""One simulated virtual processor: running it to an exit, and its registers."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, Final

from ...hypervisor import x86_mmio
from ...hypervisor.soft import library
from ...hypervisor.whp import codes, registers
from ...hypervisor.whp.vcpu import SIZE as SIZE
from . import enlightenments, paging

if TYPE_CHECKING:
    from .partition import SimulatedPartition

# soft.h
_KICKED, _HALTED, _TRIPLE_FAULT, _EXIT = 1, 2, 3, 7
_MMIO_READ, _MMIO_WRITE, _PIO_READ, _PIO_WRITE, _MSR_READ, _MSR_WRITE, _EOI = range(1, 8)
_WAIT_SIPI, _RUNNABLE, _HLT = 0, 1, 2
_WORDS: Final = 52
_RIP, _RFLAGS, _SEGMENTS, _TABLES, _CONTROL, _TPR = 16, 17, 18, 42, 46, 50
_MASK: Final = (1 << 64) - 1
_LOW32: Final = 0xFFFF_FFFF

_CONTEXT: Final = struct.Struct("<II HBBI QIHH QQ")  # up to the union: reason, WHV_X64_VP_EXIT_CONTEXT
_MEMORY: Final = struct.Struct("<B3x16sI QQ")
_PORT: Final = struct.Struct("<B3x16sI H6x QQQQ QIHH QIHH")
_MSR: Final = struct.Struct("<II QQ")

# register: position among the shim's flat words
_FLAT: Final = {name: i for i, (_, name) in enumerate(registers.GENERAL)} | {
    codes.WHvX64RegisterCr0: 46,
    codes.WHvX64RegisterCr2: 47,
    codes.WHvX64RegisterCr3: 48,
    codes.WHvX64RegisterCr4: 49,
    codes.WHvX64RegisterCr8: 50,
    codes.WHvX64RegisterEfer: 51,
}
_SEGMENT_AT: Final = {name: _SEGMENTS + 3 * i for i, (_, name) in enumerate(registers.SEGMENTS)}
_TABLE_AT: Final = {name: _TABLES + 2 * i for i, (_, name) in enumerate(registers.TABLES)}
_MSR_OF: Final = {name: msr for msr, name in registers.MSRS.items()}
_MSRS_ABSENT: Final = frozenset((codes.WHvX64RegisterTscAdjust, codes.WHvX64RegisterSpecCtrl, codes.WHvX64RegisterXss))
_SYNTHETIC: Final = {
    codes.WHvRegisterGuestOsId: enlightenments.GUEST_OS_ID,
    codes.WHvX64RegisterHypercall: enlightenments.HYPERCALL,
    codes.WHvRegisterReferenceTsc: enlightenments.REFERENCE_TSC,
    codes.WHvRegisterVpAssistPage: enlightenments.VP_ASSIST_PAGE,
}
_EVENTS: Final = frozenset(
    (
        codes.WHvRegisterPendingInterruption,
        codes.WHvRegisterInterruptState,
        codes.WHvRegisterPendingEvent,
        codes.WHvRegisterInternalActivityState,
    )
)
_COMPACTED: Final = 1 << 63 | 3
_PG, _PE = 1 << 31, 1


class Processor:
    """See `SimulatedPartition`; called with no run of this processor under way, but for `run` itself."""

    def __init__(self, partition: SimulatedPartition, index: int) -> None:
        self.partition = partition
        self.index = index
        self.running = False
        self._shim: Any = partition.shim
        self._handle = partition.handle
        self._flat = (ctypes.c_uint64 * _WORDS)()
        self._exit = library.Exit()
        self._shim.mv_vcpu_create(self._handle, index)

    # Running

    def run(self, context: int) -> int:
        shim, handle, index, found = self._shim, self._handle, self.index, self._exit
        while True:
            self.running = True
            stop = shim.mv_vcpu_run(handle, index)
            self.running = False
            if stop == _KICKED:
                return self._give(context, codes.WHvRunVpExitReasonCanceled)
            if stop == _HALTED:
                return self._give(context, codes.WHvRunVpExitReasonX64Halt)
            if stop == _TRIPLE_FAULT:
                return self._give(context, codes.WHvRunVpExitReasonUnrecoverableException)
            if stop != _EXIT:
                return self._give(context, codes.WHvRunVpExitReasonInvalidVpRegisterValue)
            shim.mv_vcpu_exit(handle, index, ctypes.byref(found))
            kind = found.kind
            if kind in (_MSR_READ, _MSR_WRITE):
                if self._msr(kind == _MSR_WRITE):
                    continue
                return self._give_msr(context, kind == _MSR_WRITE)
            if kind == _EOI:
                return self._give(context, codes.WHvRunVpExitReasonX64ApicEoi, struct.pack("<I", found.address))
            if kind in (_PIO_READ, _PIO_WRITE):
                return self._give_port(context)
            if kind:
                return self._give_memory(context)

    def _give(self, context: int, reason: int, rest: bytes = b"", length: int = 0) -> int:
        """Fill the caller's exit context."""
        flat = self._flat
        self._shim.mv_vcpu_get(self._handle, self.index, flat)
        head = self._head(reason, length)
        ctypes.memmove(context, (head + rest).ljust(SIZE, b"\0"), SIZE)
        return codes.S_OK

    def _head(self, reason: int, length: int) -> bytes:
        flat = self._flat
        activity = self._activity()
        packed = flat[_SEGMENTS + 5]
        attributes = packed & 0xFFFF
        state = (flat[_SEGMENTS + 8] >> 5 & 3) | (flat[_CONTROL] & _PE) << 2 | (flat[51] >> 10 & 1) << 4
        state |= activity[1] << 12
        lengths = length | (flat[_TPR] & 0xF) << 4
        return _CONTEXT.pack(
            reason, 0, state, lengths, 0, 0,
            flat[_SEGMENTS + 4], packed >> 32, flat[_SEGMENTS + 3] & 0xFFFF, attributes, flat[_RIP], flat[_RFLAGS],
        )  # fmt: skip

    def _code(self) -> tuple[bytes, int]:
        """The bytes at RIP and the code segment's width. `_flat` is fresh."""
        flat = self._flat
        attributes = flat[_SEGMENTS + 5] & 0xFFFF
        long = bool(flat[51] & paging.LMA and attributes & 0x2000)
        bits = 64 if long else 32 if attributes & 0x4000 else 16
        gva = flat[_RIP] if long else (flat[_SEGMENTS + 4] + flat[_RIP]) & _LOW32
        code = b""
        while len(code) < 16:
            result, gpa = self._walk(gva + len(code), False, False)
            size = min(16 - len(code), 4096 - (gpa & 0xFFF))
            at = None if result else self.partition.memory_address(gpa, size)
            if at is None:
                break
            code += ctypes.string_at(at, size)
        return code, bits

    def _give_memory(self, context: int) -> int:
        found, flat = self._exit, self._flat
        self._shim.mv_vcpu_get(self._handle, self.index, flat)
        code, _ = self._code()
        code = code[: self.partition.profile.instruction_bytes]
        write = found.kind == _MMIO_WRITE
        unmapped = self.partition.memory_address(found.address, 1) is None
        gva = found.gva
        known = gva != _MASK and not (gva ^ found.address) & 0xFFF
        info = int(write) | unmapped << 2 | known << 3
        rest = _MEMORY.pack(len(code), code, info, found.address, gva if known else 0)
        head = self._head(codes.WHvRunVpExitReasonMemoryAccess, 0)
        ctypes.memmove(context, (head + rest).ljust(SIZE, b"\0"), SIZE)
        return codes.S_OK

    def _give_port(self, context: int) -> int:
        found, flat = self._exit, self._flat
        self._shim.mv_vcpu_get(self._handle, self.index, flat)
        code, bits = self._code()
        instruction = x86_mmio.decode(code, bits)
        info = int(found.kind == _PIO_WRITE) | found.size << 1
        if instruction.is_string_instruction:
            info |= 1 << 4 | (instruction.has_rep_prefix or instruction.has_repne_prefix) << 5
        code = code[: self.partition.profile.instruction_bytes]
        ds, es = _SEGMENTS + 9, _SEGMENTS
        rest = _PORT.pack(
            len(code), code, info, found.address, flat[0], flat[1], flat[6], flat[7],
            flat[ds + 1], flat[ds + 2] >> 32, flat[ds] & 0xFFFF, flat[ds + 2] & 0xFFFF,
            flat[es + 1], flat[es + 2] >> 32, flat[es] & 0xFFFF, flat[es + 2] & 0xFFFF,
        )  # fmt: skip
        head = self._head(codes.WHvRunVpExitReasonX64IoPortAccess, instruction.len)
        ctypes.memmove(context, (head + rest).ljust(SIZE, b"\0"), SIZE)
        return codes.S_OK

    def _msr(self, write: bool) -> bool:
        """An MSR the processor behind does not have. Returns whether it was answered here."""
        partition, found, flat = self.partition, self._exit, self._flat
        msr = found.address
        if partition.synthetic:
            answer: int | None
            if write:
                answer = 0 if partition.enlightenments.write(msr, self.index, found.value, partition.time()) else None
            else:
                answer = partition.enlightenments.read(msr, self.index)
            if answer is not None:
                self._shim.mv_vcpu_get(self._handle, self.index, flat)
                flat[_RIP] = (flat[_RIP] + 2) & _MASK
                if not write:
                    flat[0], flat[2] = answer & _LOW32, answer >> 32
                self._shim.mv_vcpu_set(self._handle, self.index, flat)
                return True
        if partition.msr_exits:
            return False
        words = self._activity()
        words[4], words[5], words[6] = x86_mmio.GENERAL_PROTECTION + 1, 0, 0
        self._set_activity(words)
        return True

    def _give_msr(self, context: int, write: bool) -> int:
        flat = self._flat
        self._shim.mv_vcpu_get(self._handle, self.index, flat)
        rest = _MSR.pack(int(write), self._exit.address & _LOW32, flat[0], flat[2])
        head = self._head(codes.WHvRunVpExitReasonX64MsrAccess, 2)
        ctypes.memmove(context, (head + rest).ljust(SIZE, b"\0"), SIZE)
        return codes.S_OK

    def _activity(self) -> Any:
        words = (ctypes.c_uint64 * 7)()
        self._shim.mv_vcpu_activity(self._handle, self.index, words, 0)
        return words

    def _set_activity(self, words: Any) -> None:
        self._shim.mv_vcpu_activity(self._handle, self.index, words, 1)

    # Addresses

    def _walk(self, gva: int, write: bool, user: bool) -> tuple[int, int]:
        flat = self._flat
        return paging.walk(self.partition.load, flat[46], flat[48], flat[49], flat[51], gva, write, user)

    def translate(self, gva: int, access: int) -> tuple[int, int]:
        """WHvTranslateGva's result code and the address. A device's address is one that is not mapped."""
        self._shim.mv_vcpu_get(self._handle, self.index, self._flat)
        exempt = access & codes.WHvTranslateGvaFlagPrivilegeExempt
        user = not exempt and self._flat[_SEGMENTS + 8] >> 5 & 3 == 3
        write = bool(access & codes.WHvTranslateGvaFlagValidateWrite)
        code, gpa = self._walk(gva & _MASK, write, bool(user))
        if code == codes.WHvTranslateGvaResultSuccess and self.partition.memory_address(gpa, 1) is None:
            return codes.WHvTranslateGvaResultGpaUnmapped, gpa
        return code, gpa

    # Registers

    def get_registers(self, names_at: int, count: int, values_at: int) -> int:
        if not names_at or not values_at or values_at % 16 or not 0 < count <= 256:
            return codes.E_INVALIDARG
        names = (ctypes.c_uint32 * count).from_address(names_at)
        values = (ctypes.c_uint64 * (2 * count)).from_address(values_at)
        flat = self._flat
        self._shim.mv_vcpu_get(self._handle, self.index, flat)
        for i, name in enumerate(names):
            at = _FLAT.get(name)
            if at is not None:
                values[2 * i], values[2 * i + 1] = flat[at], 0
                continue
            value = self._get(name)
            if value is None:
                return codes.WHV_E_INVALID_VP_REGISTER_NAME
            values[2 * i], values[2 * i + 1] = value
        return codes.S_OK

    def _get(self, name: int) -> tuple[int, int] | None:
        flat = self._flat
        at = _SEGMENT_AT.get(name)
        if at is not None:
            packed = flat[at + 2]
            return flat[at + 1], packed >> 32 | (flat[at] & 0xFFFF) << 32 | (packed & 0xFFFF) << 48
        at = _TABLE_AT.get(name)
        if at is not None:
            return (flat[at + 1] & 0xFFFF) << 48, flat[at]
        if name in self.partition.profile.unknown_registers:
            return None
        if name in _EVENTS:
            return self._get_event(name)
        if name in _SYNTHETIC:
            if not self.partition.synthetic:
                return None
            return self.partition.enlightenments.read(_SYNTHETIC[name], self.index) or 0, 0
        if name == codes.WHvX64RegisterInitialApicId:
            return self.index, 0
        return self._get_cold(name)

    def _get_cold(self, name: int) -> tuple[int, int] | None:
        """What needs the processor's whole state, or the processor itself."""
        shim, handle, index = self._shim, self._handle, self.index
        msr = _MSR_OF.get(name)
        if msr is not None:
            value = ctypes.c_uint64()
            absent = name in _MSRS_ABSENT or self._others_run()
            if absent or not shim.mv_vcpu_msr(handle, index, msr, ctypes.byref(value), 0):
                return None
            return value.value, 0
        shim.mv_lock(handle)
        try:
            env = shim.mv_vcpu_state(handle, index)
            if name == codes.WHvX64RegisterXCr0:
                return ctypes.c_uint64.from_address(shim.mv_env_xcr0(env)).value, 0
            if codes.WHvX64RegisterDr0 <= name <= codes.WHvX64RegisterDr7:
                return self._debug(env)[self._debug_at(name)], 0
            if codes.WHvX64RegisterXmm0 <= name <= codes.WHvX64RegisterXmm15:
                area = ctypes.create_string_buffer(576)
                shim.mv_env_get_xsave(env, area)
                low, high = struct.unpack_from("<QQ", area, 160 + 16 * (name - codes.WHvX64RegisterXmm0))
                return low, high
        finally:
            shim.mv_unlock(handle)
        return None

    def _others_run(self) -> bool:
        """The processor behind reads MSRs only while nobody runs; the backend never needs them otherwise."""
        return any(each.running for each in self.partition.processors.values())

    @staticmethod
    def _debug_at(name: int) -> int:
        at = name - codes.WHvX64RegisterDr0
        return at if at < 4 else at + 2  # DR4 and DR5 are not among the names

    def _debug(self, env: int) -> Any:
        words = (ctypes.c_uint64 * 8)()
        self._shim.mv_env_debug(env, words, 0)
        return words

    def _get_event(self, name: int) -> tuple[int, int]:
        run_state, shadow, nmi_masked, _, exception, code, address = self._activity()
        if name == codes.WHvRegisterInterruptState:
            return shadow | nmi_masked << 1, 0
        if name == codes.WHvRegisterInternalActivityState:
            return int(run_state == _WAIT_SIPI) | (run_state == _HLT) << 1, 0
        if name == codes.WHvRegisterPendingEvent and exception:
            return 1 | 1 << 8 | (exception - 1) << 16 | code << 32, address
        return 0, 0

    def set_registers(self, names_at: int, count: int, values_at: int) -> int:
        if not names_at or not values_at or values_at % 16 or not 0 < count <= 256:
            return codes.E_INVALIDARG
        names = (ctypes.c_uint32 * count).from_address(names_at)
        values = (ctypes.c_uint64 * (2 * count)).from_address(values_at)
        flat = self._flat
        shim, handle, index = self._shim, self._handle, self.index
        shim.mv_vcpu_get(handle, index, flat)
        cold: list[tuple[int, int, int]] = []
        for i, name in enumerate(names):
            low, high = values[2 * i], values[2 * i + 1]
            at = _FLAT.get(name)
            if at is not None:
                flat[at] = low
            elif (at := _SEGMENT_AT.get(name)) is not None:
                flat[at], flat[at + 1] = high >> 32 & 0xFFFF, low
                flat[at + 2] = (high & _LOW32) << 32 | high >> 48
            elif (at := _TABLE_AT.get(name)) is not None:
                flat[at], flat[at + 1] = high, low >> 48
            else:
                cold.append((name, low, high))
        if (flat[_CONTROL] & _PG and not flat[_CONTROL] & _PE) or flat[_TPR] > 15:
            return codes.ERROR_HV_INVALID_REGISTER_VALUE
        if count > len(cold):
            shim.mv_vcpu_set(handle, index, flat)
        for name, low, high in cold:
            result = self._put(name, low, high)
            if result:
                return result
        return codes.S_OK

    def _put(self, name: int, low: int, high: int) -> int:
        if name in self.partition.profile.unknown_registers:
            return codes.WHV_E_INVALID_VP_REGISTER_NAME
        if name in _EVENTS:
            return self._put_event(name, low, high)
        if name in _SYNTHETIC:
            if not self.partition.synthetic:
                return codes.WHV_E_INVALID_VP_REGISTER_NAME
            self.partition.enlightenments.restore(_SYNTHETIC[name], self.index, low)
            return codes.S_OK
        if name == codes.WHvX64RegisterInitialApicId:
            return codes.S_OK if low == self.index else codes.ERROR_HV_INVALID_REGISTER_VALUE
        return self._put_cold(name, low, high)

    def _put_cold(self, name: int, low: int, high: int) -> int:
        shim, handle, index = self._shim, self._handle, self.index
        msr = _MSR_OF.get(name)
        if msr is not None:
            if name in _MSRS_ABSENT or self._others_run():
                return codes.WHV_E_INVALID_VP_REGISTER_NAME
            done = shim.mv_vcpu_msr(handle, index, msr, ctypes.byref(ctypes.c_uint64(low)), 1)
            return codes.S_OK if done else codes.ERROR_HV_INVALID_REGISTER_VALUE
        shim.mv_lock(handle)
        try:
            env = shim.mv_vcpu_state(handle, index)
            if name == codes.WHvX64RegisterXCr0:
                ctypes.c_uint64.from_address(shim.mv_env_xcr0(env)).value = low
            elif codes.WHvX64RegisterDr0 <= name <= codes.WHvX64RegisterDr7:
                words = self._debug(env)
                words[self._debug_at(name)] = low
                shim.mv_env_debug(env, words, 1)
            elif codes.WHvX64RegisterXmm0 <= name <= codes.WHvX64RegisterXmm15:
                area = ctypes.create_string_buffer(576)
                shim.mv_env_get_xsave(env, area)
                struct.pack_into("<QQ", area, 160 + 16 * (name - codes.WHvX64RegisterXmm0), low, high)
                shim.mv_env_set_xsave(env, area)
            else:
                return codes.WHV_E_INVALID_VP_REGISTER_NAME
        finally:
            shim.mv_unlock(handle)
        return codes.S_OK

    def _put_event(self, name: int, low: int, high: int) -> int:
        words = self._activity()
        if name == codes.WHvRegisterInterruptState:
            words[1], words[2] = low & 1, low >> 1 & 1
        elif name == codes.WHvRegisterInternalActivityState:
            words[0] = _WAIT_SIPI if low & 1 else _HLT if low & 2 else _RUNNABLE
        elif name == codes.WHvRegisterPendingEvent:
            if low & 1 and low >> 1 & 7 != codes.WHvX64PendingEventException:
                return codes.ERROR_HV_INVALID_REGISTER_VALUE
            words[4] = (low >> 16 & 0xFFFF) + 1 if low & 1 else 0
            words[5], words[6] = low >> 32, high
        elif low:
            return codes.ERROR_HV_INVALID_REGISTER_VALUE
        self._set_activity(words)
        return codes.S_OK

    # Larger state

    def get_xsave(self) -> bytes:
        """The compacted format, as Hyper-V gives it."""
        area = ctypes.create_string_buffer(576)
        self._locked(lambda env: self._shim.mv_env_get_xsave(env, area))
        struct.pack_into("<Q", area, 520, _COMPACTED)
        return area.raw

    def set_xsave(self, area: bytes) -> int:
        if len(area) != 576 or struct.unpack_from("<Q", area, 520)[0] != _COMPACTED:
            return codes.E_INVALIDARG
        self._locked(lambda env: self._shim.mv_env_set_xsave(env, area))
        return codes.S_OK

    def _locked(self, action: Any) -> None:
        self._shim.mv_lock(self._handle)
        try:
            action(self._shim.mv_vcpu_state(self._handle, self.index))
        finally:
            self._shim.mv_unlock(self._handle)

    def get_lapic(self) -> bytes:
        page = ctypes.create_string_buffer(4096)
        self._shim.mv_vcpu_apic(self._handle, self.index, page, 0)
        return page.raw

    def set_lapic(self, page: bytes) -> int:
        self._shim.mv_vcpu_apic(self._handle, self.index, ctypes.create_string_buffer(page, 4096), 1)
        return codes.S_OK

"""One virtual processor of a WHP partition: the run loop, and the way in and out.

How a run goes. WHvRunVirtualProcessor, a C call that releases the GIL, returns with an exit context of 224 bytes,
read through views of 16, 32 and 64 bits whose offsets come from `abi`. RIP still points at the instruction: unlike
KVM, WHP leaves it to us to carry out what exited and to move on. A plain port access needs one call to set RIP (and
RAX); everything else goes through `StoppedCpu` and the interpreter in `x86_mmio`. RIP is moved before a device writes,
and in any case before an exception of a handler leaves `run`, so a vCPU that is not running is always between
instructions.

How a kick gets in. ``_kicked`` is set, then WHvCancelRunVirtualProcessor is called. Cancelling is sticky in Hyper-V: it
ends the run at hand or else the next one. Whichever comes back to us, only the flag makes it a KICKED: a cancel that
arrives after its flag was already taken is a spurious return, and the loop goes on. As the flag is also looked at
before every entry, a Windows whose cancel did not stick would lose only the few instructions in between.

HLT. The local APICs are in the hypervisor and so HLT normally waits there. Some versions return instead: with
interrupts off that is HALTED for the caller, with interrupts on we wait a moment (a message or a kick ends it) and
enter again.

Threads: `run` on one thread at a time; `kick` and `wake` from anywhere; everything else while not running.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any, Final

from ...bus import Bus
from ...errors import HostError, StateError
from .. import x86_mmio
from ..base import STOP_HALTED, STOP_KICKED, TRIPLE_FAULT, Registers, StopReason, VcpuStop
from . import abi, codes, flags, registers, state
from .api import aligned, error_for
from .instruction import StoppedCpu, translate

if TYPE_CHECKING:
    from .partition import WhpPartition

_EXIT: Final = abi.WHV_RUN_VP_EXIT_CONTEXT
SIZE: Final = ctypes.sizeof(_EXIT)
_VP: Final = _EXIT.VpContext.offset
_U: Final = _EXIT.AsUINT64.offset
_STATE_U16: Final = (_VP + abi.WHV_X64_VP_EXIT_CONTEXT.ExecutionState.offset) // 2
_LENGTH_U8: Final = _VP + abi.WHV_X64_VP_EXIT_CONTEXT.InstructionLength.offset
_CS_ATTRIBUTES_U16: Final = (
    _VP + abi.WHV_X64_VP_EXIT_CONTEXT.Cs.offset + abi.WHV_X64_SEGMENT_REGISTER.Attributes.offset
) // 2
_CS_BASE_U64: Final = (_VP + abi.WHV_X64_VP_EXIT_CONTEXT.Cs.offset) // 8
_RIP_U64: Final = (_VP + abi.WHV_X64_VP_EXIT_CONTEXT.Rip.offset) // 8
_RFLAGS_U64: Final = (_VP + abi.WHV_X64_VP_EXIT_CONTEXT.Rflags.offset) // 8
# Memory and port exits begin alike: count, bytes, access information.
_COUNT_U8: Final = _U
_BYTES: Final = _U + abi.WHV_MEMORY_ACCESS_CONTEXT.InstructionBytes.offset
_INFO_U32: Final = (_U + abi.WHV_MEMORY_ACCESS_CONTEXT.AccessInfo.offset) // 4
_GPA_U64: Final = (_U + abi.WHV_MEMORY_ACCESS_CONTEXT.Gpa.offset) // 8
_GVA_U64: Final = (_U + abi.WHV_MEMORY_ACCESS_CONTEXT.Gva.offset) // 8
_PORT_U16: Final = (_U + abi.WHV_X64_IO_PORT_ACCESS_CONTEXT.InstructionBytes.offset + 20) // 2
_RAX_U64: Final = (_U + abi.WHV_X64_IO_PORT_ACCESS_CONTEXT.Rax.offset) // 8
_MSR_INFO_U32: Final = _U // 4
_MSR_NUMBER_U32: Final = (_U + abi.WHV_X64_MSR_ACCESS_CONTEXT.MsrNumber.offset) // 4
_MSR_RAX_U64: Final = (_U + abi.WHV_X64_MSR_ACCESS_CONTEXT.Rax.offset) // 8
_EOI_VECTOR_U32: Final = _U // 4

# WHV_X64_VP_EXECUTION_STATE, WHV_MEMORY_ACCESS_INFO and WHV_X64_IO_PORT_ACCESS_INFO
_EFER_LMA, _SHADOW = 1 << 4, 1 << 12
_GVA_VALID: Final = 1 << 3
_IS_WRITE, _STRING, _REP = 1, 1 << 4, 1 << 5
_CS_LONG, _CS_DEFAULT = 1 << 13, 1 << 14
_RFLAGS_IF: Final = 1 << 9
_MASK: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
_LOW32: Final = 0xFFFF_FFFF
_HALT_WAIT_S: Final = 0.001

# MSRs that Linux touches without a guard and that hold nothing here: platform id, SMI count, microcode version,
# platform information, miscellaneous features, debug control. Reads are 0, writes do nothing. All others are #GP.
HARMLESS_MSRS: Final = frozenset((0x17, 0x34, 0x79, 0x8B, 0xCE, 0x140, 0x1D9))

_CRASHES: Final = {
    codes.WHvRunVpExitReasonUnrecoverableException: TRIPLE_FAULT,
    codes.WHvRunVpExitReasonInvalidVpRegisterValue: "the processor refused to enter the guest: its state is not one a "
    "processor can be in",
    codes.WHvRunVpExitReasonUnsupportedFeature: "the guest used a feature that Hyper-V does not emulate",
    codes.WHvRunVpExitReasonException: "Hyper-V returned an exception that was never asked for",
    codes.WHvRunVpExitReasonHypercall: "Hyper-V returned a hypercall that was never asked for",
}
_EMPTY: Final = frozenset(
    (
        codes.WHvRunVpExitReasonNone,
        codes.WHvRunVpExitReasonX64InterruptWindow,
        codes.WHvRunVpExitReasonSynicSintDeliverable,
    )
)


class WhpVcpu:
    """A vCPU of a `WhpPartition`; made by its `create_vcpu`."""

    def __init__(self, partition: WhpPartition, index: int) -> None:
        self.index = index
        self.partition = partition
        api = partition.api
        self._run: Any = api.functions["WHvRunVirtualProcessor"]
        self._cancel: Any = api.functions["WHvCancelRunVirtualProcessor"]
        self._get: Any = api.functions["WHvGetVirtualProcessorRegisters"]
        self._set: Any = api.functions["WHvSetVirtualProcessorRegisters"]
        self._context = aligned(SIZE)
        self._context_at = ctypes.addressof(self._context)
        self._u8 = memoryview(self._context).cast("B")
        self._u16, self._u32, self._u64 = (self._u8.cast(kind) for kind in ("H", "I", "Q"))
        self._quick = registers.Buffer(4)
        self._one = registers.Buffer(1)
        self._cpu = StoppedCpu(self)
        self._kicked = False
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = False
        self.exits: dict[int, int] = {}  # reason: how often, for statistics

    def __repr__(self) -> str:
        return f"<WhpVcpu {self.index}>"

    @property
    def handle(self) -> int:
        """The partition's. Raises StateError when it is closed."""
        handle = self.partition.handle
        if not handle:
            raise StateError("the partition is closed")
        return handle

    # Running

    def run(self, bus: Bus) -> VcpuStop:
        """See `base.Vcpu.run`. Raises HostError if the host refuses to run it."""
        run, handle, index, context_at = self._run, self.handle, self.index, self._context_at
        u32, exits = self._u32, self.exits
        while True:
            if self._kicked:
                self._kicked = False
                return STOP_KICKED
            result = run(handle, index, context_at, SIZE)
            if result:
                raise error_for("WHvRunVirtualProcessor", result)
            reason = u32[0]
            exits[reason] = exits.get(reason, 0) + 1
            if reason == codes.WHvRunVpExitReasonX64IoPortAccess:
                stop = self._port(bus)
            elif reason == codes.WHvRunVpExitReasonMemoryAccess:
                stop = self._memory(bus)
            elif reason == codes.WHvRunVpExitReasonX64ApicEoi:
                bus.apic_eoi(u32[_EOI_VECTOR_U32])
                continue
            elif reason == codes.WHvRunVpExitReasonCanceled:
                continue  # the flag says whether that was a kick
            else:
                stop = self._other(reason)
            if stop is not None:
                return stop

    def enter_once(self) -> int:
        """One WHvRunVirtualProcessor, nothing served. Returns the exit reason: for ``microvm selftest``."""
        result = self._run(self.handle, self.index, self._context_at, SIZE)
        if result:
            raise error_for("WHvRunVirtualProcessor", result)
        return self._u32[0]

    def kick(self) -> None:
        """See `base.Vcpu.kick`."""
        with self._lock:
            if self._closed:
                return
            self._kicked = True
            self._wake.set()
            self._cancel(self.partition.handle, self.index, 0)

    def wake(self) -> None:
        """An interrupt may have come: ends a wait in HLT. Any thread."""
        self._wake.set()

    def _port(self, bus: Bus) -> VcpuStop | None:
        info = self._u32[_INFO_U32]
        length = self._u8[_LENGTH_U8] & 0xF
        if info & (_STRING | _REP) or not length:
            return self._interpret(bus, port=True)
        size = info >> 1 & 7
        port = self._u16[_PORT_U16]
        rip = self._next_rip(length)
        if info & _IS_WRITE:
            self._quick_set((codes.WHvX64RegisterRip, rip))
            bus.pio_write(port, size, self._u64[_RAX_U64] & _MASK[size])
            return None
        try:
            value = bus.pio_read(port, size)
        except BaseException:
            self._quick_set((codes.WHvX64RegisterRip, rip))
            raise
        rax = self._u64[_RAX_U64]
        rax = value & _LOW32 if size == 4 else rax & ~_MASK[size] | value & _MASK[size]
        self._quick_set((codes.WHvX64RegisterRip, rip), (codes.WHvX64RegisterRax, rax))
        return None

    def _next_rip(self, length: int) -> int:
        rip = self._u64[_RIP_U64] + length
        return rip if self._bits() == 64 else rip & _LOW32

    def _bits(self) -> int:
        attributes = self._u16[_CS_ATTRIBUTES_U16]
        if attributes & _CS_LONG and self._u16[_STATE_U16] & _EFER_LMA:
            return 64
        return 32 if attributes & _CS_DEFAULT else 16

    def _quick_set(self, *values: tuple[int, int]) -> None:
        """Set up to three registers, and end the interrupt shadow if the instruction stood in one."""
        quick = self._quick
        names, words = quick.names, quick.words
        count = 0
        for name, value in values:
            names[count], words[2 * count], words[2 * count + 1] = name, value, 0
            count += 1
        if self._u16[_STATE_U16] & _SHADOW:
            names[count], words[2 * count], words[2 * count + 1] = codes.WHvRegisterInterruptState, 0, 0
            count += 1
        result = self._set(self.partition.handle, self.index, quick.names_at, count, quick.values_at)
        if result:
            raise error_for("WHvSetVirtualProcessorRegisters", result)

    def _memory(self, bus: Bus) -> VcpuStop | None:
        """A plain move needs at most one register; all else is interpreted."""
        u64 = self._u64
        gpa = u64[_GPA_U64]
        code = bytes(self._u8[_BYTES : _BYTES + min(self._u8[_COUNT_U8], 16)])
        move = x86_mmio.plain_move(code, self._bits())
        # With its virtual address an exit names the operand's first byte, unless that was on the page before.
        known = self._u32[_INFO_U32] & _GVA_VALID
        if move is None or not known or not 0 < gpa & 0xFFF <= 0x1000 - move.size:
            return self._interpret(bus, port=False)
        rip = self._next_rip(move.length)
        size, register = move.size, move.register
        if move.is_write:
            value = move.constant if register is None else self._general(register) & _MASK[size]
            self._quick_set((codes.WHvX64RegisterRip, rip))
            bus.mmio_write(gpa, size, value)
            return None
        try:
            value = bus.mmio_read(gpa, size)
        except BaseException:
            self._quick_set((codes.WHvX64RegisterRip, rip))
            raise
        assert register is not None
        if size < 4:
            value = self._general(register) & ~_MASK[size] | value
        self._quick_set((codes.WHvX64RegisterRip, rip), (register, value))
        return None

    def _general(self, index: int) -> int:
        """One general register; their WHV names are their numbers."""
        one = self._one
        one.names[0] = index
        result = self._get(self.partition.handle, self.index, one.names_at, 1, one.values_at)
        if result:
            raise error_for("WHvGetVirtualProcessorRegisters", result)
        value: int = one.words[0]
        return value

    def _interpret(self, bus: Bus, port: bool) -> VcpuStop | None:
        """Carry out the instruction at RIP."""
        u64, cpu, bits = self._u64, self._cpu, self._bits()
        rip = u64[_RIP_U64]
        execution = self._u16[_STATE_U16]
        cpu.begin(bus, rip, u64[_RFLAGS_U64], bits, execution & 3)
        code = bytes(self._u8[_BYTES : _BYTES + min(self._u8[_COUNT_U8], 16)])
        if not port and self._u32[_INFO_U32] & _GVA_VALID:
            cpu.access_at(u64[_GVA_U64], u64[_GPA_U64], one_operand=False)
        try:
            try:
                instruction = x86_mmio.decode(code, bits)
            except x86_mmio.TooShort:  # fewer bytes than the instruction has: fetch them
                linear = rip if bits == 64 else (u64[_CS_BASE_U64] + rip) & _LOW32
                code = cpu.fetch(linear, x86_mmio.MAX_LENGTH)
                instruction = x86_mmio.decode(code.ljust(x86_mmio.MAX_LENGTH, b"\0") if code else code, bits)
            if not port and not instruction.is_string_instruction:
                cpu.access_at(None, u64[_GPA_U64], one_operand=True)
            x86_mmio.execute(instruction, cpu)
        except x86_mmio.Fault as fault:
            cpu.end(shadow=False)
            self.raise_exception(fault.vector, fault.code, fault.address)
            return None
        except x86_mmio.Unsupported as error:
            return self._crashed(f"at {rip:#x} the guest used {error}")
        except x86_mmio.TooShort:
            return self._crashed(f"the instruction at {rip:#x} is not in memory")
        except BaseException:
            cpu.end(shadow=bool(execution & _SHADOW))
            raise
        cpu.end(shadow=bool(execution & _SHADOW))
        return None

    def raise_exception(self, vector: int, code: int, address: int = 0) -> None:
        """Let the guest take an exception with an error code before its next instruction. [SDM] 3A 6.15"""
        low = 1 | codes.WHvX64PendingEventException << 1 | 1 << 8 | vector << 16 | code << 32
        registers.put(
            self.partition.api, self.handle, self.index, [(codes.WHvRegisterPendingEvent, (low, address))]
        )  # fmt: skip

    def _other(self, reason: int) -> VcpuStop | None:
        if reason == codes.WHvRunVpExitReasonX64MsrAccess:
            self._msr()
            return None
        if reason == codes.WHvRunVpExitReasonX64Cpuid:
            self._cpuid()
            return None
        if reason == codes.WHvRunVpExitReasonX64Rdtsc:
            self._rdtsc()
            return None
        if reason == codes.WHvRunVpExitReasonX64Halt:
            if not self._u64[_RFLAGS_U64] & _RFLAGS_IF:
                return STOP_HALTED
            self._wake.wait(_HALT_WAIT_S)  # its timer is in the hypervisor: never wait longer than that may matter
            self._wake.clear()
            return None
        if reason in _EMPTY:
            return None
        detail = _CRASHES.get(reason) or f"Hyper-V returned with exit reason {reason:#x}, which is not known here"
        return self._crashed(detail)

    def _msr(self) -> None:
        number = self._u32[_MSR_NUMBER_U32]
        if number not in HARMLESS_MSRS:
            self.raise_exception(x86_mmio.GENERAL_PROTECTION, 0)
        elif self._u32[_MSR_INFO_U32] & _IS_WRITE:
            self._quick_set((codes.WHvX64RegisterRip, self._next_rip(2)))
        else:
            self._quick_set(
                (codes.WHvX64RegisterRip, self._next_rip(2)),
                (codes.WHvX64RegisterRax, 0),
                (codes.WHvX64RegisterRdx, 0),
            )

    def _cpuid(self) -> None:
        """Not asked for; should one come, the hypervisor's own answer is the right one."""
        answer = abi.WHV_RUN_VP_EXIT_CONTEXT.from_buffer(self._context).CpuidAccess
        values = [
            (codes.WHvX64RegisterRip, (self._next_rip(2), 0)),
            (codes.WHvX64RegisterRax, (answer.DefaultResultRax & _LOW32, 0)),
            (codes.WHvX64RegisterRbx, (answer.DefaultResultRbx & _LOW32, 0)),
            (codes.WHvX64RegisterRcx, (answer.DefaultResultRcx & _LOW32, 0)),
            (codes.WHvX64RegisterRdx, (answer.DefaultResultRdx & _LOW32, 0)),
        ]
        registers.put(self.partition.api, self.handle, self.index, values)

    def _rdtsc(self) -> None:
        """Not asked for either: answer with the counter as it was, and TSC_AUX for RDTSCP."""
        tsc = abi.WHV_RUN_VP_EXIT_CONTEXT.from_buffer(self._context).ReadTsc
        length = self._u8[_LENGTH_U8] & 0xF or (3 if tsc.RdtscInfo.IsRdtscp else 2)
        values = [
            (codes.WHvX64RegisterRip, (self._next_rip(length), 0)),
            (codes.WHvX64RegisterRax, (tsc.Tsc & _LOW32, 0)),
            (codes.WHvX64RegisterRdx, (tsc.Tsc >> 32, 0)),
        ]
        if tsc.RdtscInfo.IsRdtscp:
            values.append((codes.WHvX64RegisterRcx, (tsc.TscAux & _LOW32, 0)))
        registers.put(self.partition.api, self.handle, self.index, values)

    def _crashed(self, detail: str) -> VcpuStop:
        try:
            found = self.get_registers()
        except HostError:
            found = None
        return VcpuStop(StopReason.CRASHED, detail, found)

    # State

    def reset(self) -> None:
        """The registers after reset; Hyper-V's own differ between versions. Called once, before the first run."""
        api = self.partition.api
        self.set_registers(Registers())
        registers.try_put(api, self.handle, self.index, [(codes.WHvX64RegisterInitialApicId, (self.index, 0))])

    def get_registers(self) -> Registers:
        return registers.from_values(registers.get(self.partition.api, self.handle, self.index, registers.ALL))

    def set_registers(self, values: Registers) -> None:
        """See `base.Vcpu.set_registers`. An exception that was to be raised at the old RIP is dropped."""
        api = self.partition.api
        pairs = registers.to_values(values)
        (activity, _) = registers.get(api, self.handle, self.index, (codes.WHvRegisterInternalActivityState,))[0]
        halted = flags.WHV_INTERNAL_ACTIVITY_REGISTER(AsUINT64=activity)
        if halted.HaltSuspend:
            halted.HaltSuspend = 0
            pairs.append((codes.WHvRegisterInternalActivityState, (halted.AsUINT64, 0)))
        registers.put(api, self.handle, self.index, pairs)

    def get_msr(self, index: int) -> int:
        name, _ = self._msr_register(index)
        return registers.get(self.partition.api, self.handle, self.index, (name,))[0][0]

    def set_msr(self, index: int, value: int) -> None:
        name, is_segment = self._msr_register(index)
        api = self.partition.api
        high = registers.get(api, self.handle, self.index, (name,))[0][1] if is_segment else 0
        result = registers.try_put(api, self.handle, self.index, [(name, (value, high))])
        if result in registers.NO_SUCH_REGISTER:
            raise KeyError(index)
        if result:
            raise error_for("WHvSetVirtualProcessorRegisters", result)

    def _msr_register(self, index: int) -> tuple[int, bool]:
        """The register that holds the MSR, and whether it is a segment of which the MSR is the base."""
        if index == registers.MSR_FS_BASE:
            return codes.WHvX64RegisterFs, True
        if index == registers.MSR_GS_BASE:
            return codes.WHvX64RegisterGs, True
        name = registers.MSRS.get(index)
        if name is None or not state.has_register(self, name):
            raise KeyError(index)
        return name, False

    def get_xsave(self) -> bytes:
        return state.standard_xsave(state.get_xsave(self))

    def set_xsave(self, area: bytes) -> None:
        state.set_xsave(self, state.merge_xsave(state.get_xsave(self), area))

    def translate_gva(self, gva: int, flags: int) -> tuple[int, int]:
        """WHvTranslateGva: its result code and the guest-physical address."""
        return translate(self, gva, flags)

    def translate(self, gva: int) -> int | None:
        result, gpa = translate(self, gva, codes.WHvTranslateGvaFlagPrivilegeExempt)
        return gpa if result in (codes.WHvTranslateGvaResultSuccess, codes.WHvTranslateGvaResultGpaUnmapped) else None

    def clocks(self) -> list[tuple[int, tuple[int, int]]]:
        """The TSC and its deadline, in the order to set them: for a Windows that cannot stop time."""
        return state.clocks(self)

    def save(self) -> bytes:
        return state.save(self)

    def restore(self, blob: bytes) -> None:
        """See `base.Vcpu.restore`. Raises SnapshotError."""
        self.partition.clocks_restored(self.index, state.restore(self, blob))

    def close(self) -> None:
        """Called by the partition. Idempotent."""
        with self._lock:
            self._closed = True

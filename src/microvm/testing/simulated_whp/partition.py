"""One simulated partition: properties, memory, interrupts, time; its processors are in `processor`."""

from __future__ import annotations

import ctypes
from typing import Any, Final

from ...hypervisor.base import PartitionConfig
from ...hypervisor.soft import cpuid, library
from ...hypervisor.soft.partition import SoftPartition
from ...hypervisor.whp import abi, codes, flags
from . import capabilities, enlightenments
from .processor import SIZE, Processor
from .profiles import Profile
from .results import Refused, hand_out

_PAGE: Final = 4096
_MAX_CPUID_LEAVES: Final = 64
_INVARIANT_TSC_LEAF: Final = 0x8000_0007
_TSC_DEADLINE: Final = 1 << 24
_MSR_EXIT: Final = 2  # WHV_EXTENDED_VM_EXITS.X64MsrExit
_UNHANDLED_MSRS: Final = 1
_MODES: Final = frozenset((0, 1, 4, 5, 6, 9))

# property: its size in bytes, 0 where it is a list
_PROPERTIES: Final = {
    codes.WHvPartitionPropertyCodeProcessorCount: 4,
    codes.WHvPartitionPropertyCodeLocalApicEmulationMode: 4,
    codes.WHvPartitionPropertyCodeSeparateSecurityDomain: 4,
    codes.WHvPartitionPropertyCodeExtendedVmExits: 8,
    codes.WHvPartitionPropertyCodeX64MsrExitBitmap: 8,
    codes.WHvPartitionPropertyCodeExceptionExitBitmap: 8,
    codes.WHvPartitionPropertyCodeProcessorFeaturesBanks: 24,
    codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks: 16,
    codes.WHvPartitionPropertyCodeProcessorClockFrequency: 8,
    codes.WHvPartitionPropertyCodeInterruptClockFrequency: 8,
    codes.WHvPartitionPropertyCodeReferenceTime: 8,
    codes.WHvPartitionPropertyCodeCpuidResultList: 0,
    codes.WHvPartitionPropertyCodeCpuidExitList: 0,
}


class SimulatedPartition:
    """Its methods named WHv... are the functions without their first argument; they return an HRESULT or None."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.properties: dict[int, bytes] = {}
        self.processors: dict[int, Processor] = {}
        self.mappings: dict[int, tuple[int, int, int]] = {}  # gpa: size, hva, flags
        self.soft: SoftPartition | None = None
        self.suspended = False
        self.enlightenments = enlightenments.Enlightenments(self._store, self.time)

    # For the processors

    @property
    def shim(self) -> Any:
        assert self.soft is not None
        return self.soft._shim

    @property
    def handle(self) -> int:
        assert self.soft is not None
        assert self.soft.handle is not None
        return self.soft.handle

    def time(self) -> int:
        """Nanoseconds."""
        return int(self.shim.mv_time(self.handle))

    @property
    def synthetic(self) -> int:
        raw = self.properties.get(codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks)
        return int.from_bytes(raw[8:16], "little") if raw else 0

    @property
    def msr_exits(self) -> bool:
        """Whether accesses to unknown MSRs exit; else they are #GP."""
        exits = self._word(codes.WHvPartitionPropertyCodeExtendedVmExits)
        return bool(exits & _MSR_EXIT and self._word(codes.WHvPartitionPropertyCodeX64MsrExitBitmap) & _UNHANDLED_MSRS)

    def _word(self, code: int) -> int:
        return int.from_bytes(self.properties.get(code, b""), "little")

    def load(self, gpa: int, size: int) -> int | None:
        """A word of guest memory, None where there is none."""
        at = self.memory_address(gpa, size)
        return None if at is None else int.from_bytes(ctypes.string_at(at, size), "little")

    def memory_address(self, gpa: int, size: int) -> int | None:
        """The host's address of guest memory."""
        for start, (length, hva, _) in self.mappings.items():
            if start <= gpa and gpa + size <= start + length:
                return hva + gpa - start
        return None

    def _store(self, gpa: int, data: bytes) -> bool:
        at = self.memory_address(gpa, len(data))
        if at is None:
            return False
        ctypes.memmove(at, data, len(data))
        self.host_wrote(gpa, len(data))
        return True

    def host_wrote(self, gpa: int, size: int) -> None:
        """Forget code translated from there."""
        if self.soft is not None:
            self.soft.host_wrote(gpa, size)

    def close(self) -> None:
        if self.soft is not None:
            self.soft.close()

    # Properties and set-up

    def WHvSetPartitionProperty(self, code: int, buffer: int, size: int) -> int:
        expected = _PROPERTIES.get(code)
        if expected is None or code in self.profile.unknown_properties:
            return codes.WHV_E_UNKNOWN_PROPERTY
        if expected and size != expected:
            return codes.E_INVALIDARG if size > expected else codes.WHV_E_INSUFFICIENT_BUFFER
        if self.soft is not None:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        data = ctypes.string_at(buffer, size)
        result = self._check_property(code, data)
        if result == codes.S_OK:
            self.properties[code] = data
        return result

    def _check_property(self, code: int, data: bytes) -> int:
        value = int.from_bytes(data, "little")
        good = True
        if code == codes.WHvPartitionPropertyCodeProcessorCount:
            good = 1 <= value <= 32
        elif code == codes.WHvPartitionPropertyCodeLocalApicEmulationMode:
            good = value == codes.WHvX64LocalApicEmulationModeXApic  # what the processor behind has
        elif code == codes.WHvPartitionPropertyCodeExtendedVmExits:
            good = not value & ~_MSR_EXIT
        elif code == codes.WHvPartitionPropertyCodeX64MsrExitBitmap:
            good = not value & ~_UNHANDLED_MSRS
        elif code == codes.WHvPartitionPropertyCodeProcessorFeaturesBanks:
            banks = abi.WHV_PROCESSOR_FEATURES_BANKS.from_buffer_copy(data)
            possible = capabilities.processor_features(self.profile)
            asked_for = (
                banks.Bank0.AsUINT64 & ~possible.Bank0.AsUINT64 | banks.Bank1.AsUINT64 & ~possible.Bank1.AsUINT64
            )
            refused = banks.Bank1.TscInvariantSupport and not self.profile.invariant_tsc
            good = banks.BanksCount in (1, 2) and not asked_for and not refused
        elif code == codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks:
            features = abi.WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS.from_buffer_copy(data)
            offered = flags.WHV_SYNTHETIC_PROCESSOR_FEATURES(**dict.fromkeys(capabilities.SYNTHETIC, 1))
            good = features.BanksCount == 1 and not features.Bank0.AsUINT64 & ~offered.AsUINT64
        elif code == codes.WHvPartitionPropertyCodeCpuidResultList:
            each = ctypes.sizeof(abi.WHV_X64_CPUID_RESULT)
            good = len(data) % each == 0 and len(data) // each <= _MAX_CPUID_LEAVES
        return codes.S_OK if good else codes.E_INVALIDARG

    def WHvGetPartitionProperty(self, code: int, buffer: int, size: int, written: int | None) -> int:
        if code not in _PROPERTIES or code in self.profile.unknown_properties:
            return codes.WHV_E_UNKNOWN_PROPERTY
        data = self.properties.get(code, bytes(_PROPERTIES[code]))
        if code == codes.WHvPartitionPropertyCodeReferenceTime and self.soft is not None:
            data = (self.time() // 100).to_bytes(8, "little")
        return hand_out(data, buffer, size, written)

    def WHvSetupPartition(self) -> int:
        if self.soft is not None:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        count = self._word(codes.WHvPartitionPropertyCodeProcessorCount)
        if not count:
            return codes.WHV_E_INVALID_PARTITION_CONFIG
        if not self._word(codes.WHvPartitionPropertyCodeLocalApicEmulationMode):
            return codes.WHV_E_UNSUPPORTED_PROCESSOR_CONFIG  # the processor behind cannot be without
        self.soft = SoftPartition(PartitionConfig(vcpus=count))
        self.shim.mv_set_exits(self.handle, 1)
        self._set_cpuid()
        return codes.S_OK

    def _set_cpuid(self) -> None:
        out = (ctypes.c_uint32 * 4)()

        def engine(leaf: int, subleaf: int) -> tuple[int, int, int, int]:
            self.shim.mv_engine_cpuid(self.handle, leaf, subleaf, out)
            return out[0], out[1], out[2], out[3]

        raw = self.properties.get(codes.WHvPartitionPropertyCodeCpuidResultList, b"")
        given = [
            abi.WHV_X64_CPUID_RESULT.from_buffer_copy(raw, at)
            for at in range(0, len(raw), ctypes.sizeof(abi.WHV_X64_CPUID_RESULT))
        ]
        table: list[cpuid.Leaf] = [(one.Function, cpuid.ANY, one.Eax, one.Ebx, one.Ecx, one.Edx) for one in given]
        table += enlightenments.leaves(self.synthetic)
        for leaf in cpuid.leaves(engine):
            if leaf[0] in (0x15, 0x16) or leaf[0] >> 16 == 0x4000:
                continue  # a host's own answers have none of these
            if leaf[0] == 1 and not self.profile.tsc_deadline:
                leaf = (*leaf[:4], leaf[4] & ~_TSC_DEADLINE, leaf[5])
            if leaf[0] == _INVARIANT_TSC_LEAF and not self._invariant_tsc():
                leaf = (*leaf[:5], 0)
            table.append(leaf)
        entries = (library.CpuidEntry * len(table))(*(library.CpuidEntry(*leaf) for leaf in table))
        self.shim.mv_set_cpuid(self.handle, entries, len(table))

    def _invariant_tsc(self) -> bool:
        raw = self.properties.get(codes.WHvPartitionPropertyCodeProcessorFeaturesBanks)
        return bool(raw and abi.WHV_PROCESSOR_FEATURES_BANKS.from_buffer_copy(raw).Bank1.TscInvariantSupport)

    # Memory

    def WHvMapGpaRange(self, source: int | None, gpa: int, size: int, access: int) -> int:
        if self.soft is None:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        if not source or not size or (source | gpa | size) % _PAGE or access & ~0xF:
            return codes.E_INVALIDARG
        track = bool(access & codes.WHvMapGpaRangeFlagTrackDirtyPages)
        if self.shim.mv_map(self.handle, gpa, source, size, access & 7, int(track)):
            return codes.ERROR_HV_INVALID_PARAMETER
        self.mappings[gpa] = (size, source, access)
        return codes.S_OK

    def WHvUnmapGpaRange(self, gpa: int, size: int) -> int:
        """Whole mappings only: this machine does not have the capability PartialUnmap."""
        mapping = self.mappings.get(gpa)
        if mapping is None or mapping[0] != size or self.shim.mv_unmap(self.handle, gpa, size):
            return codes.WHV_E_GPA_RANGE_NOT_FOUND
        del self.mappings[gpa]
        return codes.S_OK

    def WHvQueryGpaRangeDirtyBitmap(self, gpa: int, size: int, bitmap: int | None, bitmap_size: int) -> int:
        mapping = self.mappings.get(gpa)
        if mapping is None or mapping[0] != size or not mapping[2] & codes.WHvMapGpaRangeFlagTrackDirtyPages:
            return codes.WHV_E_GPA_RANGE_NOT_FOUND
        pages = size // _PAGE
        if not bitmap:
            return codes.S_OK  # clears only
        if bitmap_size < (pages + 63) // 64 * 8 or bitmap_size % 8:
            return codes.E_INVALIDARG
        data = ctypes.create_string_buffer((pages + 7) // 8)
        self.shim.mv_dirty(self.handle, gpa, size, data)
        ctypes.memmove(bitmap, data, len(data))
        return codes.S_OK

    def WHvAdviseGpaRange(self, ranges: int, count: int, advice: int, buffer: int | None, size: int) -> int:
        return codes.S_OK if advice <= codes.WHvAdviseGpaRangeCodeUnpin else codes.E_INVALIDARG

    # Interrupts and time

    def WHvRequestInterrupt(self, control: int, size: int) -> int:
        if size != ctypes.sizeof(abi.WHV_INTERRUPT_CONTROL):
            return codes.E_INVALIDARG
        if self.soft is None:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        asked = abi.WHV_INTERRUPT_CONTROL.from_address(control)
        kind, vector, destination = asked.Type, asked.Vector, asked.Destination
        if kind not in _MODES or vector > 255 or (kind in (0, 1) and vector < 16):
            return codes.ERROR_HV_INVALID_PARAMETER
        address = 0xFEE0_0000 | (destination & 0xFF) << 12 | asked.DestinationMode << 2
        self.shim.mv_signal_msi(self.handle, address, vector | kind << 8 | asked.TriggerMode << 15)
        return codes.S_OK

    def WHvSuspendPartitionTime(self) -> int:
        if self.soft is None or any(processor.running for processor in self.processors.values()):
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        self.suspended = True
        self.shim.mv_pause_time(self.handle)
        return codes.S_OK

    def WHvResumePartitionTime(self) -> int:
        if not self.suspended:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        self.suspended = False
        self.shim.mv_resume_time(self.handle)
        return codes.S_OK

    # Processors

    def WHvCreateVirtualProcessor(self, index: int, flags_: int) -> int:
        if self.soft is None:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        if index in self.processors:
            return codes.WHV_E_VP_ALREADY_EXISTS
        if flags_ or index >= self._word(codes.WHvPartitionPropertyCodeProcessorCount):
            return codes.E_INVALIDARG
        self.processors[index] = Processor(self, index)
        return codes.S_OK

    def WHvDeleteVirtualProcessor(self, index: int) -> int:
        processor = self._processor(index)
        if processor.running:
            return codes.WHV_E_INVALID_VP_STATE
        del self.processors[index]
        return codes.S_OK

    def _processor(self, index: int) -> Processor:
        processor = self.processors.get(index)
        if processor is None:
            raise Refused(codes.WHV_E_VP_DOES_NOT_EXIST)
        return processor

    def _stopped(self, index: int) -> Processor:
        processor = self._processor(index)
        if processor.running:
            raise Refused(codes.WHV_E_INVALID_VP_STATE)
        return processor

    def WHvRunVirtualProcessor(self, index: int, context: int | None, size: int) -> int:
        processor = self._stopped(index)
        if not context or size != SIZE or context % 16:
            return codes.E_INVALIDARG
        if self.suspended:
            return codes.ERROR_HV_INVALID_PARTITION_STATE
        return processor.run(context)

    def WHvCancelRunVirtualProcessor(self, index: int, flags_: int) -> int:
        if flags_:
            return codes.E_INVALIDARG
        self._processor(index)
        self.shim.mv_vcpu_kick(self.handle, index)
        return codes.S_OK

    def WHvGetVirtualProcessorRegisters(self, index: int, names: int, count: int, values: int) -> int:
        return self._stopped(index).get_registers(names, count, values)

    def WHvSetVirtualProcessorRegisters(self, index: int, names: int, count: int, values: int) -> int:
        return self._stopped(index).set_registers(names, count, values)

    def WHvTranslateGva(self, index: int, gva: int, access: int, result: int, gpa: int) -> int:
        code, found = self._stopped(index).translate(gva, access)
        abi.WHV_TRANSLATE_GVA_RESULT.from_address(result).ResultCode = code
        ctypes.c_uint64.from_address(gpa).value = found
        return codes.S_OK

    def WHvGetVirtualProcessorXsaveState(self, index: int, buffer: int, size: int, written: int | None) -> int:
        return hand_out(self._stopped(index).get_xsave(), buffer, size, written)

    def WHvSetVirtualProcessorXsaveState(self, index: int, buffer: int, size: int) -> int:
        return self._stopped(index).set_xsave(ctypes.string_at(buffer, size))

    def WHvGetVirtualProcessorInterruptControllerState2(
        self, index: int, buffer: int, size: int, written: int | None
    ) -> int:
        return hand_out(self._stopped(index).get_lapic(), buffer, size, written)

    def WHvSetVirtualProcessorInterruptControllerState2(self, index: int, buffer: int, size: int) -> int:
        if size != _PAGE:
            return codes.E_INVALIDARG
        return self._stopped(index).set_lapic(ctypes.string_at(buffer, size))

    def WHvGetVirtualProcessorState(self, index: int, kind: int, buffer: int, size: int, written: int | None) -> int:
        if kind == codes.WHvVirtualProcessorStateTypeInterruptControllerState2:
            return self.WHvGetVirtualProcessorInterruptControllerState2(index, buffer, size, written)
        if kind == codes.WHvVirtualProcessorStateTypeXsaveState:
            return self.WHvGetVirtualProcessorXsaveState(index, buffer, size, written)
        return codes.E_INVALIDARG

    def WHvSetVirtualProcessorState(self, index: int, kind: int, buffer: int, size: int) -> int:
        if kind == codes.WHvVirtualProcessorStateTypeInterruptControllerState2:
            return self.WHvSetVirtualProcessorInterruptControllerState2(index, buffer, size)
        if kind == codes.WHvVirtualProcessorStateTypeXsaveState:
            return self.WHvSetVirtualProcessorXsaveState(index, buffer, size)
        return codes.E_INVALIDARG

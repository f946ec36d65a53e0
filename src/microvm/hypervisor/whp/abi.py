"""The structures of the WHv API, in Microsoft's spelling so that they can be searched.

Taken from the published headers (MicrosoftDocs/Virtualization-Documentation, commit 77e0742a, MIT), x86_64-windows;
tests/abi holds every size and bit offset against that source. ctypes does not align to 16 bytes: whatever the API
wants so aligned comes from `api.aligned`. The enumerations are in `codes.py`, the one-word bit fields in `flags.py`.
"""

from __future__ import annotations

import ctypes

from .flags import (  # noqa: F401 - one module to search for a structure
    WHV_ADVISE_GPA_RANGE_POPULATE_FLAGS,
    WHV_CAPABILITY_FEATURES,
    WHV_DELIVERABILITY_NOTIFICATIONS_REGISTER,
    WHV_EXTENDED_VM_EXITS,
    WHV_INTERNAL_ACTIVITY_REGISTER,
    WHV_MEMORY_ACCESS_INFO,
    WHV_PROCESSOR_FEATURES,
    WHV_PROCESSOR_FEATURES1,
    WHV_PROCESSOR_XSAVE_FEATURES,
    WHV_SYNTHETIC_PROCESSOR_FEATURES,
    WHV_VP_EXCEPTION_INFO,
    WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER,
    WHV_X64_INTERRUPT_STATE_REGISTER,
    WHV_X64_IO_PORT_ACCESS_INFO,
    WHV_X64_MSR_ACCESS_INFO,
    WHV_X64_MSR_EXIT_BITMAP,
    WHV_X64_PENDING_DEBUG_EXCEPTION,
    WHV_X64_PENDING_INTERRUPTION_REGISTER,
    WHV_X64_PROCESSOR_FEATURES,
    WHV_X64_PROCESSOR_FEATURES1,
    WHV_X64_RDTSC_INFO,
    WHV_X64_VP_EXECUTION_STATE,
)


class _WHV_UINT128_bits(ctypes.Structure):
    _fields_ = (
        ("Low64", ctypes.c_uint64),
        ("High64", ctypes.c_uint64),
    )


class WHV_UINT128(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_UINT128_bits),
        ("Dword", ctypes.c_uint32 * 4),
    )


class _WHV_X64_FP_REGISTER_bits(ctypes.Structure):
    _fields_ = (
        ("Mantissa", ctypes.c_uint64),
        ("BiasedExponent", ctypes.c_uint64, 15),
        ("Sign", ctypes.c_uint64, 1),
        ("Reserved", ctypes.c_uint64, 48),
    )


class WHV_X64_FP_REGISTER(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_X64_FP_REGISTER_bits),
        ("AsUINT128", WHV_UINT128),
    )


class _WHV_X64_FP_CONTROL_STATUS_REGISTER_last32(ctypes.Structure):
    _fields_ = (
        ("LastFpEip", ctypes.c_uint32),
        ("LastFpCs", ctypes.c_uint16),
        ("Reserved2", ctypes.c_uint16),
    )


class _WHV_X64_FP_CONTROL_STATUS_REGISTER_last(ctypes.Union):
    _anonymous_ = ("_last32",)
    _fields_ = (
        ("LastFpRip", ctypes.c_uint64),
        ("_last32", _WHV_X64_FP_CONTROL_STATUS_REGISTER_last32),
    )


class _WHV_X64_FP_CONTROL_STATUS_REGISTER_bits(ctypes.Structure):
    _anonymous_ = ("_last",)
    _fields_ = (
        ("FpControl", ctypes.c_uint16),
        ("FpStatus", ctypes.c_uint16),
        ("FpTag", ctypes.c_uint8),
        ("Reserved", ctypes.c_uint8),
        ("LastFpOp", ctypes.c_uint16),
        ("_last", _WHV_X64_FP_CONTROL_STATUS_REGISTER_last),
    )


class WHV_X64_FP_CONTROL_STATUS_REGISTER(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_X64_FP_CONTROL_STATUS_REGISTER_bits),
        ("AsUINT128", WHV_UINT128),
    )


class _WHV_X64_XMM_CONTROL_STATUS_REGISTER_bits(ctypes.Structure):
    _fields_ = (
        ("LastFpDp", ctypes.c_uint32),
        ("LastFpDs", ctypes.c_uint16),
        ("Reserved", ctypes.c_uint16),
        ("XmmStatusControl", ctypes.c_uint32),
        ("XmmStatusControlMask", ctypes.c_uint32),
    )


class WHV_X64_XMM_CONTROL_STATUS_REGISTER(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("LastFpRdp", ctypes.c_uint64),
        ("_bits", _WHV_X64_XMM_CONTROL_STATUS_REGISTER_bits),
        ("AsUINT128", WHV_UINT128),
    )


class _WHV_X64_SEGMENT_REGISTER_bits(ctypes.Structure):
    _fields_ = (
        ("SegmentType", ctypes.c_uint16, 4),
        ("NonSystemSegment", ctypes.c_uint16, 1),
        ("DescriptorPrivilegeLevel", ctypes.c_uint16, 2),
        ("Present", ctypes.c_uint16, 1),
        ("Reserved", ctypes.c_uint16, 4),
        ("Available", ctypes.c_uint16, 1),
        ("Long", ctypes.c_uint16, 1),
        ("Default", ctypes.c_uint16, 1),
        ("Granularity", ctypes.c_uint16, 1),
    )


class _WHV_X64_SEGMENT_REGISTER_union(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_X64_SEGMENT_REGISTER_bits),
        ("Attributes", ctypes.c_uint16),
    )


class WHV_X64_SEGMENT_REGISTER(ctypes.Structure):
    _anonymous_ = ("_union",)
    _fields_ = (
        ("Base", ctypes.c_uint64),
        ("Limit", ctypes.c_uint32),
        ("Selector", ctypes.c_uint16),
        ("_union", _WHV_X64_SEGMENT_REGISTER_union),
    )


class WHV_X64_TABLE_REGISTER(ctypes.Structure):
    _fields_ = (
        ("Pad", ctypes.c_uint64, 48),
        ("Limit", ctypes.c_uint64, 16),
        ("Base", ctypes.c_uint64),
    )


class _WHV_X64_PENDING_EXCEPTION_EVENT_bits(ctypes.Structure):
    _fields_ = (
        ("EventPending", ctypes.c_uint64, 1),
        ("EventType", ctypes.c_uint64, 3),
        ("Reserved0", ctypes.c_uint64, 4),
        ("DeliverErrorCode", ctypes.c_uint64, 1),
        ("Reserved1", ctypes.c_uint64, 7),
        ("Vector", ctypes.c_uint64, 16),
        ("ErrorCode", ctypes.c_uint64, 32),
        ("ExceptionParameter", ctypes.c_uint64),
    )


class WHV_X64_PENDING_EXCEPTION_EVENT(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_X64_PENDING_EXCEPTION_EVENT_bits),
        ("AsUINT128", WHV_UINT128),
    )


class _WHV_X64_PENDING_EXT_INT_EVENT_bits(ctypes.Structure):
    _fields_ = (
        ("EventPending", ctypes.c_uint64, 1),
        ("EventType", ctypes.c_uint64, 3),
        ("Reserved0", ctypes.c_uint64, 4),
        ("Vector", ctypes.c_uint64, 8),
        ("Reserved1", ctypes.c_uint64, 48),
        ("Reserved2", ctypes.c_uint64),
    )


class WHV_X64_PENDING_EXT_INT_EVENT(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_X64_PENDING_EXT_INT_EVENT_bits),
        ("AsUINT128", WHV_UINT128),
    )


class WHV_REGISTER_VALUE(ctypes.Union):
    _fields_ = (
        ("Reg128", WHV_UINT128),
        ("Reg64", ctypes.c_uint64),
        ("Reg32", ctypes.c_uint32),
        ("Reg16", ctypes.c_uint16),
        ("Reg8", ctypes.c_uint8),
        ("InternalActivity", WHV_INTERNAL_ACTIVITY_REGISTER),
        ("DeliverabilityNotifications", WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER),
        ("Fp", WHV_X64_FP_REGISTER),
        ("FpControlStatus", WHV_X64_FP_CONTROL_STATUS_REGISTER),
        ("XmmControlStatus", WHV_X64_XMM_CONTROL_STATUS_REGISTER),
        ("Segment", WHV_X64_SEGMENT_REGISTER),
        ("Table", WHV_X64_TABLE_REGISTER),
        ("InterruptState", WHV_X64_INTERRUPT_STATE_REGISTER),
        ("PendingInterruption", WHV_X64_PENDING_INTERRUPTION_REGISTER),
        ("ExceptionEvent", WHV_X64_PENDING_EXCEPTION_EVENT),
        ("ExtIntEvent", WHV_X64_PENDING_EXT_INT_EVENT),
        ("PendingDebugException", WHV_X64_PENDING_DEBUG_EXCEPTION),
    )


class _WHV_PROCESSOR_FEATURES_BANKS_bits(ctypes.Structure):
    _fields_ = (
        ("Bank0", WHV_X64_PROCESSOR_FEATURES),
        ("Bank1", WHV_X64_PROCESSOR_FEATURES1),
    )


class _WHV_PROCESSOR_FEATURES_BANKS_union(ctypes.Union):
    _anonymous_ = ("_bits",)
    _fields_ = (
        ("_bits", _WHV_PROCESSOR_FEATURES_BANKS_bits),
        ("AsUINT64", ctypes.c_uint64 * 2),
    )


class WHV_PROCESSOR_FEATURES_BANKS(ctypes.Structure):
    _anonymous_ = ("_union",)
    _fields_ = (
        ("BanksCount", ctypes.c_uint32),
        ("Reserved0", ctypes.c_uint32),
        ("_union", _WHV_PROCESSOR_FEATURES_BANKS_union),
    )


class _WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS_union(ctypes.Union):
    _fields_ = (
        ("Bank0", WHV_SYNTHETIC_PROCESSOR_FEATURES),
        ("AsUINT64", ctypes.c_uint64),
    )


class WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS(ctypes.Structure):
    _anonymous_ = ("_union",)
    _fields_ = (
        ("BanksCount", ctypes.c_uint32),
        ("Reserved0", ctypes.c_uint32),
        ("_union", _WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS_union),
    )


class WHV_TRANSLATE_GVA_RESULT(ctypes.Structure):
    _fields_ = (
        ("ResultCode", ctypes.c_uint32),
        ("Reserved", ctypes.c_uint32),
    )


class WHV_MEMORY_RANGE_ENTRY(ctypes.Structure):
    _fields_ = (
        ("GuestAddress", ctypes.c_uint64),
        ("SizeInBytes", ctypes.c_uint64),
    )


class WHV_ADVISE_GPA_RANGE_POPULATE(ctypes.Structure):
    _fields_ = (
        ("Flags", WHV_ADVISE_GPA_RANGE_POPULATE_FLAGS),
        ("AccessType", ctypes.c_uint32),
    )


class WHV_ADVISE_GPA_RANGE(ctypes.Structure):
    _fields_ = (("Populate", WHV_ADVISE_GPA_RANGE_POPULATE),)


class WHV_CAPABILITY(ctypes.Union):
    _fields_ = (
        ("HypervisorPresent", ctypes.c_uint32),
        ("Features", WHV_CAPABILITY_FEATURES),
        ("ExtendedVmExits", WHV_EXTENDED_VM_EXITS),
        ("ProcessorVendor", ctypes.c_uint32),
        ("ProcessorFeatures", WHV_X64_PROCESSOR_FEATURES),
        ("SyntheticProcessorFeaturesBanks", WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS),
        ("ProcessorClFlushSize", ctypes.c_uint8),
        ("ProcessorClockFrequency", ctypes.c_uint64),
        ("ProcessorFeaturesBanks", WHV_PROCESSOR_FEATURES_BANKS),
        ("GpaRangePopulateFlags", WHV_ADVISE_GPA_RANGE_POPULATE_FLAGS),
        ("PhysicalAddressWidth", ctypes.c_uint32),
        ("ProcessorXsaveFeatures", WHV_PROCESSOR_XSAVE_FEATURES),
        ("InterruptClockFrequency", ctypes.c_uint64),
        ("X64MsrExitBitmap", WHV_X64_MSR_EXIT_BITMAP),
        ("ExceptionExitBitmap", ctypes.c_uint64),
    )


class WHV_X64_CPUID_RESULT(ctypes.Structure):
    _fields_ = (
        ("Function", ctypes.c_uint32),
        ("Reserved", ctypes.c_uint32 * 3),
        ("Eax", ctypes.c_uint32),
        ("Ebx", ctypes.c_uint32),
        ("Ecx", ctypes.c_uint32),
        ("Edx", ctypes.c_uint32),
    )


class WHV_CPUID_OUTPUT(ctypes.Structure):
    _fields_ = (
        ("Eax", ctypes.c_uint32),
        ("Ebx", ctypes.c_uint32),
        ("Ecx", ctypes.c_uint32),
        ("Edx", ctypes.c_uint32),
    )


class WHV_X64_CPUID_RESULT2(ctypes.Structure):
    _fields_ = (
        ("Function", ctypes.c_uint32),
        ("Index", ctypes.c_uint32),
        ("VpIndex", ctypes.c_uint32),
        ("Flags", ctypes.c_uint32),
        ("Output", WHV_CPUID_OUTPUT),
        ("Mask", WHV_CPUID_OUTPUT),
    )


class WHV_MSR_ACTION_ENTRY(ctypes.Structure):
    _fields_ = (
        ("Index", ctypes.c_uint32),
        ("ReadAction", ctypes.c_uint8),
        ("WriteAction", ctypes.c_uint8),
        ("Reserved", ctypes.c_uint16),
    )


class WHV_PARTITION_PROPERTY(ctypes.Union):
    _fields_ = (
        ("ExtendedVmExits", WHV_EXTENDED_VM_EXITS),
        ("ProcessorFeatures", WHV_X64_PROCESSOR_FEATURES),
        ("SyntheticProcessorFeaturesBanks", WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS),
        ("ProcessorClFlushSize", ctypes.c_uint8),
        ("ProcessorCount", ctypes.c_uint32),
        ("SeparateSecurityDomain", ctypes.c_uint32),
        ("NestedVirtualization", ctypes.c_uint32),
        ("ProcessorClockFrequency", ctypes.c_uint64),
        ("ProcessorFeaturesBanks", WHV_PROCESSOR_FEATURES_BANKS),
        ("ReferenceTime", ctypes.c_uint64),
        ("PrimaryNumaNode", ctypes.c_uint16),
        ("CpuReserve", ctypes.c_uint32),
        ("CpuCap", ctypes.c_uint32),
        ("CpuWeight", ctypes.c_uint32),
        ("CpuGroupId", ctypes.c_uint64),
        ("ProcessorFrequencyCap", ctypes.c_uint32),
        ("AllowDeviceAssignment", ctypes.c_uint32),
        ("DisableSmt", ctypes.c_uint32),
        ("PhysicalAddressWidth", ctypes.c_uint32),
        ("ProcessorXsaveFeatures", WHV_PROCESSOR_XSAVE_FEATURES),
        ("CpuidExitList", ctypes.c_uint32),
        ("ExceptionExitBitmap", ctypes.c_uint64),
        ("ApicRemoteRead", ctypes.c_uint32),
        ("X64MsrExitBitmap", WHV_X64_MSR_EXIT_BITMAP),
        ("InterruptClockFrequency", ctypes.c_uint64),
        ("CpuidResultList", ctypes.c_uint64 * 4),
        ("CpuidResultList2", ctypes.c_uint64 * 6),
        ("MsrActionList", ctypes.c_uint64),
        ("UnimplementedMsrAction", ctypes.c_uint32),
        ("LocalApicEmulationMode", ctypes.c_uint32),
    )


class WHV_X64_VP_EXIT_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("ExecutionState", WHV_X64_VP_EXECUTION_STATE),
        ("InstructionLength", ctypes.c_uint16, 4),
        ("Cr8", ctypes.c_uint16, 4),
        ("Reserved", ctypes.c_uint16, 8),
        ("Reserved2", ctypes.c_uint32),
        ("Cs", WHV_X64_SEGMENT_REGISTER),
        ("Rip", ctypes.c_uint64),
        ("Rflags", ctypes.c_uint64),
    )


class WHV_SYNIC_SINT_DELIVERABLE_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("DeliverableSints", ctypes.c_uint16),
        ("Reserved1", ctypes.c_uint16),
        ("Reserved2", ctypes.c_uint32),
    )


class WHV_MEMORY_ACCESS_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("InstructionByteCount", ctypes.c_uint32, 8),
        ("Reserved", ctypes.c_uint32, 24),
        ("InstructionBytes", ctypes.c_uint8 * 16),
        ("AccessInfo", WHV_MEMORY_ACCESS_INFO),
        ("Gpa", ctypes.c_uint64),
        ("Gva", ctypes.c_uint64),
    )


class WHV_X64_IO_PORT_ACCESS_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("InstructionByteCount", ctypes.c_uint32, 8),
        ("Reserved", ctypes.c_uint32, 24),
        ("InstructionBytes", ctypes.c_uint8 * 16),
        ("AccessInfo", WHV_X64_IO_PORT_ACCESS_INFO),
        ("PortNumber", ctypes.c_uint64, 16),
        ("Reserved2", ctypes.c_uint64, 48),
        ("Rax", ctypes.c_uint64),
        ("Rcx", ctypes.c_uint64),
        ("Rsi", ctypes.c_uint64),
        ("Rdi", ctypes.c_uint64),
        ("Ds", WHV_X64_SEGMENT_REGISTER),
        ("Es", WHV_X64_SEGMENT_REGISTER),
    )


class WHV_X64_MSR_ACCESS_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("AccessInfo", WHV_X64_MSR_ACCESS_INFO),
        ("MsrNumber", ctypes.c_uint32),
        ("Rax", ctypes.c_uint64),
        ("Rdx", ctypes.c_uint64),
    )


class WHV_X64_CPUID_ACCESS_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("Rax", ctypes.c_uint64),
        ("Rcx", ctypes.c_uint64),
        ("Rdx", ctypes.c_uint64),
        ("Rbx", ctypes.c_uint64),
        ("DefaultResultRax", ctypes.c_uint64),
        ("DefaultResultRcx", ctypes.c_uint64),
        ("DefaultResultRdx", ctypes.c_uint64),
        ("DefaultResultRbx", ctypes.c_uint64),
    )


class WHV_VP_EXCEPTION_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("InstructionByteCount", ctypes.c_uint32, 8),
        ("Reserved", ctypes.c_uint32, 24),
        ("InstructionBytes", ctypes.c_uint8 * 16),
        ("ExceptionInfo", WHV_VP_EXCEPTION_INFO),
        ("ExceptionType", ctypes.c_uint64, 8),
        ("Reserved2", ctypes.c_uint64, 24),
        ("ErrorCode", ctypes.c_uint64, 32),
        ("ExceptionParameter", ctypes.c_uint64),
    )


class WHV_X64_UNSUPPORTED_FEATURE_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("FeatureCode", ctypes.c_uint32),
        ("Reserved", ctypes.c_uint32),
        ("FeatureParameter", ctypes.c_uint64),
    )


class WHV_RUN_VP_CANCELED_CONTEXT(ctypes.Structure):
    _fields_ = (("CancelReason", ctypes.c_uint32),)


class WHV_X64_INTERRUPTION_DELIVERABLE_CONTEXT(ctypes.Structure):
    _fields_ = (("DeliverableType", ctypes.c_uint32),)


class WHV_X64_APIC_EOI_CONTEXT(ctypes.Structure):
    _fields_ = (("InterruptVector", ctypes.c_uint32),)


class WHV_X64_RDTSC_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("TscAux", ctypes.c_uint64),
        ("VirtualOffset", ctypes.c_uint64),
        ("Tsc", ctypes.c_uint64),
        ("ReferenceTime", ctypes.c_uint64),
        ("RdtscInfo", WHV_X64_RDTSC_INFO),
    )


class WHV_X64_APIC_SMI_CONTEXT(ctypes.Structure):
    _fields_ = (("ApicIcr", ctypes.c_uint64),)


class WHV_X64_HYPERCALL_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("Rax", ctypes.c_uint64),
        ("Rbx", ctypes.c_uint64),
        ("Rcx", ctypes.c_uint64),
        ("Rdx", ctypes.c_uint64),
        ("R8", ctypes.c_uint64),
        ("Rsi", ctypes.c_uint64),
        ("Rdi", ctypes.c_uint64),
        ("Reserved0", ctypes.c_uint64),
        ("XmmRegisters", WHV_UINT128 * 6),
        ("Reserved1", ctypes.c_uint64 * 2),
    )


class WHV_X64_APIC_INIT_SIPI_CONTEXT(ctypes.Structure):
    _fields_ = (("ApicIcr", ctypes.c_uint64),)


class WHV_X64_APIC_WRITE_CONTEXT(ctypes.Structure):
    _fields_ = (
        ("Type", ctypes.c_uint32),
        ("Reserved", ctypes.c_uint32),
        ("WriteValue", ctypes.c_uint64),
    )


class _WHV_RUN_VP_EXIT_CONTEXT_union(ctypes.Union):
    _fields_ = (
        ("MemoryAccess", WHV_MEMORY_ACCESS_CONTEXT),
        ("CancelReason", WHV_RUN_VP_CANCELED_CONTEXT),
        ("Hypercall", WHV_X64_HYPERCALL_CONTEXT),
        ("SynicSintDeliverable", WHV_SYNIC_SINT_DELIVERABLE_CONTEXT),
        ("IoPortAccess", WHV_X64_IO_PORT_ACCESS_CONTEXT),
        ("MsrAccess", WHV_X64_MSR_ACCESS_CONTEXT),
        ("CpuidAccess", WHV_X64_CPUID_ACCESS_CONTEXT),
        ("VpException", WHV_VP_EXCEPTION_CONTEXT),
        ("InterruptWindow", WHV_X64_INTERRUPTION_DELIVERABLE_CONTEXT),
        ("UnsupportedFeature", WHV_X64_UNSUPPORTED_FEATURE_CONTEXT),
        ("ApicEoi", WHV_X64_APIC_EOI_CONTEXT),
        ("ReadTsc", WHV_X64_RDTSC_CONTEXT),
        ("ApicSmi", WHV_X64_APIC_SMI_CONTEXT),
        ("ApicInitSipi", WHV_X64_APIC_SMI_CONTEXT),
        ("ApicWrite", WHV_X64_APIC_WRITE_CONTEXT),
        ("AsUINT64", ctypes.c_uint64 * 22),
    )


class WHV_RUN_VP_EXIT_CONTEXT(ctypes.Structure):
    _anonymous_ = ("_union",)
    _fields_ = (
        ("ExitReason", ctypes.c_uint32),
        ("Reserved", ctypes.c_uint32),
        ("VpContext", WHV_X64_VP_EXIT_CONTEXT),
        ("_union", _WHV_RUN_VP_EXIT_CONTEXT_union),
    )


class WHV_INTERRUPT_CONTROL(ctypes.Structure):
    _fields_ = (
        ("Type", ctypes.c_uint64, 8),
        ("DestinationMode", ctypes.c_uint64, 4),
        ("TriggerMode", ctypes.c_uint64, 4),
        ("TargetVtl", ctypes.c_uint64, 8),
        ("Reserved", ctypes.c_uint64, 40),
        ("Destination", ctypes.c_uint32),
        ("Vector", ctypes.c_uint32),
    )


class WHV_DOORBELL_MATCH_DATA(ctypes.Structure):
    _fields_ = (
        ("GuestAddress", ctypes.c_uint64),
        ("Value", ctypes.c_uint64),
        ("Length", ctypes.c_uint64, 32),
        ("MatchOnValue", ctypes.c_uint64, 1),
        ("MatchOnLength", ctypes.c_uint64, 1),
        ("Reserved", ctypes.c_uint64, 30),
    )


class WHV_PARTITION_MEMORY_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("Mapped4KPageCount", ctypes.c_uint64),
        ("Mapped2MPageCount", ctypes.c_uint64),
        ("Mapped1GPageCount", ctypes.c_uint64),
    )


class WHV_PROCESSOR_RUNTIME_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("TotalRuntime100ns", ctypes.c_uint64),
        ("HypervisorRuntime100ns", ctypes.c_uint64),
    )


class WHV_PROCESSOR_INTERCEPT_COUNTER(ctypes.Structure):
    _fields_ = (
        ("Count", ctypes.c_uint64),
        ("Time100ns", ctypes.c_uint64),
    )


class WHV_PROCESSOR_ACTIVITY_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("PageInvalidations", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("ControlRegisterAccesses", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("IoInstructions", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("HaltInstructions", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("CpuidInstructions", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("MsrAccesses", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("OtherIntercepts", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("PendingInterrupts", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("EmulatedInstructions", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("DebugRegisterAccesses", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("PageFaultIntercepts", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("NestedPageFaultIntercepts", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("Hypercalls", WHV_PROCESSOR_INTERCEPT_COUNTER),
        ("RdpmcInstructions", WHV_PROCESSOR_INTERCEPT_COUNTER),
    )


class WHV_PROCESSOR_GUEST_EVENT_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("PageFaultCount", ctypes.c_uint64),
        ("ExceptionCount", ctypes.c_uint64),
        ("InterruptCount", ctypes.c_uint64),
    )


class WHV_PROCESSOR_APIC_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("MmioAccessCount", ctypes.c_uint64),
        ("EoiAccessCount", ctypes.c_uint64),
        ("TprAccessCount", ctypes.c_uint64),
        ("SentIpiCount", ctypes.c_uint64),
        ("SelfIpiCount", ctypes.c_uint64),
    )


class WHV_PROCESSOR_SYNTHETIC_FEATURES_COUNTERS(ctypes.Structure):
    _fields_ = (
        ("SyntheticInterruptsCount", ctypes.c_uint64),
        ("LongSpinWaitHypercallsCount", ctypes.c_uint64),
        ("OtherHypercallsCount", ctypes.c_uint64),
        ("SyntheticInterruptHypercallsCount", ctypes.c_uint64),
        ("VirtualInterruptHypercallsCount", ctypes.c_uint64),
        ("VirtualMmuHypercallsCount", ctypes.c_uint64),
    )


WHV_VP_EXIT_CONTEXT = WHV_X64_VP_EXIT_CONTEXT
WHV_HYPERCALL_CONTEXT = WHV_X64_HYPERCALL_CONTEXT

"""The bit fields of the WHv API: one word each, with Microsoft's names for its bits.

Each type is a ctypes union of the whole word (``AsUINT64`` or ``AsUINT32``) and its named bits. The numbers come from
Microsoft's published headers (MicrosoftDocs/Virtualization-Documentation, commit 77e0742a, MIT); tests/abi holds every
one of them against that source.
"""

from __future__ import annotations

import ctypes
from typing import Any

_WORDS: dict[int, Any] = {16: ctypes.c_uint16, 32: ctypes.c_uint32, 64: ctypes.c_uint64}


def _flags(name: str, width: int, bits: str) -> Any:
    """A union of a word of ``width`` bits and the fields ``bits`` names from bit 0 on, ``name`` or ``name:bits``."""
    word = _WORDS[width]
    fields = [(field, word, int(count or 1)) for field, _, count in (entry.partition(":") for entry in bits.split())]
    structure = type(f"_{name}_bits", (ctypes.Structure,), {"_fields_": fields})
    members = {"_anonymous_": ("_bits",), "_fields_": [("_bits", structure), (f"AsUINT{width}", word)]}
    return type(name, (ctypes.Union,), members)


WHV_X64_INTERRUPT_STATE_REGISTER: Any = _flags(
    "WHV_X64_INTERRUPT_STATE_REGISTER", 64, "InterruptShadow NmiMasked Reserved:62"
)
WHV_X64_PENDING_INTERRUPTION_REGISTER: Any = _flags(
    "WHV_X64_PENDING_INTERRUPTION_REGISTER",
    64,
    """
    InterruptionPending InterruptionType:3 DeliverErrorCode InstructionLength:4 NestedEvent Reserved:6
    InterruptionVector:16 ErrorCode:32
    """,
)
WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER: Any = _flags(
    "WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER",
    64,
    """
    NmiNotification InterruptNotification InterruptPriority:4 Reserved:42 Sint:16
    """,
)
WHV_INTERNAL_ACTIVITY_REGISTER: Any = _flags(
    "WHV_INTERNAL_ACTIVITY_REGISTER", 64, "StartupSuspend HaltSuspend IdleSuspend Reserved:61"
)
WHV_X64_PENDING_DEBUG_EXCEPTION: Any = _flags(
    "WHV_X64_PENDING_DEBUG_EXCEPTION",
    64,
    """
    Breakpoint0 Breakpoint1 Breakpoint2 Breakpoint3 SingleStep Reserved0:59
    """,
)
WHV_CAPABILITY_FEATURES: Any = _flags(
    "WHV_CAPABILITY_FEATURES",
    64,
    """
    PartialUnmap LocalApicEmulation Xsave DirtyPageTracking SpeculationControl ApicRemoteRead IdleSuspend
    VirtualPciDeviceSupport IommuSupport VpHotAddRemove DeviceAccessTracking ReservedX640 Reserved:52
    """,
)
WHV_EXTENDED_VM_EXITS: Any = _flags(
    "WHV_EXTENDED_VM_EXITS",
    64,
    """
    X64CpuidExit X64MsrExit ExceptionExit X64RdtscExit X64ApicSmiExitTrap HypercallExit X64ApicInitSipiExitTrap
    X64ApicWriteLint0ExitTrap X64ApicWriteLint1ExitTrap X64ApicWriteSvrExitTrap UnknownSynicConnection
    RetargetUnknownVpciDevice X64ApicWriteLdrExitTrap X64ApicWriteDfrExitTrap GpaAccessFaultExit Reserved:49
    """,
)
WHV_X64_PROCESSOR_FEATURES: Any = _flags(
    "WHV_X64_PROCESSOR_FEATURES",
    64,
    """
    Sse3Support LahfSahfSupport Ssse3Support Sse4_1Support Sse4_2Support Sse4aSupport XopSupport PopCntSupport
    Cmpxchg16bSupport Altmovcr8Support LzcntSupport MisAlignSseSupport MmxExtSupport Amd3DNowSupport
    ExtendedAmd3DNowSupport Page1GbSupport AesSupport PclmulqdqSupport PcidSupport Fma4Support F16CSupport
    RdRandSupport RdWrFsGsSupport SmepSupport EnhancedFastStringSupport Bmi1Support Bmi2Support Reserved1:2
    MovbeSupport Npiep1Support DepX87FPUSaveSupport RdSeedSupport AdxSupport IntelPrefetchSupport SmapSupport
    HleSupport RtmSupport RdtscpSupport ClflushoptSupport ClwbSupport ShaSupport X87PointersSavedSupport
    InvpcidSupport IbrsSupport StibpSupport IbpbSupport UnrestrictedGuestSupport SsbdSupport
    FastShortRepMovSupport Reserved3 RdclNo IbrsAllSupport Reserved4 SsbNo RsbANo Reserved5 RdPidSupport
    UmipSupport MdsNoSupport MdClearSupport TaaNoSupport TsxCtrlSupport Reserved6
    """,
)
WHV_X64_PROCESSOR_FEATURES1: Any = _flags(
    "WHV_X64_PROCESSOR_FEATURES1",
    64,
    """
    ACountMCountSupport TscInvariantSupport ClZeroSupport RdpruSupport La57Support MbecSupport NestedVirtSupport
    PsfdSupport CetSsSupport CetIbtSupport VmxExceptionInjectSupport Reserved2 UmwaitTpauseSupport
    MovdiriSupport Movdir64bSupport CldemoteSupport SerializeSupport TscDeadlineTmrSupport TscAdjustSupport
    FZLRepMovsb FSRepStosb FSRepCmpsb TsxLdTrkSupport VmxInsOutsExitInfoSupport Reserved3 SbdrSsdpNoSupport
    FbsdpNoSupport PsdpNoSupport FbClearSupport BtcNoSupport IbpbRsbFlushSupport StibpAlwaysOnSupport
    PerfGlobalCtrlSupport NptExecuteOnlySupport NptADFlagsSupport Npt1GbPageSupport Reserved4 Reserved5
    Reserved6 Reserved7 CmpccxaddSupport Reserved8 Reserved9 Reserved10 Reserved11 PrefetchISupport
    Sha512Support Reserved12 Reserved13 Reserved14 SM3Support SM4Support Reserved15 Reserved16 SbpbSupported
    IbpbBrTypeSupported SrsoNoSupported SrsoUserKernelNoSupported Reserved17 Reserved18 Reserved19 Reserved20:3
    """,
)
WHV_SYNTHETIC_PROCESSOR_FEATURES: Any = _flags(
    "WHV_SYNTHETIC_PROCESSOR_FEATURES",
    64,
    """
    HypervisorPresent Hv1 AccessVpRunTimeReg AccessPartitionReferenceCounter AccessSynicRegs
    AccessSyntheticTimerRegs AccessIntrCtrlRegs AccessHypercallRegs AccessVpIndex AccessPartitionReferenceTsc
    AccessGuestIdleReg AccessFrequencyRegs ReservedZ12 ReservedZ13 ReservedZ14
    EnableExtendedGvaRangesForFlushVirtualAddressList ReservedZ16 ReservedZ17 FastHypercallOutput ReservedZ19
    ReservedZ20 ReservedZ21 DirectSyntheticTimers ReservedZ23 ExtendedProcessorMasks TbFlushHypercalls
    SyntheticClusterIpi NotifyLongSpinWait QueryNumaDistance SignalEvents RetargetDeviceInterrupt RestoreTime
    EnlightenedVmcs NestedDebugCtl SyntheticTimeUnhaltedTimer IdleSpecCtrl ReservedZ36 WakeVps AccessVpRegs
    ReservedZ39 ReservedZ40 ReservedZ41 ReservedZ42 ReservedZ43 ReservedZ44 Reserved:19
    """,
)
WHV_PROCESSOR_XSAVE_FEATURES: Any = _flags(
    "WHV_PROCESSOR_XSAVE_FEATURES",
    64,
    """
    XsaveSupport XsaveoptSupport AvxSupport Avx2Support FmaSupport MpxSupport Avx512Support Avx512DQSupport
    Avx512CDSupport Avx512BWSupport Avx512VLSupport XsaveCompSupport XsaveSupervisorSupport Xcr1Support
    Avx512BitalgSupport Avx512IfmaSupport Avx512VBmiSupport Avx512VBmi2Support Avx512VnniSupport GfniSupport
    VaesSupport Avx512VPopcntdqSupport VpclmulqdqSupport Avx512Bf16Support Avx512Vp2IntersectSupport
    Avx512Fp16Support XfdSupport AmxTileSupport AmxBf16Support AmxInt8Support AvxVnniSupport AvxIfmaSupport
    AvxNeConvertSupport AvxVnniInt8Support AvxVnniInt16Support Avx10_1_256Support Avx10_1_512Support
    AmxFp16Support Reserved:26
    """,
)
WHV_X64_MSR_EXIT_BITMAP: Any = _flags(
    "WHV_X64_MSR_EXIT_BITMAP",
    64,
    """
    UnhandledMsrs TscMsrWrite TscMsrRead ApicBaseMsrWrite MiscEnableMsrRead McUpdatePatchLevelMsrRead
    Reserved:58
    """,
)
WHV_ADVISE_GPA_RANGE_POPULATE_FLAGS: Any = _flags(
    "WHV_ADVISE_GPA_RANGE_POPULATE_FLAGS", 32, "Prefetch AvoidHardFaults Reserved:30"
)
WHV_X64_VP_EXECUTION_STATE: Any = _flags(
    "WHV_X64_VP_EXECUTION_STATE",
    16,
    """
    Cpl:2 Cr0Pe Cr0Am EferLma DebugActive InterruptionPending Reserved0:5 InterruptShadow Reserved1:3
    """,
)
WHV_MEMORY_ACCESS_INFO: Any = _flags("WHV_MEMORY_ACCESS_INFO", 32, "AccessType:2 GpaUnmapped GvaValid Reserved:28")
WHV_X64_IO_PORT_ACCESS_INFO: Any = _flags(
    "WHV_X64_IO_PORT_ACCESS_INFO", 32, "IsWrite AccessSize:3 StringOp RepPrefix Reserved:26"
)
WHV_X64_MSR_ACCESS_INFO: Any = _flags("WHV_X64_MSR_ACCESS_INFO", 32, "IsWrite Reserved:31")
WHV_VP_EXCEPTION_INFO: Any = _flags("WHV_VP_EXCEPTION_INFO", 32, "ErrorCodeValid SoftwareException Reserved:30")
WHV_X64_RDTSC_INFO: Any = _flags("WHV_X64_RDTSC_INFO", 64, "IsRdtscp Reserved:63")
WHV_PROCESSOR_FEATURES = WHV_X64_PROCESSOR_FEATURES
WHV_PROCESSOR_FEATURES1 = WHV_X64_PROCESSOR_FEATURES1
WHV_DELIVERABILITY_NOTIFICATIONS_REGISTER = WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER

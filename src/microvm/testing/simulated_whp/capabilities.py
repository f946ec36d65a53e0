"""What WHvGetCapability answers on the simulated machine."""

from __future__ import annotations

import struct
from typing import Final

from ...hypervisor.whp import abi, codes, flags
from .profiles import APIC_HZ, TSC_HZ, Profile

SYNTHETIC: Final = (
    "HypervisorPresent",
    "Hv1",
    "AccessVpRunTimeReg",
    "AccessPartitionReferenceCounter",
    "AccessHypercallRegs",
    "AccessVpIndex",
    "AccessPartitionReferenceTsc",
    "AccessFrequencyRegs",
)
_FEATURES: Final = (
    "Sse3Support",
    "LahfSahfSupport",
    "Ssse3Support",
    "Sse4_1Support",
    "Sse4_2Support",
    "PopCntSupport",
    "Cmpxchg16bSupport",
    "SmepSupport",
)


def processor_features(profile: Profile) -> abi.WHV_PROCESSOR_FEATURES_BANKS:
    """The banks this machine offers. Windows 10 lists the invariant TSC, and then refuses to set it."""
    banks = abi.WHV_PROCESSOR_FEATURES_BANKS(BanksCount=2)
    for name in _FEATURES:
        setattr(banks.Bank0, name, 1)
    banks.Bank1.TscInvariantSupport = 1
    banks.Bank1.TscDeadlineTmrSupport = int(profile.tsc_deadline)
    return banks


def capability(profile: Profile, code: int, present: bool) -> bytes | None:
    """The answer's bytes, None for a code nobody knows."""
    if code == codes.WHvCapabilityCodeHypervisorPresent:
        return struct.pack("<I", present)
    if not present:
        return None
    if code == codes.WHvCapabilityCodeFeatures:
        features = flags.WHV_CAPABILITY_FEATURES(LocalApicEmulation=1, Xsave=1, DirtyPageTracking=1)
        return bytes(features)
    if code == codes.WHvCapabilityCodeExtendedVmExits:
        return bytes(flags.WHV_EXTENDED_VM_EXITS(X64MsrExit=1))
    if code == codes.WHvCapabilityCodeX64MsrExitBitmap:
        return bytes(flags.WHV_X64_MSR_EXIT_BITMAP(UnhandledMsrs=1))
    if code == codes.WHvCapabilityCodeExceptionExitBitmap:
        return bytes(8)
    if code == codes.WHvCapabilityCodeProcessorVendor:
        return struct.pack("<I", codes.WHvProcessorVendorIntel)
    if code == codes.WHvCapabilityCodeProcessorFeaturesBanks:
        return bytes(processor_features(profile))
    if code == codes.WHvCapabilityCodeSyntheticProcessorFeaturesBanks:
        synthetic = abi.WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS(BanksCount=1)
        for name in SYNTHETIC:
            setattr(synthetic.Bank0, name, 1)
        return bytes(synthetic)
    numbers = {
        codes.WHvCapabilityCodeProcessorClFlushSize: struct.pack("<B", 6),
        codes.WHvCapabilityCodeProcessorClockFrequency: struct.pack("<Q", TSC_HZ),
        codes.WHvCapabilityCodeInterruptClockFrequency: struct.pack("<Q", APIC_HZ),
        codes.WHvCapabilityCodePhysicalAddressWidth: struct.pack("<I", 40),
    }
    return numbers.get(code)

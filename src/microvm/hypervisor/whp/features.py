"""What a partition is told to be: properties, each with what to do where this Windows does not know it.

Newer properties are found by trying them, never by the version of Windows. What Windows 10 refuses costs the guest
an enlightenment, not the boot: it then reads the TSC's rate from CPUID 0x15 alone.
"""

from __future__ import annotations

import ctypes
from fractions import Fraction
from typing import Any, Final

from . import abi, codes, flags
from .api import Api, error_for

DEFAULT_CRYSTAL_HZ: Final = 25_000_000
_INVARIANT_TSC: Final = "TscInvariantSupport"
# What Linux needs of Hyper-V to keep time without calibrating, and what it takes to be told of it.
_ENLIGHTENMENTS: Final = (
    "HypervisorPresent",
    "Hv1",
    "AccessPartitionReferenceCounter",
    "AccessHypercallRegs",
    "AccessVpIndex",
    "AccessPartitionReferenceTsc",
    "AccessFrequencyRegs",
)
_SKIPPED: Final = frozenset((codes.WHV_E_UNKNOWN_PROPERTY, codes.WHV_E_UNKNOWN_CAPABILITY, codes.E_INVALIDARG))


def capability(api: Api, code: int, value: Any) -> bool:
    """Read a capability into ``value``. Returns whether this Windows knows it. Raises HostError, BackendUnavailable."""
    result = _read_capability(api, code, value)
    if result in _SKIPPED:
        return False
    if result:
        raise error_for("WHvGetCapability", result)
    return True


def _read_capability(api: Api, code: int, value: Any) -> int:
    written = ctypes.c_uint32()
    size = ctypes.sizeof(value)
    result = api.attempt("WHvGetCapability", code, ctypes.byref(value), size, ctypes.byref(written))
    if result == codes.WHV_E_INSUFFICIENT_BUFFER and written.value > size:  # a newer Windows has more of it
        larger = (ctypes.c_uint8 * min(written.value, 4096))()
        result = api.attempt("WHvGetCapability", code, larger, ctypes.sizeof(larger), ctypes.byref(written))
        ctypes.memmove(ctypes.byref(value), larger, size)
    return result


def set_property(api: Api, handle: int, code: int, value: Any) -> bool:
    """Set a property. Returns False where this Windows does not know it. Raises HostError."""
    result = api.attempt("WHvSetPartitionProperty", handle, code, ctypes.byref(value), ctypes.sizeof(value))
    if result in _SKIPPED:
        return False
    if result:
        raise error_for("WHvSetPartitionProperty", result)
    return True


def configure(api: Api, handle: int, vcpus: int) -> tuple[str, ...]:
    """Set every property of a fresh partition. Returns the names of those this Windows refused.

    Raises HostError where one fails that nothing works without.
    """
    for code, value in (
        (codes.WHvPartitionPropertyCodeProcessorCount, ctypes.c_uint32(vcpus)),
        (
            codes.WHvPartitionPropertyCodeLocalApicEmulationMode,
            ctypes.c_uint32(codes.WHvX64LocalApicEmulationModeXApic),
        ),
    ):
        api.call("WHvSetPartitionProperty", handle, code, ctypes.byref(value), ctypes.sizeof(value))
    refused = []
    if not _set_exits(api, handle):
        refused.append("X64MsrExit")
    if not _set_processor_features(api, handle):
        refused.append("ProcessorFeaturesBanks")
    if not _set_enlightenments(api, handle):
        refused.append("SyntheticProcessorFeaturesBanks")
    leaves = cpuid_leaves(*frequencies(api))
    if not set_property(api, handle, codes.WHvPartitionPropertyCodeCpuidResultList, leaves):
        refused.append("CpuidResultList")
    return tuple(refused)


def _set_exits(api: Api, handle: int) -> bool:
    """Unknown MSRs exit to us, so that we decide which of them are #GP."""
    possible = flags.WHV_EXTENDED_VM_EXITS()
    if not capability(api, codes.WHvCapabilityCodeExtendedVmExits, possible) or not possible.X64MsrExit:
        return False
    wanted = flags.WHV_EXTENDED_VM_EXITS(X64MsrExit=1)
    bitmap = flags.WHV_X64_MSR_EXIT_BITMAP(UnhandledMsrs=1)
    return set_property(api, handle, codes.WHvPartitionPropertyCodeExtendedVmExits, wanted) and set_property(
        api, handle, codes.WHvPartitionPropertyCodeX64MsrExitBitmap, bitmap
    )


def _set_processor_features(api: Api, handle: int) -> bool:
    """All that this host can show, invariant TSC included; without that on Windows 10, else Windows' own choice."""
    banks = abi.WHV_PROCESSOR_FEATURES_BANKS()
    if not capability(api, codes.WHvCapabilityCodeProcessorFeaturesBanks, banks):
        return False
    if set_property(api, handle, codes.WHvPartitionPropertyCodeProcessorFeaturesBanks, banks):
        return True
    setattr(banks.Bank1, _INVARIANT_TSC, 0)
    return set_property(api, handle, codes.WHvPartitionPropertyCodeProcessorFeaturesBanks, banks)


def _set_enlightenments(api: Api, handle: int) -> bool:
    possible = abi.WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS()
    if not capability(api, codes.WHvCapabilityCodeSyntheticProcessorFeaturesBanks, possible):
        return False
    wanted = abi.WHV_SYNTHETIC_PROCESSOR_FEATURES_BANKS(BanksCount=1)
    for name in _ENLIGHTENMENTS:
        setattr(wanted.Bank0, name, getattr(possible.Bank0, name))
    return set_property(api, handle, codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks, wanted)


def frequencies(api: Api) -> tuple[int, int]:
    """The TSC's and the local APIC timer's rate in Hz; 0 where this Windows does not say."""
    found = []
    for code in (codes.WHvCapabilityCodeProcessorClockFrequency, codes.WHvCapabilityCodeInterruptClockFrequency):
        value = ctypes.c_uint64()
        found.append(value.value if capability(api, code, value) else 0)
    return found[0], found[1]


def cpuid_leaves(tsc_hz: int, apic_hz: int) -> Any:
    """Leaves 0x15 and 0x16, from which Linux takes both rates. Empty where the TSC's is not known. [SDM] 2A CPUID"""
    if not tsc_hz:
        return (abi.WHV_X64_CPUID_RESULT * 0)()
    crystal = apic_hz or DEFAULT_CRYSTAL_HZ
    ratio = Fraction(tsc_hz, crystal)
    # Linux multiplies the crystal in kHz by the numerator in 32 bits.
    limit = (1 << 32) // max(crystal // 1000, 1)
    ratio = ratio.limit_denominator(max(1, int(limit / max(ratio, Fraction(1))) - 1))
    mhz = tsc_hz // 1_000_000
    leaves = (abi.WHV_X64_CPUID_RESULT * 2)()
    for leaf, values in zip(
        leaves, ((0x15, ratio.denominator, ratio.numerator, crystal, 0), (0x16, mhz, mhz, 100, 0)), strict=True
    ):
        leaf.Function, leaf.Eax, leaf.Ebx, leaf.Ecx, leaf.Edx = values
    return leaves

"""What CPUID tells the guest: the host's processor as KVM offers it, minus what is not ours, plus our machine model.

The policy: one socket, one thread a core, APIC id = core number; the KVM signature with its clock; the TSC's rate in
leaves 0x15 and 0x16; whatever has state that `state.py` does not save is hidden (nested virtualization, performance
counters, processor trace, SGX, control-flow enforcement, FRED). [SDM] 2A CPUID, [APM] 3 appendix E, [kvm-cpuid].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

SIGNIFICANT_INDEX: Final = 1
HYPERVISOR_BASE: Final = 0x4000_0000
HYPERVISOR_FEATURES: Final = 0x4000_0001
KVM_APIC_BUS_HZ: Final = 1_000_000_000  # the rate of KVM's local APIC timer, what leaf 0x15 calls the crystal
MIN_BASIC_LEAF: Final = 0x16

# Leaves whose subject is hidden: performance counters, SGX, processor trace, last-branch records, nested
# virtualization, instruction-based sampling, memory encryption, counters again.
_DROPPED: Final = frozenset(
    (0x5, 0xA, 0x12, 0x14, 0x1C, 0x1F, 0x23, 0x8000_000A, 0x8000_001B, 0x8000_001F, 0x8000_0022)
)

# Bits cleared, by (leaf, subleaf, register).
_MONITOR_DSCPL_VMX_SMX_EST_TM2_PDCM_DTES: Final = 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15 | 1 << 2
_DS_ACPI_TM: Final = 1 << 21 | 1 << 22 | 1 << 29
_SGX_PQM_MPX_PQE_PT: Final = 1 << 2 | 1 << 12 | 1 << 14 | 1 << 15 | 1 << 25
_SHADOW_STACK_SGXLC: Final = 1 << 7 | 1 << 30
_PCONFIG_ARCHLBR_IBT: Final = 1 << 18 | 1 << 19 | 1 << 20
_FRED: Final = 1 << 17
_SVM_IBS_SKINIT_PERF_MWAITX: Final = 1 << 2 | 1 << 10 | 1 << 12 | 1 << 23 | 1 << 24 | 1 << 28 | 1 << 29
_CLEARED: Final = {
    (1, 0, "ecx"): _MONITOR_DSCPL_VMX_SMX_EST_TM2_PDCM_DTES,
    (1, 0, "edx"): _DS_ACPI_TM,
    (7, 0, "ebx"): _SGX_PQM_MPX_PQE_PT,
    (7, 0, "ecx"): _SHADOW_STACK_SGXLC,
    (7, 0, "edx"): _PCONFIG_ARCHLBR_IBT,
    (7, 1, "eax"): _FRED,
    (0x8000_0001, 0, "ecx"): _SVM_IBS_SKINIT_PERF_MWAITX,
}

_ECX_X2APIC: Final = 1 << 21
_ECX_TSC_DEADLINE: Final = 1 << 24
_ECX_HYPERVISOR: Final = 1 << 31
_EDX_HTT: Final = 1 << 28
_INVARIANT_TSC: Final = 1 << 8
_ARAT: Final = 1 << 2

# KVM's paravirtual features that need nothing from us and whose state is all in MSRs: clock, no I/O delay, clock by
# new MSRs, steal time, PV end of interrupt, PV unhalt, remote TLB flush, IPIs, poll control, yield, stable clock.
# Not asynchronous page faults, migration control or memory encryption.
_PV_FEATURES: Final = sum(1 << bit for bit in (0, 1, 3, 5, 6, 7, 9, 11, 12, 13, 24))


@dataclass(frozen=True, slots=True)
class Leaf:
    """One CPUID answer. ``flags`` is KVM's: whether ``index`` matters."""

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


def machine_cpuid(supported: list[Leaf], vcpu: int, vcpus: int, tsc_khz: int, tsc_deadline: bool) -> list[Leaf]:
    """The leaves for vCPU ``vcpu`` of ``vcpus``, made from what KVM says it supports."""
    core_bits = (vcpus - 1).bit_length()
    leaves: list[Leaf] = []
    for leaf in supported:
        if leaf.function in _DROPPED or leaf.function in (0xB, 0x15, 0x16) or leaf.function >> 16 == 0x4000:
            continue
        if leaf.function == 0xD and leaf.index in (11, 12, 15):
            continue  # control-flow enforcement and last-branch state components
        changes = {
            register: getattr(leaf, register) & ~mask
            for (function, index, register), mask in _CLEARED.items()
            if function == leaf.function and index == leaf.index
        }
        leaves.append(_adapt(replace(leaf, **changes), vcpu, vcpus, core_bits, tsc_deadline))
    leaves += _topology(vcpu, vcpus, core_bits)
    leaves += _tsc(tsc_khz)
    features = next((leaf.eax for leaf in supported if leaf.function == HYPERVISOR_FEATURES), 0)
    leaves.append(Leaf(HYPERVISOR_BASE, 0, 0, HYPERVISOR_FEATURES, *_words(b"KVMKVMKVM\0\0\0")))
    leaves.append(Leaf(HYPERVISOR_FEATURES, eax=features & _PV_FEATURES))
    return sorted(leaves, key=lambda leaf: (leaf.function, leaf.index))


def _adapt(leaf: Leaf, vcpu: int, vcpus: int, core_bits: int, tsc_deadline: bool) -> Leaf:
    """One supported leaf, for our machine."""
    function = leaf.function
    if function == 0:
        return replace(leaf, eax=max(leaf.eax, MIN_BASIC_LEAF))
    if function == 1:
        return replace(
            leaf,
            ebx=leaf.ebx & 0xFFFF | (1 << core_bits) << 16 | vcpu << 24,
            ecx=leaf.ecx | _ECX_HYPERVISOR | _ECX_X2APIC | (_ECX_TSC_DEADLINE if tsc_deadline else 0),
            edx=leaf.edx & ~_EDX_HTT | (_EDX_HTT if vcpus > 1 else 0),
        )
    if function == 4 and leaf.eax & 0x1F:
        shared = (1 << core_bits) - 1 if leaf.eax >> 5 & 7 >= 3 else 0
        return replace(leaf, eax=leaf.eax & 0x3FFF | shared << 14 | ((1 << core_bits) - 1) << 26)
    if function == 6:
        return Leaf(6, eax=_ARAT)
    if function == 0xD and leaf.index == 1:
        return replace(leaf, ecx=0, edx=0)  # no supervisor state components: theirs are hidden above
    if function == 0x8000_0007:
        return replace(leaf, edx=leaf.edx | _INVARIANT_TSC)
    if function == 0x8000_0008:
        return replace(leaf, ecx=core_bits << 12 | (vcpus - 1))
    if function == 0x8000_001D and leaf.eax & 0x1F:
        shared = vcpus - 1 if leaf.eax >> 5 & 7 >= 3 else 0
        return replace(leaf, eax=leaf.eax & 0x3FFF | shared << 14)
    if function == 0x8000_001E:
        return replace(leaf, eax=vcpu, ebx=vcpu, ecx=0)
    return leaf


def _topology(vcpu: int, vcpus: int, core_bits: int) -> list[Leaf]:
    """Leaf 0xB: one thread a core, all cores in one package. [SDM] 2A CPUID, leaf 0BH."""
    return [
        Leaf(0xB, 0, SIGNIFICANT_INDEX, 0, 1, 1 << 8, vcpu),
        Leaf(0xB, 1, SIGNIFICANT_INDEX, core_bits, vcpus, 2 << 8 | 1, vcpu),
        Leaf(0xB, 2, SIGNIFICANT_INDEX, 0, 0, 2, vcpu),
    ]


def _tsc(tsc_khz: int) -> list[Leaf]:
    """Leaves 0x15 (TSC to crystal ratio) and 0x16 (frequencies in MHz).

    Linux computes crystal_khz * numerator in 32 bits, so the numerator must stay below 4,294.
    """
    ratio = Fraction(tsc_khz * 1000, KVM_APIC_BUS_HZ)
    largest = int(4294 / max(ratio, Fraction(1))) or 1
    ratio = ratio.limit_denominator(largest)
    mhz = tsc_khz // 1000
    return [
        Leaf(0x15, 0, 0, ratio.denominator, ratio.numerator, KVM_APIC_BUS_HZ, 0),
        Leaf(0x16, 0, 0, mhz, mhz, 100, 0),
    ]


def _words(signature: bytes) -> tuple[int, int, int]:
    ebx, ecx, edx = (int.from_bytes(signature[i : i + 4], "little") for i in (0, 4, 8))
    return ebx, ecx, edx

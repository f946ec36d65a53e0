"""What one version of Windows has: functions, capabilities, properties and registers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...hypervisor.whp import codes

TSC_HZ: Final = 1_000_000_000
APIC_HZ: Final = 25_000_000


@dataclass(frozen=True, slots=True)
class Profile:
    """``missing``: functions that GetProcAddress does not find. The rest says what is refused or left out.

    ``instruction_bytes`` is how many bytes an exit brings at most; some hosts bring fewer than the instruction has.
    """

    name: str
    missing: frozenset[str] = frozenset()
    unknown_capabilities: frozenset[int] = frozenset()
    unknown_properties: frozenset[int] = frozenset()
    unknown_registers: frozenset[int] = frozenset()
    invariant_tsc: bool = True
    tsc_deadline: bool = True
    instruction_bytes: int = 16


PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("win11"),
        Profile(
            "win10-19045",
            missing=frozenset(("WHvGetVirtualProcessorState", "WHvSetVirtualProcessorState")),
            unknown_capabilities=frozenset((codes.WHvCapabilityCodePhysicalAddressWidth,)),
            unknown_properties=frozenset(
                (
                    codes.WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks,
                    codes.WHvPartitionPropertyCodeReferenceTime,
                    codes.WHvPartitionPropertyCodeCpuidResultList2,
                    codes.WHvPartitionPropertyCodeMsrActionList,
                    codes.WHvPartitionPropertyCodeUnimplementedMsrAction,
                )
            ),
            unknown_registers=frozenset((codes.WHvX64RegisterTscDeadline, codes.WHvX64RegisterXss)),
            invariant_tsc=False,
            tsc_deadline=False,
        ),
    )
}

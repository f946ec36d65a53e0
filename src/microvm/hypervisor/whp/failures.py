"""What a failed WHv call means and what the person at the machine can do: one table, read by `api.error_for`."""

from __future__ import annotations

from typing import Final

from . import codes

ENABLE_COMMANDS: Final = (
    "Enable-WindowsOptionalFeature -Online -FeatureName HypervisorPlatform -All",
    "Enable-WindowsOptionalFeature -Online -FeatureName VirtualMachinePlatform -All",
)
ENABLE_HINT: Final = (
    f"run in an elevated PowerShell: {ENABLE_COMMANDS[0]}; {ENABLE_COMMANDS[1]}; then restart Windows; "
    "if it stays like this, switch on VT-x or AMD-V in the firmware"
)
RIGHTS_HINT: Final = "run from an elevated prompt, or let an administrator add you to the group Hyper-V Administrators"
MEMORY_HINT: Final = "close other virtual machines or give this one less memory"
CONFLICT_HINT: Final = "another virtual machine program may hold the processor: close it"

# HRESULT: what it means, the hint, whether the whole platform cannot be used then
_TABLE: Final[dict[int, tuple[str, str, bool]]] = {
    codes.ERROR_HV_NOT_PRESENT: ("no hypervisor is running", ENABLE_HINT, True),
    codes.E_ACCESSDENIED: ("Windows does not let this user make partitions", RIGHTS_HINT, True),
    codes.ERROR_HV_ACCESS_DENIED: ("the hypervisor does not let this user do that", RIGHTS_HINT, True),
    codes.ERROR_HV_OPERATION_DENIED: ("the hypervisor does not allow that now", CONFLICT_HINT, False),
    codes.WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG: (
        "the running hypervisor does not offer the platform to programs",
        ENABLE_HINT,
        True,
    ),
    codes.WHV_E_UNSUPPORTED_PROCESSOR_CONFIG: ("this processor cannot run the requested configuration", "", False),
    codes.E_OUTOFMEMORY: ("the host is out of memory", MEMORY_HINT, False),
    codes.ERROR_HV_INSUFFICIENT_MEMORY: ("the hypervisor is out of memory", MEMORY_HINT, False),
    codes.WHV_E_UNKNOWN_CAPABILITY: ("this Windows does not know the capability", "", False),
    codes.WHV_E_UNKNOWN_PROPERTY: ("this Windows does not know the property", "", False),
    codes.WHV_E_INSUFFICIENT_BUFFER: ("a buffer was too small", "", False),
    codes.WHV_E_INVALID_PARTITION_CONFIG: ("the partition's properties contradict each other", "", False),
    codes.WHV_E_GPA_RANGE_NOT_FOUND: ("nothing is mapped at that guest address", "", False),
    codes.WHV_E_VP_ALREADY_EXISTS: ("the virtual processor exists already", "", False),
    codes.WHV_E_VP_DOES_NOT_EXIST: ("there is no such virtual processor", "", False),
    codes.WHV_E_INVALID_VP_STATE: ("the virtual processor is not in a state for that", "", False),
    codes.WHV_E_INVALID_VP_REGISTER_NAME: ("this Windows does not know the register", "", False),
    codes.ERROR_HV_INVALID_PARAMETER: ("the hypervisor refused a parameter", "", False),
    codes.ERROR_HV_INVALID_PARTITION_STATE: ("the partition is not in a state for that", "", False),
    codes.ERROR_HV_INVALID_VP_STATE: ("the virtual processor is not in a state for that", "", False),
    codes.ERROR_HV_INVALID_REGISTER_VALUE: ("a register cannot hold that value", "", False),
    codes.E_INVALIDARG: ("Windows refused an argument", "", False),
    codes.E_NOTIMPL: ("this Windows does not implement that", "", False),
}
# Before a partition exists, what cannot be done means that the platform cannot be used.
_FIRST_CALLS: Final = ("WHvGetCapability", "WHvCreatePartition", "WHvSetupPartition")


def meaning_of(call: str, result: int) -> tuple[str, bool]:
    """What the result says, and whether the platform cannot be used."""
    meaning, _, unavailable = _TABLE.get(result, ("Windows refused the call", "", False))
    memory = result in (codes.E_OUTOFMEMORY, codes.ERROR_HV_INSUFFICIENT_MEMORY)
    return meaning, unavailable or (call in _FIRST_CALLS and not memory)


def hint_for(call: str, result: int) -> str:
    """What to do about it, or the empty string."""
    _, hint, _ = _TABLE.get(result, ("", "", False))
    return hint or (ENABLE_HINT if call == "WHvCreatePartition" and result not in _TABLE else "")

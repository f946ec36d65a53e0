"""What an exit that ends a run means, in one sentence."""

from __future__ import annotations

from typing import Final

from . import abi

_NAMES: Final = {
    value: name
    for name, value in vars(abi).items()
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}

# Exits that only a capability we never enable can cause.
_INTERNAL: Final = {
    abi.KVM_INTERNAL_ERROR_SIMUL_EX: "KVM could not deliver two exceptions at once",
    abi.KVM_INTERNAL_ERROR_DELIVERY_EV: "KVM could not deliver an event to the guest",
    abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "the processor left the guest for a reason KVM does not know",
}
_VMX_INVALID_GUEST_STATE: Final = 0x8000_0021
_SVM_INVALID_GUEST_STATE: Final = 0xFFFF_FFFF_FFFF_FFFF


def crash_detail(run: abi.kvm_run) -> str:
    """The sentence for ``VcpuStop.detail``. ``run`` is a copy."""
    reason: int = run.exit_reason
    if reason == abi.KVM_EXIT_INTERNAL_ERROR:
        return _internal_error(run)
    if reason == abi.KVM_EXIT_FAIL_ENTRY:
        code: int = run.fail_entry.hardware_entry_failure_reason
        why = (
            "its state is not one a processor can be in"
            if code in (_VMX_INVALID_GUEST_STATE, _SVM_INVALID_GUEST_STATE)
            else "the reason is the processor's"
        )
        return f"the processor refused to enter the guest, hardware code {code:#x}: {why}"
    if reason == abi.KVM_EXIT_SYSTEM_EVENT:
        return f"the guest reported a crash to the hypervisor (system event {run.system_event.type})"
    if reason == abi.KVM_EXIT_UNKNOWN:
        return f"KVM left the guest for a hardware reason it does not know, {run.hardware_exit_reason:#x}"
    name = _NAMES.get(reason)
    if name is None:
        return f"KVM returned with exit reason {reason}, which this version does not know"
    return f"KVM returned with {name}, which was never asked for"


def _internal_error(run: abi.kvm_run) -> str:
    internal = run.internal
    suberror: int = internal.suberror
    if suberror != abi.KVM_INTERNAL_ERROR_EMULATION:
        text = _INTERNAL.get(suberror, f"KVM internal error {suberror}")
        data = ", ".join(f"{internal.data[i]:#x}" for i in range(min(internal.ndata, 16)))
        return f"{text} ({data})" if data else text
    text = "KVM could not emulate an instruction"
    # data[0] holds flags, data[1:3] one byte of length and up to 15 of code.
    if internal.ndata >= 3 and internal.data[0] & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
        raw = internal.data[1].to_bytes(8, "little") + internal.data[2].to_bytes(8, "little")
        code = raw[1 : 1 + min(raw[0], 15)]
        if code:
            text += f": {code.hex(' ')}"
    return text

"""What only WHP can be asked: properties, functions, sizes, and Windows' own cancel."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..base import PartitionConfig
from . import codes, features, flags, state
from .api import PROTOTYPES

if TYPE_CHECKING:
    from .hypervisor import WhpHypervisor

_REGISTERS = {
    "TscDeadline": codes.WHvX64RegisterTscDeadline,
    "Xss": codes.WHvX64RegisterXss,
    "TscAdjust": codes.WHvX64RegisterTscAdjust,
    "MiscEnable": codes.WHvX64RegisterMsrIa32MiscEnable,
    "ReferenceTsc": codes.WHvRegisterReferenceTsc,
    "PendingEvent": codes.WHvRegisterPendingEvent,
    "InternalActivityState": codes.WHvRegisterInternalActivityState,
}


def questions(backend: WhpHypervisor) -> dict[str, Callable[[], tuple[str, bool | None]]]:
    """The questions by name."""
    api = backend.api

    def functions() -> tuple[str, None]:
        missing = [name for name in PROTOTYPES if not api.has(name)]
        return f"missing: {', '.join(missing) or 'none'}", None

    def windows_features() -> tuple[str, None]:
        found = flags.WHV_CAPABILITY_FEATURES()
        features.capability(api, codes.WHvCapabilityCodeFeatures, found)
        exits = flags.WHV_EXTENDED_VM_EXITS()
        features.capability(api, codes.WHvCapabilityCodeExtendedVmExits, exits)
        tsc, timer = features.frequencies(api)
        return f"features {found.AsUINT64:#x}, exits {exits.AsUINT64:#x}, TSC {tsc} Hz, APIC timer {timer} Hz", None

    def properties() -> tuple[str, None]:
        partition = backend.create_partition(PartitionConfig())
        refused = partition.refused
        partition.close()
        return f"refused: {', '.join(refused) or 'none'}", None

    def registers() -> tuple[str, None]:
        partition = backend.create_partition(PartitionConfig())
        try:
            vcpu = partition.create_vcpu(0)
            absent = [name for name, code in _REGISTERS.items() if not state.has_register(vcpu, code)]
            sizes = f"XSAVE {len(state.get_xsave(vcpu))} bytes, APIC {len(state.get_lapic(vcpu))} bytes"
            return f"{sizes}, unknown registers: {', '.join(absent) or 'none'}", None
        finally:
            partition.close()

    def cancel() -> tuple[str, bool]:
        """Windows' cancel alone, without the flag that makes our kick sticky in any case."""
        partition = backend.create_partition(PartitionConfig())
        try:
            vcpu: Any = partition.create_vcpu(0)  # no memory: whatever it does first is an exit
            api.call("WHvCancelRunVirtualProcessor", partition.handle, 0, 0)
            timer = threading.Timer(0.5, api.attempt, ("WHvCancelRunVirtualProcessor", partition.handle, 0, 0))
            timer.start()
            begin = time.perf_counter()
            reason = vcpu.enter_once()
            took = time.perf_counter() - begin
            timer.cancel()
            timer.join()
            sticky = reason == codes.WHvRunVpExitReasonCanceled and took < 0.4
            return f"exit {reason:#x} after {1e3 * took:.2f} ms: {'sticky' if sticky else 'not sticky'}", sticky
        finally:
            partition.close()

    return {
        "functions": functions,
        "windows features": windows_features,
        "properties": properties,
        "registers": registers,
        "cancel": cancel,
    }

"""Whether KVM is worth using here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ...errors import BackendUnavailable, HostError
from ..base import Availability
from ..trial import run_trial

if TYPE_CHECKING:
    from .hypervisor import KvmHypervisor

# Below this the host interprets supervisor code: hardware does thousands, emulated hardware (QEMU) hundreds.
EMULATED_MIPS: Final = 20.0
_HINT: Final = "KVM runs here without hardware virtualization beneath: enable it, nested if this is a virtual machine"


def probe(hypervisor: KvmHypervisor) -> Availability:
    """Run the trial guest and judge."""
    try:
        trial = run_trial(hypervisor)
    except BackendUnavailable as error:
        what = f"{error.call}: {error.message}" if error.call else error.message
        return Availability("kvm", False, what, error.hint)
    except HostError as error:
        return Availability("kvm", False, str(error), "look at the kernel log")
    slow = 0 < trial.mips < EMULATED_MIPS
    usable = not trial.failure and not slow
    reason = trial.failure or "KVM runs guests on the processor"
    hint = "" if usable else _HINT if slow else "look at the kernel log"
    if slow:
        reason = f"this KVM only emulates supervisor code ({trial.mips:.1f} MIPS)"
        reason += f", and {trial.failure}" if trial.failure else ""
    mips, exits_per_second = round(trial.mips, 1), float(round(trial.exits_per_second))
    return Availability("kvm", usable, reason, hint, usable, mips, exits_per_second)

"""The backends by name, and the choice among them.

Backends are imported when first asked for: each needs a library or a host of its own.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Final

from .._version import __version__
from ..errors import BackendUnavailable, ConfigError
from .base import Availability, Hypervisor

AUTO: Final = "auto"

# name: module, class, what to install when the module's own imports fail
_BACKENDS: Final = {
    "kvm": ("microvm.hypervisor.kvm", "KvmHypervisor", ""),
    "whp": ("microvm.hypervisor.whp", "WhpHypervisor", "pip install 'microvm[whp]'"),
    "soft": ("microvm.hypervisor.soft", "SoftHypervisor", "pip install 'microvm[soft]'"),
}

# Hardware this fast is not outrun by any software CPU, which then need not be started to be measured.
DECISIVE_MIPS: Final = 1500.0


def backend_names() -> tuple[str, ...]:
    """Every backend this package has, the likely fastest first."""
    return tuple(_BACKENDS)


def load(name: str) -> Hypervisor:
    """The backend called ``name``, not probed. Raises ConfigError, BackendUnavailable if a library is missing."""
    entry = _BACKENDS.get(name)
    if entry is None:
        raise ConfigError("backend", name, f"one of {', '.join((AUTO, *_BACKENDS))}")
    module, class_name, install = entry
    try:
        backend: Hypervisor = getattr(importlib.import_module(module), class_name)()
    except ImportError as error:
        raise BackendUnavailable("", 0, f"the {name} backend needs {error.name or module}", install) from error
    return backend


@functools.cache
def probe(name: str) -> Availability:
    """What probing the backend found; asked once a process. Raises ConfigError for an unknown name."""
    try:
        return load(name).probe()
    except BackendUnavailable as error:
        return Availability(name, False, error.message, error.hint)


def probe_all() -> list[Availability]:
    """Every backend's availability, in the order of `backend_names`. For ``microvm doctor``."""
    return [probe(name) for name in _BACKENDS]


def choose(name: str = AUTO) -> Hypervisor:
    """The backend to use: by name, or the fastest one that passes its probe.

    A backend asked for by name is not probed: if it cannot work here at all, making a partition says so. Raises
    ConfigError for an unknown name, BackendUnavailable if nothing passes.
    """
    return load(name if name != AUTO else automatic().name)


def remembered(path: Path, boot: str) -> str:
    """The name that ``auto`` stands for, without probing if ``path`` says what it was on this ``boot`` of the host.

    Whatever could change the answer is in the file's first line. Raises BackendUnavailable if no backend passes.
    """
    device = os.stat("/dev/kvm") if os.path.exists("/dev/kvm") else None
    usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
    circumstances = repr((boot, __version__, sys.version, usable, device and device.st_ino))
    try:
        said, name = path.read_text().splitlines()[:2]
        if said == circumstances and name in _BACKENDS:
            return name
    except (OSError, ValueError):
        pass
    name = automatic().name
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(f"{circumstances}\n{name}\n")
        os.replace(temporary, path)
    return name


def automatic() -> Availability:
    """What ``auto`` takes, and how it did. Raises BackendUnavailable if no backend passes."""
    found: list[Availability] = []
    for name in _BACKENDS:
        availability = probe(name)
        found.append(availability)
        if availability.usable and availability.mips >= DECISIVE_MIPS and availability.accelerated:
            return availability
    usable = [availability for availability in found if availability.usable]
    if not usable:
        reasons = "; ".join(f"{a.name}: {a.reason}" for a in found)
        hints = {a.name: a.hint for a in found if a.hint}
        hint = hints.get("whp", "") if sys.platform == "win32" else ""
        hint = hint or next(reversed(hints.values()), "")
        raise BackendUnavailable("", 0, f"no backend works here ({reasons})", hint)
    return max(usable, key=lambda availability: (availability.mips, availability.accelerated))

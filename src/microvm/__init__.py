"""microvm: an embeddable microVM monitor.

    import microvm

    with microvm.Sandbox() as sandbox:
        print(sandbox.run(["python3", "-c", "print(6 * 7)"]).stdout_text)

`Sandbox` runs commands in a Linux guest, `MicroVM` is the machine below it, `microvm.aio` is the asyncio mirror. Names
are loaded when first used: importing the package costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import aio as aio
    from . import errors as errors
    from .api import DEVNULL, PIPE, STDOUT, FileInfo, Files, GuestInfo, Process, Result, Sandbox
    from .errors import (
        BackendUnavailable,
        BootError,
        CommandFailed,
        ConfigError,
        ExecError,
        ExecTimeout,
        GuestError,
        GuestFileError,
        GuestFileNotFound,
        HostError,
        InternalError,
        MicroVMError,
        SnapshotError,
        StateError,
        WorkerError,
    )
    from .machine.config import DiskConfig, MachineConfig
    from .machine.console import Console
    from .machine.machine import MicroVM
    from .machine.outcome import Outcome
    from .pool import Pool

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "BackendUnavailable",
    "BootError",
    "CommandFailed",
    "ConfigError",
    "Console",
    "DiskConfig",
    "ExecError",
    "ExecTimeout",
    "FileInfo",
    "Files",
    "GuestError",
    "GuestFileError",
    "GuestFileNotFound",
    "GuestInfo",
    "HostError",
    "InternalError",
    "MachineConfig",
    "MicroVM",
    "MicroVMError",
    "Outcome",
    "Pool",
    "Process",
    "Result",
    "Sandbox",
    "SnapshotError",
    "StateError",
    "WorkerError",
    "__version__",
    "aio",
]

_HOME = {
    **dict.fromkeys(
        ("DEVNULL", "PIPE", "STDOUT", "FileInfo", "Files", "GuestInfo", "Process", "Result", "Sandbox"), "api"
    ),
    **dict.fromkeys(("DiskConfig", "MachineConfig"), "machine.config"),
    "Console": "machine.console",
    "MicroVM": "machine.machine",
    "Outcome": "machine.outcome",
    "Pool": "pool",
    **dict.fromkeys(
        (name for name in __all__ if name.endswith(("Error", "Timeout", "Unavailable", "Failed", "NotFound"))), "errors"
    ),
}


def __getattr__(name: str) -> object:
    import importlib

    if name in ("aio", "errors"):
        return importlib.import_module(f".{name}", __name__)
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The public face: its names, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import microvm

NAMES = [
    "BackendUnavailable",
    "BootError",
    "CommandFailed",
    "ConfigError",
    "Console",
    "DEVNULL",
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
    "PIPE",
    "Pool",
    "Process",
    "Result",
    "STDOUT",
    "Sandbox",
    "SnapshotError",
    "StateError",
    "WorkerError",
    "__version__",
    "aio",
]

HEAVY = {"asyncio", "ctypes", "argparse", "socket", "selectors", "subprocess", "json", "dataclasses", "inspect", "mmap"}


def test_exported_names_are_the_documented_ones() -> None:
    assert sorted(microvm.__all__) == NAMES
    assert set(NAMES) <= set(dir(microvm))


@pytest.mark.parametrize("name", NAMES)
def test_exported_name_exists(name: str) -> None:
    assert getattr(microvm, name) is getattr(microvm, name)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        microvm.Nothing  # noqa: B018


def test_import_loads_nothing_heavy() -> None:
    probe = "import sys; before = set(sys.modules); import microvm; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {probe}"],
                          capture_output=True, text=True, check=True, timeout=60)  # fmt: skip
    loaded = set(done.stdout.split())
    assert not loaded & HEAVY
    assert {name for name in loaded if name.startswith("microvm")} == {"microvm", "microvm._version"}


def test_sandbox_module_does_not_load_asyncio() -> None:
    probe = "import sys, microvm; microvm.Sandbox, microvm.MicroVM; sys.exit('asyncio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {probe}"], timeout=60)
    assert done.returncode == 0


FOR_WORKERS = {"can_fork", "ending", "forked", "on_end", "park", "thread_count", "unpark"}
"""What the processes that machines are forked in need; they have no event loop."""


@pytest.mark.parametrize("name", ["Sandbox", "MicroVM"])
def test_async_mirror_has_the_same_methods_and_parameters(name: str) -> None:
    ours = getattr(microvm, name)
    mirror = getattr(microvm.aio, name)
    for method, function in inspect.getmembers(ours):
        if method.startswith("_") or method in FOR_WORKERS:
            continue
        assert hasattr(mirror, method), f"aio.{name} has no {method}"
        if inspect.isfunction(function):
            here = [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            other = inspect.signature(getattr(mirror, method)).parameters.values()
            there = [(p.name, p.kind, p.default) for p in other]
            assert here == there, f"aio.{name}.{method} takes other parameters"


@pytest.mark.parametrize("name", ["Process", "Files"])
def test_async_mirror_has_the_same_methods(name: str) -> None:
    ours = {method for method in dir(getattr(microvm, name)) if not method.startswith("_")}
    mirror = {method for method in dir(getattr(microvm.aio, name)) if not method.startswith("_")}
    assert ours - mirror <= {"poll"}

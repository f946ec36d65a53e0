"""Builds the two programs in C that go with the package; everything else is in pyproject.toml.

- the guest agent, a static Linux program: ``microvm/agent/guest/agent-x86_64`` (musl-gcc if there is one)
- the shim of the software CPU, for this host's Python: ``microvm/hypervisor/soft/_shim.so``

Both are made in the source tree, when a source is newer, so that editable installs, wheels and
``python setup.py build_native`` (the C programs alone) see the same files. Neither is required: without a compiler
there is a warning.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GUEST = ROOT / "src/microvm/agent/guest"
AGENT = GUEST / "agent-x86_64"
SHIM_SOURCES = ROOT / "src/microvm/hypervisor/soft/shim"
SHIM = ROOT / "src/microvm/hypervisor/soft/_shim.so"

AGENT_FLAGS = [
    *("-D_GNU_SOURCE", "-std=gnu11", "-Os", "-static", "-s", "-Wall", "-Wextra"),
    *("-fno-asynchronous-unwind-tables", "-fno-stack-protector"),
    *("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
]
SHIM_FLAGS = ["-O2", "-shared", "-fPIC", "-pthread", "-Wall", "-Wextra"]


def compile_to(target: Path, folder: Path, compilers: list[str], flags: list[str]) -> bool:
    """Compile all of ``folder``'s C into ``target`` unless that is newer. Returns whether it is there then."""
    sources = sorted(folder.glob("*.c"))
    if not sources:
        return False
    inputs = [*sources, *folder.glob("*.h"), Path(__file__)]
    if target.exists() and target.stat().st_mtime >= max(path.stat().st_mtime for path in inputs):
        return True
    compiler = next((found for name in compilers if name and (found := shutil.which(name))), None)
    if compiler is None:
        warn(f"{target.name} is not built: none of {', '.join(filter(None, compilers))} is installed")
        return False
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    command = [compiler, *flags, *map(str, sources), "-o", str(partial)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        partial.unlink(missing_ok=True)
        warn(f"{target.name} is not built: {compiler} failed\n{result.stderr}")
        return False
    if result.stderr:
        warn(result.stderr)
    partial.replace(target)
    return True


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def build_native() -> None:
    """Build what this host can."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        compile_to(AGENT, GUEST, [os.environ.get("MICROVM_GUEST_CC", ""), "musl-gcc", "gcc", "cc"], AGENT_FLAGS)
    if sys.platform == "linux":
        compile_to(SHIM, SHIM_SOURCES, [os.environ.get("CC", ""), "cc", "gcc"], SHIM_FLAGS)


def package() -> None:
    """Run setuptools. Imported here: ``build_native`` must work with no setuptools, or with any."""
    from setuptools import Distribution, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_py import build_py

    class BuildPy(build_py):
        """The C programs are package data: they must be there before the data files are listed."""

        def run(self) -> None:
            build_native()
            super().run()

    class NativeDistribution(Distribution):
        """A wheel with the shim in it is for this kind of host."""

        def has_ext_modules(self) -> bool:
            return SHIM.exists()

    class BdistWheel(bdist_wheel):
        """Any Python 3 on this kind of host: the shim is loaded by ctypes and knows no Python."""

        def get_tag(self) -> tuple[str, str, str]:
            _python, _abi, host = super().get_tag()
            return "py3", "none", host

    setup(distclass=NativeDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})


if sys.argv[1:] == ["build_native"]:
    build_native()
else:
    package()

"""A first-level guest with a working KVM, on a machine that has none.

QEMU's software CPU emulates AMD's virtualization with nested paging. This module builds an initramfs with this very
Python, its standard library, pytest, the package and its tests, boots a KVM-capable kernel on it under QEMU and runs
a program there.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from microvm.images import cache, cpio, kernels

ROOT = Path(__file__).resolve().parents[2]
QEMU = "qemu-system-x86_64"
LIBRARIES = ("pytest", "_pytest", "py", "pluggy", "iniconfig", "packaging", "pygments", "pytest_timeout")
# Without these Linux calibrates against emulated timers and one run of three hung under load.
COMMAND_LINE = "console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz=2596000 no_timer_check kvm_amd.npt=1"
SKIPPED = {
    "test", "tests", "idlelib", "tkinter", "lib2to3", "ensurepip", "turtledemo", "site-packages", "dist-packages",
    "distutils", "pydoc_data",
}  # fmt: skip
MARK = "@@"

INIT = """
import os, subprocess, sys, time, ctypes
libc = ctypes.CDLL(None, use_errno=True)
def mount(kind, where):
    os.makedirs(where, exist_ok=True)
    libc.mount(kind.encode(), where.encode(), kind.encode(), 0, None)
for kind, where in (("proc", "/proc"), ("sysfs", "/sys"), ("tmpfs", "/tmp"), ("devtmpfs", "/dev")):
    mount(kind, where)
fd = os.open("/dev/console", os.O_RDWR)
for i in range(3):
    os.dup2(fd, i)
os.environ.update(PATH="/bin", HOME="/tmp", MICROVM_CACHE="/cache", PYTHONPATH="/repo/src:/site")
os.environ.update(PYTHONDONTWRITEBYTECODE="1", **ENVIRONMENT)
print("@@up", time.clock_gettime(time.CLOCK_BOOTTIME), flush=True)
os.chdir("/repo")
status = 255
try:
    status = subprocess.call([sys.executable, *ARGUMENTS])
finally:
    print("@@status", status, "after", time.clock_gettime(time.CLOCK_BOOTTIME), flush=True)
    os.sync()
    time.sleep(0.2)
    import signal
    libc.reboot(0x1234567)
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What the program in the first-level guest did. ``status`` is None if it never finished."""

    status: int | None
    output: str
    seconds: float


def missing() -> str:
    """Why this cannot run here, or the empty string."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the nested test needs Linux on x86-64"
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed"
    if importlib.util.find_spec("pytest") is None:
        return "pytest is not installed"
    if kernel() is None:
        return "no kernel with KVM built in: make guest"
    return ""


@functools.cache
def kernel() -> Path | None:
    """The tuned kernel, if it was built with KVM for AMD."""
    for found in kernels.list():
        config = Path(found.path).with_name("config")
        if config.exists() and "CONFIG_KVM_AMD=y" in config.read_text():
            image = config.with_name("bzImage")
            return image if image.exists() else Path(found.path)
    return None


def run(
    arguments: list[str],
    environment: dict[str, str],
    timeout_s: float,
    *,
    cpus: int = 2,
    memory_mib: int = 1024,
    files: Mapping[str, Path] | None = None,
) -> Result:
    """Boot and run ``python ARGUMENTS`` in the repository's root there. ``files`` are added, by path in the guest."""
    with tempfile.TemporaryDirectory() as folder:
        initrd = Path(folder) / "initrd"
        initrd.write_bytes(cpio.pack(_entries(arguments, environment, files or {})))
        command = [
            QEMU, "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(cpus), "-m", str(memory_mib),
            "-kernel", str(kernel()), "-initrd", str(initrd), "-append", f"{COMMAND_LINE} rdinit=/init",
            "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
        ]  # fmt: skip
        started = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
    text = output.decode(errors="replace").replace("\r\n", "\n")
    status = re.search(rf"^{MARK}status (-?\d+)", text, re.M)
    return Result(int(status[1]) if status else None, text, time.monotonic() - started)


def guest_files(image: str = "base") -> dict[str, Path]:
    """The kernel cache and one root file system, where the package looks for them in the first-level guest."""
    found: dict[str, Path] = {}
    root = cache.root()
    small = kernel()
    assert small is not None
    entries = [small.parent, next(path for path in (root / "images").iterdir() if path.name.startswith(f"{image}-"))]
    for entry in entries:
        for path in entry.iterdir():
            if path.is_file() and path.name not in ("System.map", "config"):
                found[f"cache/{path.relative_to(root)}"] = path
    return found


def _entries(arguments: list[str], environment: dict[str, str], more: Mapping[str, Path]) -> list[cpio.Entry]:
    files: dict[str, Path] = {**dict(_python_files()), **more}
    names = list(files)
    result: list[cpio.Entry] = [cpio.directory(name) for name in ("dev", "proc", "sys", "tmp", "bin", "etc")]
    result.append(cpio.character_device("dev/console", 5, 1))
    result.append(cpio.character_device("dev/null", 1, 3))
    for name in names:
        source = files[name]
        stat = source.stat()
        # .pyc files are checked against their source's time.
        result.append(cpio.file(name, source.read_bytes(), stat.st_mode & 0o777, int(stat.st_mtime)))
    python = os.path.realpath(sys.executable)
    init = f"#!{python} -I\nENVIRONMENT = {environment!r}\nARGUMENTS = {arguments!r}\n{INIT}"
    result.append(cpio.file("init", init.encode(), 0o755))
    return result


def _python_files() -> Iterator[tuple[str, Path]]:
    """Path in the archive and on this machine of everything Python, pytest and the tests need."""
    seen: set[str] = set()

    def put(path: str) -> Iterator[tuple[str, Path]]:
        if path not in seen:
            seen.add(path)
            yield path.lstrip("/"), Path(os.path.realpath(path))

    def libraries(path: str) -> Iterator[tuple[str, Path]]:
        text = subprocess.run(["ldd", path], capture_output=True, text=True, check=False).stdout
        for found in re.findall(r"(/\S+) \(0x", text):
            yield from put(found)

    python = os.path.realpath(sys.executable)
    yield from put(python)
    yield from libraries(python)
    for folder, folders, files in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith("config-")]
        for name in files:
            if name.endswith((".a", ".opt-1.pyc", ".opt-2.pyc")):
                continue
            path = os.path.join(folder, name)
            yield from put(path)
            if name.endswith(".so"):
                yield from libraries(path)
    for name in LIBRARIES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin)
        top = origin.parent if spec.submodule_search_locations else origin
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and path.suffix in (".py", ".pyc", ".typed"):
                yield f"site/{path.relative_to(top.parent)}", path
    for top in ("src/microvm", "tests/conformance", "bench"):
        for path in sorted((ROOT / top).rglob("*")):
            if path.is_file() and (path.suffix in (".py", ".pyc", ".fragment") or path.name.startswith("agent-")):
                yield f"repo/{path.relative_to(ROOT)}", path
    yield "repo/pyproject.toml", ROOT / "pyproject.toml"

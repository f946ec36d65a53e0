"""Finding and loading the engine and the shim, once a process.

The shim must be loaded with global symbols before the engine, or the engine binds its own functions (`shim/engine.c`
tells why). A process that has loaded unicorn for its own purposes has it bound already, so the engine is then loaded
from a private copy, which the dynamic linker treats as another library.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
import zlib
from pathlib import Path
from typing import Final

from ...errors import BackendUnavailable

NAME: Final = "soft"
_HERE: Final = Path(__file__).parent
_lock = threading.Lock()
_shim: ctypes.CDLL | None = None

PIO_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
PIO_WRITE = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint32)
MMIO_READ = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint32)
MMIO_WRITE = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint64)
EOI = ctypes.CFUNCTYPE(None, ctypes.c_uint32)


class Callbacks(ctypes.Structure):
    """`struct Callbacks` of soft.h."""

    _fields_ = (
        ("pio_read", PIO_READ),
        ("pio_write", PIO_WRITE),
        ("mmio_read", MMIO_READ),
        ("mmio_write", MMIO_WRITE),
        ("eoi", EOI),
    )


class CpuidEntry(ctypes.Structure):
    """`struct CpuidEntry` of soft.h."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in ("leaf", "subleaf", "eax", "ebx", "ecx", "edx"))


class Exit(ctypes.Structure):
    """`struct Exit` of soft.h: what a vCPU of a partition with exits stopped before."""

    _fields_ = (
        ("kind", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("gva", ctypes.c_uint64),
    )


COUNTERS: Final = ("pio", "mmio", "doorbells", "latched", "hlt", "interrupts", "switches", "kicks")


class Counters(ctypes.Structure):
    """`struct Counters` of soft.h: how often what happened, since the partition was made."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in COUNTERS)


def _unavailable(reason: str, hint: str) -> BackendUnavailable:
    return BackendUnavailable("", 0, f"the software CPU cannot be used: {reason}", hint)


def engine_path() -> Path:
    """The unicorn library of the installed wheel. Raises BackendUnavailable."""
    spec = importlib.util.find_spec("unicorn")
    if spec is None or spec.origin is None:
        raise _unavailable("the unicorn package is not installed", "pip install 'microvm[soft]'")
    found = sorted((Path(spec.origin).parent / "lib").glob("libunicorn.so*"))
    if not found:
        raise _unavailable("the unicorn package carries no library for this system", "Linux on x86-64 is needed")
    return found[0]


def _already_loaded(path: Path) -> bool:
    if sys.platform == "win32":
        return False
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_NOLOAD)
    except OSError:
        return False
    return True


def _declare(shim: ctypes.CDLL) -> None:
    p, i, u32, u64, i64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64
    size, text = ctypes.c_size_t, ctypes.c_char_p
    prototypes: dict[str, tuple[object, list[object]]] = {
        "mv_load_library": (i, [text, text, size]),
        "mv_partition_new": (p, [i, u32, p, text, size]),
        "mv_partition_free": (None, [p]),
        "mv_before_fork": (None, [p]),
        "mv_after_fork": (None, [p]),
        "mv_set_cpuid": (None, [p, p, i]),
        "mv_engine_cpuid": (None, [p, u32, u32, p]),
        "mv_map": (i, [p, u64, u64, u64, u32, i]),
        "mv_unmap": (i, [p, u64, u64]),
        "mv_dirty": (i, [p, u64, u64, p]),
        "mv_dma": (None, [p, u64, u64]),
        "mv_signal_msi": (None, [p, u64, u32]),
        "mv_doorbell": (i, [p, u64, u32, u64, i]),
        "mv_latch_pio": (i, [p, u32, i]),
        "mv_time": (i64, [p]),
        "mv_pause_time": (None, [p]),
        "mv_resume_time": (None, [p]),
        "mv_set_time": (None, [p, i64]),
        "mv_vcpu_create": (None, [p, i]),
        "mv_vcpu_run": (i, [p, i]),
        "mv_vcpu_kick": (None, [p, i]),
        "mv_vcpu_detail": (text, [p, i]),
        "mv_vcpu_crashed": (ctypes.POINTER(u64), [p, i]),
        "mv_vcpu_env": (p, [p, i]),
        "mv_vcpu_msr": (i, [p, i, u32, p, i]),
        "mv_vcpu_translate": (i64, [p, i, u64]),
        "mv_vcpu_tpr": (u32, [p, i, i, u32]),
        "mv_vcpu_state_size": (u32, []),
        "mv_vcpu_save": (None, [p, i, p]),
        "mv_vcpu_restore": (None, [p, i, p]),
        "mv_callback_failed": (None, [p, i]),
        "mv_vcpu_registers_set": (None, [p, i]),
        "mv_counters": (p, [p]),
        "mv_set_exits": (None, [p, i]),
        "mv_vcpu_exit": (None, [p, i, p]),
        "mv_vcpu_get": (None, [p, i, p]),
        "mv_vcpu_set": (None, [p, i, p]),
        "mv_vcpu_activity": (None, [p, i, p, i]),
        "mv_vcpu_apic": (None, [p, i, p, i]),
        "mv_vcpu_state": (p, [p, i]),
        "mv_lock": (None, [p]),
        "mv_unlock": (None, [p]),
        "mv_env_get": (None, [p, p]),
        "mv_env_set": (None, [p, p]),
        "mv_env_debug": (None, [p, p, i]),
        "mv_env_get_xsave": (None, [p, p]),
        "mv_env_set_xsave": (None, [p, p]),
        "mv_env_xcr0": (p, [p]),
    }
    for name, (result, arguments) in prototypes.items():
        function = getattr(shim, name)
        function.restype = result
        function.argtypes = arguments


@functools.cache
def build_id() -> str:
    """Tells apart builds of shim and engine. Raises BackendUnavailable."""
    engine = engine_path()
    shim = (_HERE / "_shim.so").read_bytes()
    return f"{zlib.crc32(shim):08x}-{engine.parent.parent.name}-{engine.stat().st_size}"


def load() -> ctypes.CDLL:
    """The shim with the engine behind it. The first call loads both (about 10 ms). Raises BackendUnavailable."""
    global _shim
    if _shim is not None:
        return _shim
    with _lock:
        if _shim is None:
            _shim = _load()
        return _shim


def _load() -> ctypes.CDLL:
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        raise _unavailable("its shim exists for Linux on x86-64 only", "use a hardware backend on this system")
    shim_path = _HERE / "_shim.so"
    if not shim_path.exists():
        raise _unavailable("its shim was not built", "install gcc and reinstall microvm")
    path = engine_path()
    private: Path | None = None
    if _already_loaded(path):
        descriptor, name = tempfile.mkstemp(prefix="microvm-engine-", suffix=".so")
        os.close(descriptor)
        private = Path(name)
        shutil.copyfile(path, private)
    try:
        try:
            shim = ctypes.CDLL(str(shim_path), mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        except OSError as error:
            raise _unavailable(str(error), "reinstall microvm") from error
        try:
            _declare(shim)
        except AttributeError as error:
            raise _unavailable(f"its shim is of another version ({error})", "reinstall microvm") from error
        message = ctypes.create_string_buffer(200)
        if shim.mv_load_library(os.fsencode(private or path), message, len(message)):
            raise _unavailable(message.value.decode(errors="replace"), "pip install 'microvm[soft]'")
    finally:
        if private is not None:
            private.unlink()
    return shim

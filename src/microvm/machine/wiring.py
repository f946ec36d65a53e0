"""Opening what a machine is made of: disks, kernel images, memory. Only here do names become resources."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..boot import BootState, VirtioSlot, acpi, load
from ..disk import RawDisk
from ..errors import BackendUnavailable, BootError, ConfigError
from ..hypervisor.limits import memory_hint
from ..memory import GuestMemory
from .config import DiskConfig, MachineConfig


def open_disk(config: DiskConfig) -> RawDisk:
    """Open a disk image. Read-only images are opened so, whatever the device does. Raises ConfigError."""
    flags = os.O_RDONLY if config.read_only else os.O_RDWR
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(config.path, flags)
    except OSError as error:
        raise ConfigError("disk", str(config.path), f"cannot be opened: {_reason(error)}") from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError("disk", str(config.path), "is not a regular file")
        return RawDisk(fd, f"disk {config.path}")
    except BaseException:
        os.close(fd)
        raise


def allocate_memory(memory_mib: int) -> GuestMemory:
    """Guest RAM, committed as it is touched. Raises BackendUnavailable where the host refuses even that."""
    try:
        return GuestMemory.allocate(memory_mib << 20)
    except (OSError, MemoryError) as error:
        code = getattr(error, "errno", None) or errno.ENOMEM
        message = f"the host refuses {memory_mib} MiB of guest memory"
        raise BackendUnavailable("mmap", code, message, memory_hint()) from None


def load_kernel(config: MachineConfig, memory: GuestMemory, slots: Sequence[VirtioSlot]) -> BootState:
    """Put kernel, initrds and tables into memory. Raises BootError and ConfigError, with the file's name."""
    with contextlib.ExitStack() as stack:
        kernel = _open(stack, "kernel", config.kernel)
        initrds = [source if isinstance(source, bytes) else _open(stack, "initrd", source) for source in config.initrds]
        try:
            return load(memory, kernel, initrds, config.cmdline, config.cpus, slots, (acpi.GENERATION,))
        except BootError as error:
            raise BootError(f"{config.kernel}: {error}") from None


def _open(stack: contextlib.ExitStack, field: str, path: Path) -> BinaryIO:
    try:
        return stack.enter_context(open(path, "rb"))
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be opened: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()

"""What a machine is made of, checked before anything is opened.

A `MachineConfig` that exists is consistent in itself; `check_files` looks at the host (files, RAM). Both raise
ConfigError with one sentence that names the setting, the value and what would do.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import ConfigError
from ..hypervisor.select import AUTO, backend_names
from ..memory.guest import MIN_MEMORY_MIB

MAX_CPUS: Final = 32
MAX_MEMORY_MIB: Final = 512 << 10  # half a TiB: page tables and the memory map are laid out for no more
MEMORY_STEP_MIB: Final = 2  # a large page
MAX_OVERCOMMIT: Final = 8  # guest RAM is committed on touch; this many times the host's RAM is still plausible
MAX_DISKS: Final = 8
MAX_CMDLINE: Final = 2047  # Linux's COMMAND_LINE_SIZE on x86 is 2048 with its NUL
SECTOR: Final = 512
MIN_GUEST_CID: Final = 3  # [virtio-v1.2] 5.10.4: 0, 1 and 2 are reserved
MAX_GUEST_CID: Final = 0xFFFF_FFFE

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """A raw disk image given to the guest as the next virtio block device (vda, vdb, ...)."""

    path: Path
    read_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @classmethod
    def parse(cls, text: str) -> DiskConfig:
        """``PATH`` or ``PATH,ro``. Raises ConfigError."""
        path, comma, option = text.rpartition(",")
        if comma and option in ("ro", "rw"):
            return cls(_path("disk", path), option == "ro")
        return cls(_path("disk", text))


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """A machine: what it boots, how big it is and which devices it has.

    ``kernel``: a bzImage or an uncompressed ELF. ``initrds``: cpio archives, files or bytes, loaded
    one behind the other.
    ``cmdline``: the whole kernel command line. ``memory_mib``: even, from 64. ``cpus``: 1 to 32. ``disks``: vda first.
    ``vsock_cid``: the guest's address, or None for no vsock; ``vsock_path``: a Unix socket to be
    made for programs that are not Python (`machine.vsock_path`). ``backend``: "auto" or a backend's name. ``console``:
    whether there is a virtio console (hvc0); the serial port is always there.
    """

    kernel: Path
    initrds: Sequence[Path | bytes] = ()
    cmdline: str = "console=ttyS0 reboot=t panic=-1"
    memory_mib: int = 256
    cpus: int = 1
    disks: Sequence[DiskConfig] = ()
    vsock_cid: int | None = MIN_GUEST_CID
    vsock_path: Path | None = None
    backend: str = "auto"
    console: bool = True
    rng: bool = True
    balloon: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernel", _path("kernel", self.kernel))
        if self.vsock_path is not None:
            object.__setattr__(self, "vsock_path", _path("vsock_path", self.vsock_path))
        object.__setattr__(
            self, "initrds", tuple(one if isinstance(one, bytes) else _path("initrd", one) for one in self.initrds)
        )
        object.__setattr__(self, "disks", tuple(self.disks))
        check_memory(self.memory_mib)
        check_cpus(self.cpus)
        if len(self.disks) > MAX_DISKS:
            raise ConfigError("disks", str(len(self.disks)), f"a machine takes at most {MAX_DISKS}")
        if self.vsock_cid is not None and not MIN_GUEST_CID <= self.vsock_cid <= MAX_GUEST_CID:
            raise ConfigError("vsock cid", self.vsock_cid, f"must be {MIN_GUEST_CID} to {MAX_GUEST_CID}")
        check_backend(self.backend)
        check_cmdline(self.cmdline)

    def check_files(self) -> None:
        """Look at what the configuration names on this host. Raises ConfigError.

        A file may change afterwards, so whoever opens it checks what it relies on again.
        """
        _regular_file("kernel", self.kernel)
        for initrd in self.initrds:
            if not isinstance(initrd, bytes):
                _regular_file("initrd", initrd)
        for disk in self.disks:
            _disk(disk)
        host_mib = host_memory_mib()
        if host_mib and self.memory_mib > host_mib * MAX_OVERCOMMIT:
            raise ConfigError(
                "memory", f"{self.memory_mib} MiB", f"more than {MAX_OVERCOMMIT} times the host's {host_mib} MiB"
            )


def check_memory(memory_mib: int) -> None:
    """Raise ConfigError unless this much RAM makes a machine."""
    shown = f"{memory_mib} MiB"
    if isinstance(memory_mib, bool) or not isinstance(memory_mib, int):
        raise ConfigError("memory", repr(memory_mib), "must be a whole number of MiB")
    if memory_mib < MIN_MEMORY_MIB:
        raise ConfigError("memory", shown, f"a machine needs at least {MIN_MEMORY_MIB} MiB")
    if memory_mib > MAX_MEMORY_MIB:
        raise ConfigError("memory", shown, f"a machine takes at most {MAX_MEMORY_MIB} MiB")
    if memory_mib % MEMORY_STEP_MIB:
        raise ConfigError("memory", shown, f"must be a multiple of {MEMORY_STEP_MIB} MiB")


def check_cpus(cpus: int) -> None:
    """Raise ConfigError unless a machine can have so many vCPUs."""
    if isinstance(cpus, bool) or not isinstance(cpus, int) or not 1 <= cpus <= MAX_CPUS:
        raise ConfigError("cpus", cpus, f"must be 1 to {MAX_CPUS}")


def check_backend(name: str) -> None:
    """Raise ConfigError unless there is a backend of that name."""
    names = (AUTO, *backend_names())
    if name not in names:
        raise ConfigError("backend", name, f"must be one of {', '.join(names)}")


def check_cmdline(cmdline: str) -> None:
    """Raise ConfigError unless Linux can take this command line whole."""
    try:
        size = len(cmdline.encode("ascii"))
    except UnicodeEncodeError:
        raise ConfigError("kernel command line", cmdline, "must be ASCII") from None
    if size > MAX_CMDLINE:
        raise ConfigError("kernel command line", f"of {size} bytes", f"Linux takes at most {MAX_CMDLINE}")
    if not cmdline.isprintable():
        raise ConfigError("kernel command line", repr(cmdline), "must not hold control characters")


def host_memory_mib() -> int:
    """The host's RAM in MiB, or 0 where it cannot be told."""
    if sys.platform == "win32":
        return 0
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    except (ValueError, OSError):
        return 0


def _path(field: str, path: PathLike) -> Path:
    text = os.fspath(path)
    if not text:
        raise ConfigError(field, "", "needs a file name")
    if "\0" in text:
        raise ConfigError(field, repr(text), "a file name holds no NUL")
    return Path(text)


def _regular_file(field: str, path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ConfigError(field, str(path), "there is no such file") from None
    except OSError as error:
        raise ConfigError(field, str(path), f"cannot be opened: {error.strerror}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(field, str(path), "is a directory, not a file")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(field, str(path), "is not a regular file")
    if not os.access(path, os.R_OK):
        raise ConfigError(field, str(path), "cannot be read: permission denied")
    return status


def _disk(disk: DiskConfig) -> None:
    size = _regular_file("disk", disk.path).st_size
    if size == 0:
        raise ConfigError("disk", str(disk.path), "is empty")
    if size % SECTOR:
        raise ConfigError("disk", str(disk.path), f"its size of {size} bytes is not a multiple of {SECTOR}")
    if not disk.read_only and not os.access(disk.path, os.W_OK):
        raise ConfigError("disk", str(disk.path), "cannot be written: give it as read-only")

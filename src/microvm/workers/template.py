"""Templates: snapshots of freshly booted sandboxes, one for each kind that was asked for.

    <cache>/templates/<key>.mvs     the snapshot
    <cache>/templates/<key>.used    touched when it is used: what was not used longest goes first
    <cache>/templates/<key>.lock    held while it is made

The key covers all that goes into a sandbox: kernel, agent, image, size, backend and version. A template whose parts have
changed is never looked at again and goes when room is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .._os.filelock import file_lock
from .._version import __version__
from ..agent.client import AgentClient
from ..agent.protocol import PORT, Ready
from ..errors import BootError, ExecError, HostError, SnapshotError
from ..hypervisor.select import AUTO, automatic, remembered
from ..images import cache
from ..machine.config import DiskConfig, MachineConfig
from ..machine.machine import MicroVM
from ..machine.snapshots import Restored
from ..snapshot import codec, format

DEFAULT_LIMIT_MIB: Final = 4096  # of templates, together; $MICROVM_TEMPLATES_MIB
BOOT_TIMEOUT_S: Final = 60.0
CONNECT_TIMEOUT_S: Final = 30.0
SOFT_CMDLINE: Final = "mitigations=off"  # nothing is speculated there, and page table isolation costs a quarter


def for_backend(config: MachineConfig, backend: str) -> MachineConfig:
    """The configuration with its backend decided, and what follows from that."""
    if backend == "soft" and SOFT_CMDLINE not in config.cmdline.split():
        config = replace(config, cmdline=f"{config.cmdline} {SOFT_CMDLINE}")
    return replace(config, backend=backend)


def decide(config: MachineConfig) -> MachineConfig:
    """The configuration with ``auto`` decided, from what was found before if the host has not restarted since."""
    name = config.backend
    if name == AUTO:
        try:
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            boot_id = ""
        name = remembered(cache.root() / "backend", boot_id) if boot_id else automatic().name
    return for_backend(config, name)


def key(config: MachineConfig) -> str:
    """What a template of this machine is filed under. The configuration names its backend. Raises ConfigError."""
    config.check_files()
    digest = hashlib.blake2b(digest_size=16)

    def add(*parts: object) -> None:
        digest.update(repr(parts).encode())

    add(__version__, format.VERSION, config.backend, config.memory_mib, config.cpus, config.cmdline, config.vsock_cid)
    add(config.console, config.rng, config.balloon, _stamp(config.kernel))
    for initrd in config.initrds:
        add(hashlib.blake2b(initrd, digest_size=16).digest() if isinstance(initrd, bytes) else _stamp(initrd))
    for disk in config.disks:
        add(_stamp(disk.path), disk.read_only)
    if config.backend == "soft":
        add(_stamp(Path(__file__).parents[1] / "hypervisor" / "soft" / "_shim.so"))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0
    return str(path.absolute()), status.st_size, status.st_mtime_ns


def directory() -> Path:
    """Where templates are."""
    return cache.root() / "templates"


def path_of(name: str) -> Path:
    """The file of the template ``name``."""
    return directory() / f"{name}.mvs"


def pack_config(config: MachineConfig) -> bytes:
    """A configuration for another process of this version."""
    return codec.encode(
        {
            "kernel": str(config.kernel),
            "initrds": [one if isinstance(one, bytes) else str(one) for one in config.initrds],
            "cmdline": config.cmdline,
            "memory_mib": config.memory_mib,
            "cpus": config.cpus,
            "disks": [[str(disk.path), disk.read_only] for disk in config.disks],
            "vsock_cid": config.vsock_cid,
            "backend": config.backend,
            "console": config.console,
            "rng": config.rng,
            "balloon": config.balloon,
        }
    )


def unpack_config(data: bytes) -> MachineConfig:
    """What `pack_config` was given."""
    fields: dict[str, Any] = codec.decode(data)
    fields["kernel"] = Path(fields["kernel"])
    fields["initrds"] = [one if isinstance(one, bytes) else Path(one) for one in fields["initrds"]]
    fields["disks"] = [DiskConfig(Path(path), read_only) for path, read_only in fields["disks"]]
    return MachineConfig(**fields)


def boot(vm: MicroVM, timeout_s: float = BOOT_TIMEOUT_S) -> tuple[AgentClient, Ready]:
    """Start a machine and wait until its agent is ready. Raises BootError, and what starting raises."""
    client = AgentClient(lambda: vm.vsock.connect(PORT, CONNECT_TIMEOUT_S))
    try:
        with vm.vsock.listen(PORT) as listener:
            vm.start()
            sock = listener.accept(timeout_s)
        return client, client.wait_ready(sock, timeout_s)
    except TimeoutError:
        raise BootError(f"the guest was not ready within {timeout_s:g} s") from None
    except (ConnectionError, ExecError) as error:
        outcome = vm.wait(1.0)
        raise BootError(f"the guest ended while it booted: {outcome or error}") from None


def obtain(config: MachineConfig, name: str) -> Path:
    """The template of this machine, made if it is not there. Raises BootError and what booting raises."""
    path = path_of(name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with file_lock(path.with_suffix(".lock"), poll_s=0.02):
        if not usable(path):
            make(config, path)
            trim(keep=path)
    touch(path)
    return path


def usable(path: Path) -> bool:
    """Whether the template can be restored by this version, as far as can be told without doing it."""
    try:
        format.Snapshot.open(path).close()
    except (SnapshotError, HostError):
        return False
    return True


def make(config: MachineConfig, path: Path) -> None:
    """Boot the machine and save it into ``path``."""
    with MicroVM(config) as vm:
        client, ready = boot(vm)
        with client:
            client.sync()
        note = {"ready": [ready.version, ready.port, ready.started_ns, ready.ready_ns, ready.kernel, ready.error]}
        vm.snapshot(path, note=note)


def ready_of(note: dict[str, Any]) -> Ready:
    """What the guest said when it was booted. Raises SnapshotError."""
    try:
        return Ready(*note["ready"])
    except (KeyError, TypeError) as error:
        raise SnapshotError("the snapshot is not of a sandbox") from error


def restore(path: Path) -> tuple[MicroVM, Ready]:
    """A sandbox's machine from a snapshot, not started. Raises SnapshotError and what restoring raises."""
    restored = Restored.open(path)
    try:
        ready = ready_of(restored.description.note)
        return MicroVM(restored.config, _restored=restored), ready
    finally:
        restored.close()


def restore_if_there(config: MachineConfig) -> tuple[MicroVM, Ready] | None:
    """The machine restored from its template, or None if there is none, or none that this version can use."""
    path = path_of(key(config))
    try:
        found = restore(path)
    except (SnapshotError, HostError):
        return None
    touch(path)
    return found


def touch(path: Path) -> None:
    """The template is in use."""
    with contextlib.suppress(OSError):
        path.with_suffix(".used").touch()


def remove(path: Path) -> None:
    """Drop a template; whoever has it mapped keeps it."""
    for suffix in (".mvs", ".used", ".lock"):
        with contextlib.suppress(OSError):
            path.with_suffix(suffix).unlink()


def limit_bytes() -> int:
    """How much room templates may take together."""
    try:
        mib = int(os.environ.get("MICROVM_TEMPLATES_MIB", ""))
    except ValueError:
        mib = DEFAULT_LIMIT_MIB
    return max(0, mib) << 20


def trim(keep: Path | None = None, limit: int | None = None) -> list[Path]:
    """Remove what was not used longest until the rest is within ``limit`` bytes. Returns what was removed."""
    limit = limit_bytes() if limit is None else limit
    found = []
    for path in directory().glob("*.mvs"):
        try:
            status = path.stat()
            used = path.with_suffix(".used")
            at = used.stat().st_mtime if used.exists() else status.st_mtime
        except OSError:
            continue
        found.append((path == keep, at, getattr(status, "st_blocks", status.st_size // 512) * 512, path))
    total = sum(size for _, _, size, _ in found)
    removed = []
    for kept, _, size, path in sorted(found):
        if total <= limit or kept:
            break
        remove(path)
        removed.append(path)
        total -= size
    return removed

"""Between a paused machine and a snapshot file: what of it is saved, and how it comes back.

Saved is all that the guest can tell: memory, processors with their APICs, devices with their queues and what is in
flight, the guest's time. Not saved is what belongs to the host: consoles' text, descriptors, and the far ends of the
guest's sockets, so its connections to the host are reset when it comes back.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .._os.mapping import PAGE_SIZE
from .._version import __version__
from ..devices.ioapic import IoApicState
from ..devices.rtc import RtcState
from ..devices.serial import SerialState
from ..errors import ConfigError, HostError, SnapshotError, StateError
from ..snapshot import codec, format, ranges
from ..virtio.mmio import MmioState
from .config import DiskConfig, MachineConfig

if TYPE_CHECKING:
    from ..hypervisor.base import Hypervisor
    from .builder import Machine

_HASH_CHUNK: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class SavedDisk:
    """A disk by reference: its name, and what its content was."""

    path: str
    read_only: bool
    size: int
    modified_ns: int
    digest: str


@dataclass(frozen=True, slots=True)
class SavedConfig:
    """`MachineConfig`, without what was only needed to boot."""

    kernel: str
    cmdline: str
    memory_mib: int
    cpus: int
    disks: tuple[SavedDisk, ...]
    vsock_cid: int | None
    console: bool
    rng: bool
    balloon: bool


@dataclass(frozen=True, slots=True)
class SavedState:
    """Everything but memory."""

    partition: bytes
    vcpus: tuple[bytes, ...]
    ioapic: IoApicState
    serial: SerialState
    rtc: RtcState
    slots: tuple[MmioState, ...]


@dataclass(frozen=True, slots=True)
class Description:
    """The description in a snapshot file. ``build`` tells apart versions of a backend that keep state differently."""

    version: str
    backend: str
    build: str
    created_ns: int
    config: SavedConfig
    state: SavedState
    note: dict[str, Any]
    memory: str = ""
    parent: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a machine's memory came from: what a difference can build on, and the pages that are there."""

    id: str
    path: Path
    pages: ranges.Ranges
    disks: tuple[SavedDisk, ...]
    depth: int


class Restored:
    """A snapshot that was opened and understood, for `Machine` to take up. Close it afterwards."""

    def __init__(self, snapshot: format.Snapshot) -> None:
        self.snapshot = snapshot
        self.description = codec.build(Description, snapshot.description)
        saved = self.description.config
        if saved.memory_mib << 20 != snapshot.header.memory_size:
            raise SnapshotError(f"{snapshot.path} is damaged")
        try:
            self.config = MachineConfig(
                Path(saved.kernel),
                cmdline=saved.cmdline,
                memory_mib=saved.memory_mib,
                cpus=saved.cpus,
                disks=[DiskConfig(Path(disk.path), disk.read_only) for disk in saved.disks],
                vsock_cid=saved.vsock_cid,
                backend=self.description.backend,
                console=saved.console,
                rng=saved.rng,
                balloon=saved.balloon,
            )
        except ConfigError as error:
            raise SnapshotError(f"{snapshot.path} is of a machine that cannot be made here: {error}") from None

    @classmethod
    def open(cls, path: str | os.PathLike[str], verify: bool = False) -> Restored:
        """Raises SnapshotError, HostError."""
        snapshot = format.Snapshot.open(path, verify=verify)
        try:
            return cls(snapshot)
        except BaseException:
            snapshot.close()
            raise

    def check(self, hypervisor: Hypervisor) -> None:
        """Refuse what this backend cannot take up, and disks that are not as they were. Raises SnapshotError."""
        path, wanted = self.snapshot.path, self.description
        if hypervisor.name != wanted.backend:
            raise SnapshotError(f"{path} was saved on the {wanted.backend} backend, not {hypervisor.name}")
        if build_of(hypervisor) != wanted.build:
            raise SnapshotError(f"{path} was saved by another build of the {wanted.backend} backend")
        for disk in wanted.config.disks:
            _check_disk(path, disk)

    def origin(self) -> Origin:
        """What the restored machine remembers."""
        depth, above = 1, self.snapshot.parent
        while above is not None:
            depth, above = depth + 1, above.parent
        snapshot = self.snapshot
        return Origin(snapshot.id, snapshot.path.absolute(), snapshot.pages, self.description.config.disks, depth)

    def close(self) -> None:
        self.snapshot.close()


def build_of(hypervisor: Hypervisor) -> str:
    """The backend's own word for which of its versions understand each other's state."""
    build: str = getattr(hypervisor, "build", "")
    return build


def save(
    machine: Machine,
    path: str | os.PathLike[str],
    *,
    difference: bool,
    note: dict[str, Any] | None = None,
    durable: bool = True,
    step: Callable[[str], None] | None = None,
) -> Origin:
    """Write a machine that stands still, I/O threads included. Raises HostError, StateError."""
    partition = machine.partition
    if not partition.caps.save:
        raise StateError(f"the {machine.hypervisor.name} backend cannot save a machine")
    config, origin = machine.config, machine.origin
    if any(not disk.read_only for disk in config.disks):
        raise StateError("a machine with writable disks cannot be saved: their content would go on changing")
    known = {disk.path: disk for disk in origin.disks} if origin is not None else {}
    disks = tuple(_describe_disk(disk, known.get(str(disk.path.absolute()))) for disk in config.disks)
    description = Description(
        version=__version__,
        backend=machine.hypervisor.name,
        build=build_of(machine.hypervisor),
        created_ns=time.time_ns(),
        config=SavedConfig(
            kernel=str(config.kernel),
            cmdline=config.cmdline,
            memory_mib=config.memory_mib,
            cpus=config.cpus,
            disks=disks,
            vsock_cid=config.vsock_cid,
            console=config.console,
            rng=config.rng,
            balloon=config.balloon,
        ),
        state=SavedState(
            partition=partition.save(),
            vcpus=tuple(vcpu.save() for vcpu in machine.vcpus),
            ioapic=machine.ioapic.save(),
            serial=machine.uart.save(),
            rtc=machine.rtc.save(),
            slots=tuple(slot.transport.save() for slot in machine.slots),
        ),
        note=note or {},
    )
    written = machine.memory.written_pages()
    everything: ranges.Ranges = [(0, machine.memory.size // PAGE_SIZE)]
    parent: format.Parent | None = None
    if origin is None:
        pages = everything if written is None else written
    elif difference and written is not None and origin.depth < format.MAX_CHAIN:
        pages, parent = written, format.Parent(origin.id, origin.path)
    else:
        pages = everything if written is None else ranges.merge(origin.pages, written)
    fields = {name: getattr(description, name) for name in Description.__dataclass_fields__}
    with machine.memory.image as image:
        identity = format.write(path, fields, image, pages, parent=parent, durable=durable, step=step)
    all_pages = ranges.merge(origin.pages, pages) if origin is not None else pages
    depth = origin.depth + 1 if parent is not None and origin is not None else 1
    return Origin(identity, Path(path).absolute(), all_pages, disks, depth)


def apply(machine: Machine, restored: Restored) -> None:
    """Put the saved state into a machine that was just built around the saved memory. Raises SnapshotError."""
    state = restored.description.state
    damaged = SnapshotError(f"{restored.snapshot.path} is of a machine with other devices")
    if len(state.vcpus) != len(machine.vcpus) or len(state.slots) != len(machine.slots):
        raise damaged
    partition = machine.partition
    partition.pause_time()
    partition.restore(state.partition)
    for vcpu, blob in zip(machine.vcpus, state.vcpus, strict=True):
        vcpu.restore(blob)
    machine.ioapic.restore(state.ioapic)
    machine.uart.restore(state.serial)
    machine.rtc.restore(state.rtc)
    for slot, saved in zip(machine.slots, state.slots, strict=True):
        slot.transport.restore(saved)
    for slot in machine.slots:
        slot.transport.resume()


def _describe_disk(disk: DiskConfig, known: SavedDisk | None) -> SavedDisk:
    path = disk.path.absolute()
    try:
        status = os.stat(path)
        if known is not None and (status.st_size, status.st_mtime_ns) == (known.size, known.modified_ns):
            return known
        return SavedDisk(str(path), disk.read_only, status.st_size, status.st_mtime_ns, _digest(path))
    except OSError as error:
        raise HostError("open", error.errno or 0, f"disk {path}: {(error.strerror or '').lower()}") from error


def _check_disk(snapshot: Path, disk: SavedDisk) -> None:
    try:
        status = os.stat(disk.path)
        same = status.st_size == disk.size and (
            status.st_mtime_ns == disk.modified_ns or _digest(Path(disk.path)) == disk.digest
        )
    except OSError as error:
        raise SnapshotError(f"{snapshot} needs the disk {disk.path}: {(error.strerror or '').lower()}") from None
    if not same:
        raise SnapshotError(f"{snapshot} needs the disk {disk.path} as it was, and it has changed")


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(_HASH_CHUNK):
            digest.update(piece)
    return digest.hexdigest()

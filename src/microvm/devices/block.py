"""The block device. [virtio-v1.2] 5.2.

Payload moves between the disk and guest memory without a copy of ours. Whatever the disk fails with becomes a status
byte; only a request too broken to carry one puts the device into DEVICE_NEEDS_RESET.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from ..errors import VirtqueueError
from ..spec.virtio import DeviceId
from ..spec.virtio_blk import (
    CONFIG,
    HEADER,
    ID_SIZE,
    RANGE,
    RANGE_UNMAP,
    SECTOR_SIZE,
    Config,
    Feature,
    Request,
    Status,
)
from ..virtio import Chain, QueueSpec, VirtioDevice

QUEUE_SIZE: Final = 256
SEG_MAX: Final = QUEUE_SIZE - 2  # a request of this many segments fits the queue without an indirect table
SIZE_MAX: Final = 128 << 10
MAX_REQUEST: Final = SEG_MAX * SIZE_MAX
"""Bytes one request moves, as the two figures above promise the driver: one request must not keep the I/O thread for
as long as 4 GiB take."""

MAX_DISCARD_SECTORS: Final = 1 << 22
MAX_DISCARD_RANGES: Final = 32
MAX_ZERO_SECTORS: Final = 1 << 16
"""32 MiB: hosts that cannot punch holes write every byte."""
MAX_ZERO_RANGES: Final = 1

_IN: Final = Request.IN
_OUT: Final = Request.OUT


class Disk(Protocol):
    """What a block device sits on, such as `disk.RawDisk`. Offsets and sizes are bytes; failures are OSError."""

    @property
    def sectors(self) -> int: ...
    def read(self, views: Sequence[memoryview], offset: int) -> None: ...
    def write(self, views: Sequence[memoryview], offset: int) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None: ...


class Block(VirtioDevice):
    """A disk. ``serial`` is what the driver gets as the device's id, at most 20 bytes of it.

    ``read_only`` is enforced here, whatever the driver agreed to. ``errors`` counts failed requests.
    """

    device_id = DeviceId.BLOCK
    queues = (QueueSpec("requests", QUEUE_SIZE),)

    def __init__(self, disk: Disk, read_only: bool = False, serial: bytes = b"") -> None:
        super().__init__()
        self._disk = disk
        self._read_only = read_only
        self._serial = serial[:ID_SIZE].ljust(ID_SIZE, b"\0")
        self._sectors = disk.sectors
        self.errors = 0
        features = Feature.SIZE_MAX | Feature.SEG_MAX | Feature.BLK_SIZE | Feature.FLUSH
        config = Config(capacity_sectors=self._sectors, size_max=SIZE_MAX, seg_max=SEG_MAX)
        if read_only:
            features |= Feature.RO
        else:
            features |= Feature.DISCARD | Feature.WRITE_ZEROES
            config = config._replace(
                max_discard_sectors=MAX_DISCARD_SECTORS,
                max_discard_seg=MAX_DISCARD_RANGES,
                discard_sector_alignment=1,
                max_write_zeroes_sectors=MAX_ZERO_SECTORS,
                max_write_zeroes_seg=MAX_ZERO_RANGES,
                write_zeroes_may_unmap=1,
            )
        self.device_features = features
        self.config = CONFIG.pack(*config)

    def on_requests(self, chain: Chain) -> int:
        room = chain.writable_bytes - 1
        if room < 0:
            raise VirtqueueError("a block request without a status byte")
        kind, _, sector = chain.unpack(HEADER)
        try:
            if kind == _IN:
                status = self._read(chain, sector, room)
            elif kind == _OUT:
                status = self._write(chain, sector)
            else:
                status = self._other(chain, kind, room)
        except OSError:
            status = Status.IOERR
        if status:
            self.errors += 1
        chain.write_last(status)
        moved = 0
        if not status:
            if kind == _IN:
                moved = room
            elif kind == Request.GET_ID:
                moved = min(ID_SIZE, room)
        # The used length counts bytes from the start; the status byte continues it only if there is no gap.
        return moved + 1 if moved == room else moved

    def _fits(self, sector: int, size: int) -> bool:
        return not size % SECTOR_SIZE and size <= MAX_REQUEST and sector + size // SECTOR_SIZE <= self._sectors

    def _read(self, chain: Chain, sector: int, size: int) -> int:
        if not self._fits(sector, size):
            return Status.IOERR
        self._disk.read(chain.writable_views(0, size), sector * SECTOR_SIZE)
        return Status.OK

    def _write(self, chain: Chain, sector: int) -> int:
        size = chain.unread
        if self._read_only or not self._fits(sector, size):
            return Status.IOERR
        self._disk.write(chain.readable_views(HEADER.size, size), sector * SECTOR_SIZE)
        if not self.driver_features & Feature.FLUSH:
            self._disk.flush()  # a driver that cannot flush counts on write-through. [virtio-v1.2] 5.2.6.2
        return Status.OK

    def _other(self, chain: Chain, kind: int, room: int) -> int:
        if kind == Request.FLUSH:
            if not self._read_only:
                self._disk.flush()
            return Status.OK
        if kind == Request.GET_ID:
            chain.write_at(0, self._serial[:room])
            return Status.OK
        if kind == Request.DISCARD and not self._read_only:
            return self._ranges(chain, MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, zero=False)
        if kind == Request.WRITE_ZEROES and not self._read_only:
            return self._ranges(chain, MAX_ZERO_RANGES, MAX_ZERO_SECTORS, zero=True)
        return Status.UNSUPP

    def _ranges(self, chain: Chain, most: int, most_sectors: int, *, zero: bool) -> int:
        if not 0 < chain.unread <= most * RANGE.size or chain.unread % RANGE.size:
            return Status.IOERR
        ranges = list(RANGE.iter_unpack(chain.read_all(most * RANGE.size)))
        for sector, sectors, flags in ranges:
            if flags & ~RANGE_UNMAP or (flags and not zero):
                return Status.UNSUPP
            if sectors > most_sectors or sector + sectors > self._sectors:
                return Status.IOERR
        for sector, sectors, flags in ranges:
            if not sectors:
                continue
            if zero:
                self._disk.write_zeroes(sector * SECTOR_SIZE, sectors * SECTOR_SIZE, bool(flags & RANGE_UNMAP))
            else:
                self._disk.discard(sector * SECTOR_SIZE, sectors * SECTOR_SIZE)
        return Status.OK

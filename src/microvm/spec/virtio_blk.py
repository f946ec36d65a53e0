"""virtio block device. [virtio-v1.2] 5.2."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple


class Feature:
    """[virtio-v1.2] 5.2.3."""

    SIZE_MAX: Final = 1 << 1
    SEG_MAX: Final = 1 << 2
    RO: Final = 1 << 5
    BLK_SIZE: Final = 1 << 6
    FLUSH: Final = 1 << 9
    DISCARD: Final = 1 << 13
    WRITE_ZEROES: Final = 1 << 14


class Request:
    """Request types. [virtio-v1.2] 5.2.6."""

    IN: Final = 0
    OUT: Final = 1
    FLUSH: Final = 4
    GET_ID: Final = 8
    DISCARD: Final = 11
    WRITE_ZEROES: Final = 13


class Status:
    """The last byte of every request."""

    OK: Final = 0
    IOERR: Final = 1
    UNSUPP: Final = 2


SECTOR_SIZE: Final = 512
ID_SIZE: Final = 20

HEADER: Final = Struct("<IIQ")  # type, reserved, sector
assert HEADER.size == 16

RANGE: Final = Struct("<QII")  # sector, sectors, flags
assert RANGE.size == 16
RANGE_UNMAP: Final = 1

CONFIG: Final = Struct("<QIIHBBIBBHIBxHIIIIIB3x")
assert CONFIG.size == 60


class Config(NamedTuple):
    """The configuration space. [virtio-v1.2] 5.2.4."""

    capacity_sectors: int
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = SECTOR_SIZE
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 0
    num_queues: int = 1
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0

from __future__ import annotations

import errno
from collections.abc import Sequence

import pytest

from microvm.devices.block import MAX_DISCARD_RANGES, MAX_DISCARD_SECTORS, MAX_REQUEST, MAX_ZERO_SECTORS, Block
from microvm.memory import GuestMemory
from microvm.spec.virtio_blk import CONFIG, HEADER, RANGE, Config, Feature, Request, Status
from microvm.testing import FakeDriver

SECTORS = 256


class MemoryDisk:
    """A disk in a bytearray that can be told to fail."""

    def __init__(self, sectors: int = SECTORS) -> None:
        self.data = bytearray(range(256)) * (2 * min(sectors, SECTORS))
        self.sectors = sectors
        self.calls: list[tuple[object, ...]] = []
        self.failing = False

    def _note(self, *call: object) -> None:
        self.calls.append(call)
        if self.failing:
            raise OSError(errno.EIO, "broken")

    def read(self, views: Sequence[memoryview], offset: int) -> None:
        self._note("read", sum(map(len, views)), offset)
        for view in views:
            view[:] = self.data[offset : offset + len(view)]
            offset += len(view)

    def write(self, views: Sequence[memoryview], offset: int) -> None:
        self._note("write", sum(map(len, views)), offset)
        for view in views:
            self.data[offset : offset + len(view)] = view
            offset += len(view)

    def flush(self) -> None:
        self._note("flush")

    def discard(self, offset: int, size: int) -> None:
        self._note("discard", offset, size)

    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None:
        self._note("zeroes", offset, size, unmap)


class Guest:
    """A driver and its disk."""

    def __init__(self, read_only: bool = False, sectors: int = SECTORS, features: int | None = None) -> None:
        self.disk = MemoryDisk(sectors)
        self.block = Block(self.disk, read_only, serial=b"serial-number-of-20b-and-more")
        self.driver = FakeDriver(self.block, memory=GuestMemory.allocate(64 << 20)).start(features)

    def do(self, kind: int, sector: int = 0, payload: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """One request. Returns its status and what was read."""
        head = self.driver.add("requests", [HEADER.pack(kind, 0, sector), payload], [room, 1])
        segments = self.driver.ring("requests").chains[head][1]
        self.driver.notify("requests")
        (used,) = self.driver.collect("requests")
        return self.driver.memory.read(segments[-1][0], 1)[0], used.data[:room]


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_read_returns_sectors(guest: Guest) -> None:
    assert guest.do(Request.IN, 2, room=1024) == (Status.OK, bytes(range(256)) * 4)
    assert guest.disk.calls == [("read", 1024, 1024)]


def test_a_read_over_many_segments_is_one_disk_call(guest: Guest) -> None:
    guest.driver.add("requests", [HEADER.pack(Request.IN, 0, 0)], [100, 412, 512, 1], indirect=True)
    guest.driver.notify("requests")
    (used,) = guest.driver.collect("requests")
    assert used.data == bytes(range(256)) * 4 + b"\0"
    assert guest.disk.calls == [("read", 1024, 0)]


def test_the_status_byte_may_share_a_segment_with_the_data(guest: Guest) -> None:
    assert guest.driver.request("requests", HEADER.pack(Request.IN, 0, 0), 513) == bytes(range(256)) * 2 + b"\0"


def test_a_write_reaches_the_disk(guest: Guest) -> None:
    assert guest.do(Request.OUT, 3, b"w" * 512) == (Status.OK, b"")
    assert guest.disk.data[3 * 512 : 4 * 512] == b"w" * 512


def test_a_header_and_payload_in_one_segment_are_taken_apart(guest: Guest) -> None:
    assert guest.driver.request("requests", HEADER.pack(Request.OUT, 0, 1) + b"w" * 512, 1) == b"\0"
    assert guest.disk.data[512:1024] == b"w" * 512


def test_read_payload_is_reported_as_written(guest: Guest) -> None:
    seen: list[tuple[int, int]] = []
    guest.driver.add("requests", [HEADER.pack(Request.IN, 0, 0)], [512, 1])
    segments = next(iter(guest.driver.ring("requests").chains.values()))[1]
    guest.driver.memory.observe(lambda gpa, size: seen.append((gpa, size)))
    guest.driver.notify("requests")
    assert seen[:2] == segments


def test_a_read_that_failed_half_way_is_reported_as_written_too(guest: Guest) -> None:
    seen: list[tuple[int, int]] = []
    guest.disk.failing = True
    guest.driver.add("requests", [HEADER.pack(Request.IN, 0, 0)], [512, 1])
    segments = next(iter(guest.driver.ring("requests").chains.values()))[1]
    guest.driver.memory.observe(lambda gpa, size: seen.append((gpa, size)))
    guest.driver.notify("requests")
    assert seen[:2] == segments


@pytest.mark.parametrize(
    ("sector", "size"),
    [(SECTORS, 512), (SECTORS - 1, 1024), (1 << 63, 512), ((1 << 64) - 1, 512), (0, 511), (0, 100)],
)
def test_what_does_not_fit_the_disk_is_an_io_error(guest: Guest, sector: int, size: int) -> None:
    assert guest.do(Request.IN, sector, room=size)[0] == Status.IOERR
    assert guest.do(Request.OUT, sector, bytes(size))[0] == Status.IOERR
    assert guest.disk.calls == []
    assert not guest.driver.needs_reset
    assert guest.block.errors == 2


def test_a_request_larger_than_promised_is_refused() -> None:
    guest = Guest(sectors=1 << 30)
    assert guest.do(Request.IN, 0, room=MAX_REQUEST + 512)[0] == Status.IOERR
    assert guest.disk.calls == []


def test_the_last_sector_can_be_read(guest: Guest) -> None:
    assert guest.do(Request.IN, SECTORS - 1, room=512)[0] == Status.OK


@pytest.mark.parametrize("kind", [Request.IN, Request.OUT, Request.FLUSH])
def test_a_host_error_is_a_status_and_the_device_lives(guest: Guest, kind: int) -> None:
    guest.disk.failing = True
    payload, room = (bytes(512), 0) if kind == Request.OUT else (b"", 512 if kind == Request.IN else 0)
    assert guest.do(kind, 0, payload, room)[0] == Status.IOERR
    guest.disk.failing = False
    assert guest.do(kind, 0, payload, room)[0] == Status.OK


def test_flush_reaches_the_disk(guest: Guest) -> None:
    assert guest.do(Request.FLUSH)[0] == Status.OK
    assert guest.disk.calls == [("flush",)]


def test_a_driver_that_cannot_flush_gets_write_through() -> None:
    guest = Guest(features=0)
    guest.do(Request.OUT, 0, bytes(512))
    assert guest.disk.calls == [("write", 512, 0), ("flush",)]


def test_the_id_is_twenty_bytes(guest: Guest) -> None:
    assert guest.do(Request.GET_ID, room=20) == (Status.OK, b"serial-number-of-20b")


def test_the_id_is_cut_to_the_room_there_is(guest: Guest) -> None:
    assert guest.do(Request.GET_ID, room=6) == (Status.OK, b"serial")


@pytest.mark.parametrize("kind", [2, 3, 5, 14, 0xFFFF_FFFF])
def test_an_unknown_request_is_unsupported(guest: Guest, kind: int) -> None:
    assert guest.do(kind, 0, b"x" * 512, 512)[0] == Status.UNSUPP


def test_discard_and_zeroes_reach_the_disk(guest: Guest) -> None:
    assert guest.do(Request.DISCARD, 0, RANGE.pack(1, 2, 0) + RANGE.pack(5, 1, 0))[0] == Status.OK
    assert guest.do(Request.WRITE_ZEROES, 0, RANGE.pack(8, 4, 0))[0] == Status.OK
    assert guest.do(Request.WRITE_ZEROES, 0, RANGE.pack(8, 4, 1))[0] == Status.OK
    assert guest.disk.calls == [
        ("discard", 512, 1024),
        ("discard", 2560, 512),
        ("zeroes", 4096, 2048, False),
        ("zeroes", 4096, 2048, True),
    ]


@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        (Request.DISCARD, RANGE.pack(SECTORS, 1, 0), Status.IOERR),
        (Request.DISCARD, RANGE.pack((1 << 64) - 1, 2, 0), Status.IOERR),
        (Request.DISCARD, RANGE.pack(0, 1, 0) + RANGE.pack(0, SECTORS + 1, 0), Status.IOERR),
        (Request.DISCARD, RANGE.pack(0, 1, 1), Status.UNSUPP),
        (Request.DISCARD, RANGE.pack(0, 1, 2), Status.UNSUPP),
        (Request.WRITE_ZEROES, RANGE.pack(0, 1, 2), Status.UNSUPP),
        (Request.DISCARD, b"", Status.IOERR),
        (Request.DISCARD, b"123", Status.IOERR),
        (Request.DISCARD, RANGE.pack(0, 1, 0) * (MAX_DISCARD_RANGES + 1), Status.IOERR),
        (Request.WRITE_ZEROES, RANGE.pack(0, 1, 0) * 2, Status.IOERR),
    ],
)
def test_bad_ranges_are_refused_before_any_is_carried_out(guest: Guest, kind: int, payload: bytes, status: int) -> None:
    assert guest.do(kind, 0, payload)[0] == status
    assert guest.disk.calls == []


def test_ranges_longer_than_promised_are_refused() -> None:
    guest = Guest(sectors=1 << 40)
    assert guest.do(Request.DISCARD, 0, RANGE.pack(0, MAX_DISCARD_SECTORS + 1, 0))[0] == Status.IOERR
    assert guest.do(Request.WRITE_ZEROES, 0, RANGE.pack(0, MAX_ZERO_SECTORS + 1, 0))[0] == Status.IOERR
    assert guest.disk.calls == []


@pytest.mark.parametrize("features", [None, 0])
def test_a_read_only_disk_is_never_changed_whatever_the_driver_agreed_to(features: int | None) -> None:
    guest = Guest(read_only=True, features=features)
    assert guest.driver.offered() & Feature.RO
    assert guest.do(Request.OUT, 0, bytes(512))[0] == Status.IOERR
    assert guest.do(Request.DISCARD, 0, RANGE.pack(0, 1, 0))[0] == Status.UNSUPP
    assert guest.do(Request.WRITE_ZEROES, 0, RANGE.pack(0, 1, 0))[0] == Status.UNSUPP
    assert guest.do(Request.FLUSH)[0] == Status.OK
    assert guest.disk.calls == []
    assert guest.do(Request.IN, 0, room=512)[0] == Status.OK


@pytest.mark.parametrize(("readable", "writable"), [(HEADER.pack(0, 0, 0), 0), (b"short", 1), (b"", 513)])
def test_a_request_too_broken_for_a_status_needs_a_reset(guest: Guest, readable: bytes, writable: int) -> None:
    guest.driver.add("requests", readable, writable)
    guest.driver.notify("requests")
    assert guest.driver.needs_reset
    assert guest.driver.collect("requests") == []


def test_the_configuration_matches_the_disk(guest: Guest) -> None:
    config = Config(*CONFIG.unpack(guest.block.read_config(0, 60)))
    assert config.capacity_sectors == guest.driver.config(0, 8) == SECTORS
    assert config.blk_size == guest.driver.config(20) == 512
    assert config.seg_max == guest.driver.config(12) == 254
    assert guest.driver.config(34, 2) == 1
    assert guest.driver.config(36) == MAX_DISCARD_SECTORS
    assert guest.driver.config(56, 1) == 1


def test_it_goes_on_after_a_restore(guest: Guest) -> None:
    guest.do(Request.OUT, 0, b"w" * 512)
    guest.driver.move_to(Block(guest.disk))
    assert guest.do(Request.IN, 0, room=512) == (Status.OK, b"w" * 512)

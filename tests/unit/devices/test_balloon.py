from __future__ import annotations

import dataclasses
from struct import pack

import pytest

from microvm.devices import balloon
from microvm.devices.balloon import MAX_PAGES, MAX_STATISTICS, Balloon
from microvm.errors import ConfigError, GuestMemoryError, SnapshotError
from microvm.memory import GuestMemory
from microvm.spec.virtio import DescFlag, Feature, InterruptBit
from microvm.spec.virtio_balloon import Feature as BalloonFeature
from microvm.testing import FakeDriver

PAGE = 4096
FIRST = 768  # page number of memory no test buffer is in


class Memory(GuestMemory):
    """Memory that notes what was discarded."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.discards: list[tuple[int, int]] = []

    def discard(self, gpa: int, size: int) -> None:
        super().discard(gpa, size)
        self.discards.append((gpa, size))


class Guest:
    def __init__(self, features: int | None = None, size: int = 4 << 20) -> None:
        self.memory = Memory.allocate(size)
        assert isinstance(self.memory, Memory)
        self.answers: list[dict[str, int]] = []
        self.balloon = Balloon(self.answers.append)
        self.driver = FakeDriver(self.balloon, memory=self.memory).start(features)

    def discards(self) -> list[tuple[int, int]]:
        assert isinstance(self.memory, Memory)
        return self.memory.discards

    def pages(self, queue: str, *pages: int) -> None:
        self.driver.add(queue, pack(f"<{len(pages)}I", *pages))
        self.driver.notify(queue)

    def report(self, *ranges: tuple[int, int], queue: str = "reporting") -> None:
        self.driver.add_segments(queue, [(gpa, size, DescFlag.WRITE) for gpa, size in ranges])
        self.driver.notify(queue)


@pytest.fixture
def guest() -> Guest:
    return Guest()


def test_a_target_is_announced(guest: Guest) -> None:
    guest.balloon.target_pages = 1000
    assert guest.driver.take_interrupts() == InterruptBit.CONFIG_CHANGE
    assert guest.driver.config(0) == 1000
    assert guest.balloon.target_pages == 1000


@pytest.mark.parametrize("pages", [-1, 1 << 32])
def test_an_absurd_target_is_refused(guest: Guest, pages: int) -> None:
    with pytest.raises(ConfigError, match="balloon target"):
        guest.balloon.target_pages = pages


def test_the_driver_says_how_far_it_is(guest: Guest) -> None:
    guest.driver.write(0x104, 300)
    assert guest.balloon.actual == 300
    assert guest.driver.config(4) == 300
    guest.driver.write(0x100, 77)
    assert guest.balloon.target_pages == 0


def test_inflating_returns_the_pages_to_the_host(guest: Guest) -> None:
    guest.memory.write(FIRST * PAGE, b"x" * 3 * PAGE)
    guest.pages("inflate", FIRST + 1)
    assert guest.memory.read(FIRST * PAGE, 3 * PAGE) == b"x" * PAGE + bytes(PAGE) + b"x" * PAGE
    assert len(guest.driver.collect("inflate")) == 1
    assert guest.balloon.discarded == PAGE


def test_contiguous_pages_in_any_order_are_one_discard(guest: Guest) -> None:
    guest.pages("inflate", FIRST + 3, FIRST + 1, FIRST + 2, FIRST + 2, FIRST + 9, FIRST + 10)
    assert guest.discards() == [((FIRST + 1) * PAGE, 3 * PAGE), ((FIRST + 9) * PAGE, 2 * PAGE)]


def test_a_long_run_is_discarded_in_bounded_pieces(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balloon, "MAX_DISCARD", 2 * PAGE)
    guest.pages("inflate", *range(FIRST, FIRST + 5))
    assert [size // PAGE for _, size in guest.discards()] == [2, 2, 1]
    guest.discards().clear()
    guest.report((FIRST * PAGE, 5 * PAGE))
    assert [size // PAGE for _, size in guest.discards()] == [2, 2, 1]


@pytest.mark.parametrize("page", [1024, 0x000C_0000, 0xFFFF_FFFF])
def test_a_page_outside_memory_needs_a_reset(guest: Guest, page: int) -> None:
    guest.pages("inflate", page)
    assert guest.driver.needs_reset


def test_a_list_longer_than_the_cap_needs_a_reset() -> None:
    guest = Guest()
    guest.pages("inflate", *[FIRST] * MAX_PAGES)
    assert not guest.driver.needs_reset
    guest.pages("inflate", *[FIRST] * (MAX_PAGES + 1))
    assert guest.driver.needs_reset


def test_half_a_page_number_needs_a_reset(guest: Guest) -> None:
    guest.driver.add("inflate", b"12345")
    guest.driver.notify("inflate")
    assert guest.driver.needs_reset


def test_deflating_changes_nothing(guest: Guest) -> None:
    guest.memory.write(FIRST * PAGE, b"x" * PAGE)
    guest.pages("deflate", FIRST)
    assert guest.memory.read(FIRST * PAGE, PAGE) == b"x" * PAGE
    assert len(guest.driver.collect("deflate")) == 1


def test_free_pages_that_are_reported_return_to_the_host(guest: Guest) -> None:
    guest.memory.write(FIRST * PAGE, b"x" * 4 * PAGE)
    guest.report(((FIRST + 2) * PAGE, PAGE), (FIRST * PAGE, PAGE), ((FIRST + 1) * PAGE, PAGE))
    assert guest.memory.read(FIRST * PAGE, 4 * PAGE) == bytes(3 * PAGE) + b"x" * PAGE
    assert guest.discards() == [(FIRST * PAGE, 3 * PAGE)]
    assert len(guest.driver.collect("reporting")) == 1


@pytest.mark.parametrize(("offset", "size"), [(1, PAGE), (0, PAGE - 1), (2048, PAGE), (0, 100)])
def test_parts_of_pages_are_not_discarded(guest: Guest, offset: int, size: int) -> None:
    guest.memory.write(FIRST * PAGE, b"x" * 2 * PAGE)
    guest.report((FIRST * PAGE + offset, size))
    assert guest.driver.needs_reset
    assert guest.memory.read(FIRST * PAGE, 2 * PAGE) == b"x" * 2 * PAGE


def test_parts_that_add_up_to_a_page_are_not_discarded(guest: Guest) -> None:
    guest.report((FIRST * PAGE, 1024), (FIRST * PAGE + 1024, 3072))
    assert guest.driver.needs_reset
    assert guest.discards() == []


def test_pages_are_not_discarded_for_a_driver_that_did_not_agree_to_reporting() -> None:
    guest = Guest(BalloonFeature.STATS_VQ)
    guest.report((FIRST * PAGE, PAGE))
    assert guest.discards() == []


def test_without_statistics_the_reporting_queue_moves_up() -> None:
    guest = Guest(BalloonFeature.REPORTING)
    guest.report((FIRST * PAGE, PAGE), queue="statistics")
    assert guest.discards() == [(FIRST * PAGE, PAGE)]
    assert len(guest.driver.collect("statistics")) == 1


def test_statistics_are_requested_and_answered(guest: Guest) -> None:
    assert not guest.balloon.request_statistics()
    guest.driver.add("statistics", pack("<HQHQ", 4, 1000, 5, 9000))
    guest.driver.notify("statistics")
    assert guest.balloon.statistics == {"free_memory": 1000, "total_memory": 9000}
    assert guest.driver.collect("statistics") == []
    assert guest.balloon.request_statistics()
    assert len(guest.driver.collect("statistics")) == 1
    assert not guest.balloon.request_statistics()
    guest.driver.add("statistics", pack("<HQHQ", 4, 900, 999, 1))
    guest.driver.notify("statistics")
    assert guest.answers[-1] == {"free_memory": 900}


def test_statistics_longer_than_the_cap_need_a_reset(guest: Guest) -> None:
    guest.driver.add("statistics", pack("<HQ", 4, 1) * (MAX_STATISTICS + 1))
    guest.driver.notify("statistics")
    assert guest.driver.needs_reset
    assert guest.balloon.statistics == {}


def test_a_second_answer_gives_the_first_buffer_back(guest: Guest) -> None:
    for _ in range(2):
        guest.driver.add("statistics", pack("<HQ", 4, 1))
    guest.driver.notify("statistics")
    assert len(guest.driver.collect("statistics")) == 1


def test_a_held_answer_is_forgotten_at_reset(guest: Guest) -> None:
    guest.driver.add("statistics", pack("<HQ", 4, 1))
    guest.driver.notify("statistics")
    guest.driver.start()
    assert not guest.balloon.request_statistics()


def test_target_and_held_answer_survive_a_restore(guest: Guest) -> None:
    guest.balloon.target_pages = 5
    guest.driver.write(0x104, 3)
    guest.driver.add("statistics", pack("<HQ", 4, 1))
    guest.driver.notify("statistics")
    fresh = Balloon()
    guest.driver.move_to(fresh)
    assert (fresh.target_pages, fresh.actual) == (5, 3)
    assert fresh.request_statistics()
    assert len(guest.driver.collect("statistics")) == 1


@pytest.mark.parametrize("extra", [{}, {"target": -1, "actual": 0}, {"target": 0, "actual": "0"}])
def test_a_saved_state_that_is_not_one_is_refused(guest: Guest, extra: dict[str, object]) -> None:
    with pytest.raises(SnapshotError):
        guest.balloon.restore(dataclasses.replace(guest.balloon.save(), extra=extra))


def test_the_features_are_those_that_are_served(guest: Guest) -> None:
    offered = guest.driver.offered() & ~(Feature.VERSION_1 | Feature.INDIRECT_DESC)
    assert offered == BalloonFeature.STATS_VQ | BalloonFeature.DEFLATE_ON_OOM | BalloonFeature.REPORTING


def test_discarding_part_of_a_page_is_refused_by_memory_too(guest: Guest) -> None:
    with pytest.raises(GuestMemoryError):
        guest.memory.discard(PAGE + 1, PAGE)

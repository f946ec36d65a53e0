from __future__ import annotations

from microvm.devices.rng import MAX_BYTES, Rng
from microvm.testing import FakeDriver


def test_a_request_is_filled_from_the_source() -> None:
    driver = FakeDriver(Rng(lambda size: b"7" * size)).start()
    assert driver.request("requests", writable=16) == b"7" * 16


def test_the_host_generator_is_the_default() -> None:
    driver = FakeDriver(Rng()).start()
    first, second = (driver.request("requests", writable=64) for _ in range(2))
    assert len(first) == 64
    assert first != second


def test_a_large_request_is_capped() -> None:
    asked = []
    driver = FakeDriver(Rng(lambda size: asked.append(size) or bytes(size))).start()
    assert len(driver.request("requests", writable=1 << 20)) == MAX_BYTES
    assert asked == [MAX_BYTES]


def test_a_request_without_room_comes_back_empty() -> None:
    driver = FakeDriver(Rng()).start()
    assert driver.request("requests", b"nothing to write to") == b""


def test_it_goes_on_after_a_restore() -> None:
    driver = FakeDriver(Rng()).start()
    driver.request("requests", writable=16)
    driver.move_to(Rng(lambda size: b"8" * size))
    assert driver.request("requests", writable=16) == b"8" * 16

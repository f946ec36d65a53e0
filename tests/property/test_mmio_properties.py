"""Garbage to every register of every device never raises, and never leaves a queue outside memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microvm.devices.balloon import Balloon
from microvm.devices.block import Block
from microvm.devices.console import Console
from microvm.devices.rng import Rng
from microvm.memory import GuestMemory
from microvm.spec.virtio import MmioReg, Status
from microvm.testing import FakeDriver
from microvm.virtio import VirtioDevice


class Nowhere:
    """A disk that holds nothing."""

    sectors = 1024

    def read(self, views: Sequence[memoryview], offset: int) -> None: ...
    def write(self, views: Sequence[memoryview], offset: int) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None: ...


DEVICES: list[Callable[[], VirtioDevice]] = [
    Rng,
    lambda: Block(Nowhere()),
    lambda: Block(Nowhere(), read_only=True),
    lambda: Console(lambda data: None),
    Balloon,
]
registers = [value for name, value in vars(MmioReg).items() if name.isupper()]
offsets = st.one_of(st.sampled_from(registers), st.integers(0, 0xFFF))
widths = st.one_of(st.just(4), st.sampled_from([1, 2, 8]))
values = st.one_of(
    st.integers(0, 16), st.sampled_from([1, 3, 11, 15, 0x1_0000, 0x1_8000]), st.integers(0, (1 << 64) - 1)
)
accesses = st.lists(st.tuples(st.booleans(), offsets, widths, values), max_size=40)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Every example breaks a device of its own, which would log each time."""
    logger = logging.getLogger("microvm.virtio.device")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("make", DEVICES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(accesses=accesses, level=st.integers(0, 2), deferred=st.booleans(), ring=st.binary(max_size=200))
def test_garbage_to_every_register_is_survived(
    make: Callable[[], VirtioDevice],
    accesses: list[tuple[bool, int, int, int]],
    level: int,
    deferred: bool,
    ring: bytes,
) -> None:
    driver = FakeDriver(make(), memory=GuestMemory.allocate(2 << 20), deferred=deferred)
    if level == 1:
        driver.negotiate()
    elif level == 2:
        driver.start()
        driver.memory.write(driver.rings[0].desc_gpa, ring)
        driver.memory.write(driver.rings[0].avail_gpa, ring[:60])
    for write, offset, width, value in accesses:
        if write:
            driver.write(offset, value & ((1 << 8 * width) - 1), width)
        else:
            assert 0 <= driver.read(offset, width) < 1 << 8 * width
        driver.run(rounds=20)
    for queue in driver.device.vqs:
        if queue.ready:
            assert 0 < queue.size <= queue.max_size
            for gpa in (queue.desc_gpa, queue.avail_gpa, queue.used_gpa):
                assert gpa < driver.memory.size
    driver.run()
    driver.start()
    assert driver.status == Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK
    driver.close()

"""What the virtio core costs: microseconds of Python for one request, without a guest. Prints JSON.

    PYTHONPATH=src python bench/virtio_micro.py [--profile]

Batches of 64 requests are built by the fake driver outside the measured time; what is measured is serving them:
pop, handler with the disk's system call from the page cache, push, interrupt decision.
"""

from __future__ import annotations

import cProfile
import json
import os
import pstats
import statistics
import sys
import tempfile
import time

from microvm.devices.block import Block
from microvm.devices.rng import Rng
from microvm.disk import RawDisk
from microvm.memory import GuestMemory
from microvm.spec.virtio_blk import HEADER, Request
from microvm.testing import FakeDriver

BATCH = 64
ROUNDS = 60


class NullDisk:
    """A disk that does nothing: what is left is ours."""

    sectors = 1 << 20

    def read(self, views: object, offset: int) -> None: ...
    def write(self, views: object, offset: int) -> None: ...
    def flush(self) -> None: ...
    def discard(self, offset: int, size: int) -> None: ...
    def write_zeroes(self, offset: int, size: int, unmap: bool) -> None: ...


def serve(driver: FakeDriver, queue: str, readable: list[bytes], writable: list[int], indirect: bool) -> float:
    """Median microseconds for one request."""
    samples = []
    for _ in range(ROUNDS):
        for _ in range(BATCH):
            driver.add(queue, readable, writable, indirect=indirect)
        driver.notify(queue)
        start = time.perf_counter()
        driver.run()
        samples.append((time.perf_counter() - start) / BATCH * 1e6)
        assert len(driver.collect(queue)) == BATCH
    return round(statistics.median(samples), 2)


def main() -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(16 << 20)
        file.write(b"x" * (1 << 20))
        file.flush()
        read = HEADER.pack(Request.IN, 0, 8)
        write = HEADER.pack(Request.OUT, 0, 8)
        null = FakeDriver(Block(NullDisk()), deferred=True).start()
        disk = RawDisk(os.dup(file.fileno()))
        raw = FakeDriver(Block(disk), memory=GuestMemory.allocate(64 << 20), deferred=True).start()
        rng = FakeDriver(Rng(lambda size: b"7" * size), deferred=True, queue_size=256).start()
        if "--profile" in sys.argv:
            profile = cProfile.Profile()
            profile.runcall(serve, null, "requests", [read], [4096, 1], False)
            pstats.Stats(profile).sort_stats("tottime").print_stats(18)
            return
        results = {
            "block_read_4k_null_us": serve(null, "requests", [read], [4096, 1], False),
            "block_read_4k_null_indirect_us": serve(null, "requests", [read], [4096, 1], True),
            "block_read_4k_raw_us": serve(raw, "requests", [read], [4096, 1], False),
            "block_write_4k_raw_us": serve(raw, "requests", [write, bytes(4096)], [1], False),
            "block_read_128k_raw_indirect_us": serve(raw, "requests", [read], [4096] * 32 + [1], True),
            "rng_64_us": serve(rng, "requests", [], [64], False),
        }
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

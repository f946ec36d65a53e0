"""The memory balloon: takes pages from the guest, asks it for statistics, hears of free pages. [virtio-v1.2] 5.5.

Pages the guest gives up go back to the host at once (`GuestMemory.discard`) and come back, zeroed, when touched; so
there is nothing to do when the balloon is deflated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import unpack
from typing import Any, Final

from ..errors import ConfigError, GuestMemoryError, SnapshotError, VirtqueueError
from ..spec.virtio import DeviceId
from ..spec.virtio_balloon import (
    ACTUAL_OFFSET,
    CONFIG,
    PAGE_SIZE,
    PFN_SIZE,
    STATISTIC,
    STATISTICS,
    Feature,
)
from ..virtio import Chain, QueueSpec, VirtioDevice

MAX_PAGES: Final = 4096
"""Page numbers in one request, which the host copies and sorts. Linux sends 256."""

MAX_STATISTICS: Final = 64
"""Entries of one answer, which the host copies. Ten are defined."""

MAX_DISCARD: Final = 16 << 20
"""Bytes discarded in one call: hosts that cannot discard allocate as many zeroes."""


class Balloon(VirtioDevice):
    """The balloon. Sizes are in pages of 4 KiB.

    ``listener``, if given, is called with every answer of the driver, on the thread that serves the queue and with
    the device locked.
    """

    device_id = DeviceId.BALLOON
    queues = (
        QueueSpec("inflate", 64),
        QueueSpec("deflate", 64),
        QueueSpec("statistics", 16),
        QueueSpec("reporting", 64),
    )
    device_features = Feature.STATS_VQ | Feature.DEFLATE_ON_OOM | Feature.REPORTING

    def __init__(self, listener: Callable[[dict[str, int]], None] | None = None) -> None:
        super().__init__()
        self.statistics: dict[str, int] = {}
        self.discarded = 0
        self._listener = listener
        self._target = 0
        self._actual = 0
        self._held: Chain | None = None

    @property
    def target_pages(self) -> int:
        """Pages the guest is asked to give up. Setting it tells the driver. Any thread. Raises ConfigError."""
        return self._target

    @target_pages.setter
    def target_pages(self, pages: int) -> None:
        if not 0 <= pages <= 0xFFFF_FFFF:
            raise ConfigError("balloon target", pages, "0 to 2**32 - 1 pages")
        with self.lock:
            self._target = pages
            self.config_changed()

    @property
    def actual(self) -> int:
        """Pages the driver says it has given up. Its word: not to be trusted."""
        return self._actual

    def request_statistics(self) -> bool:
        """Ask the driver for fresh statistics; they arrive in `statistics`. Any thread.

        Returns False if the driver has none to give, or has not answered the last time yet.
        """
        with self.batch():
            held, self._held = self._held, None
            if held is None or not self.running:
                return False
            self.complete(held)
            return True
        return False

    def read_config(self, offset: int, size: int) -> bytes:
        return CONFIG.pack(self._target, self._actual, 0, 0)[offset : offset + size]

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == ACTUAL_OFFSET and len(data) == 4:
            self._actual = int.from_bytes(data, "little")

    def on_inflate(self, chain: Chain) -> int:
        pages = sorted(self._pages(chain))
        self._discard((page * PAGE_SIZE, PAGE_SIZE) for page in pages)
        return 0

    def on_deflate(self, chain: Chain) -> int:
        self._pages(chain)
        return 0

    def on_statistics(self, chain: Chain) -> int | None:
        if not self.features & Feature.STATS_VQ:
            # Linux numbers only the queues it uses, so without statistics this index is the next one's.
            return self.on_reporting(chain)
        data = chain.read_all(MAX_STATISTICS * STATISTIC.size)
        usable = len(data) - len(data) % STATISTIC.size
        fresh = {STATISTICS[tag]: value for tag, value in STATISTIC.iter_unpack(data[:usable]) if tag in STATISTICS}
        if fresh:
            self.statistics = fresh
            if self._listener is not None:
                self._listener(fresh)
        held, self._held = self._held, chain
        if held is not None:
            self.complete(held)
        return None

    def on_reporting(self, chain: Chain) -> int:
        if self.features & Feature.REPORTING:
            self._discard(sorted(chain.writable))
        return 0

    def _pages(self, chain: Chain) -> tuple[int, ...]:
        data = chain.read_all(MAX_PAGES * PFN_SIZE)
        if len(data) % PFN_SIZE:
            raise VirtqueueError("balloon: a list of pages that ends in half a number")
        pages: tuple[int, ...] = unpack(f"<{len(data) // PFN_SIZE}I", data)
        return pages

    def _discard(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Give ascending ranges back to the host, joined where they touch. Raises GuestMemoryError."""
        start = end = 0
        for gpa, size in ranges:
            if gpa % PAGE_SIZE or size % PAGE_SIZE:
                # Discarding the page anyway would zero what the guest still uses.
                raise GuestMemoryError(f"balloon: {gpa:#x} + {size:#x} is not whole pages")
            if gpa > end:
                self._release(start, end)
                start = gpa
                end = gpa + size
            elif gpa + size > end:
                end = gpa + size
        self._release(start, end)

    def _release(self, start: int, end: int) -> None:
        while start < end:
            size = min(end - start, MAX_DISCARD)
            self.memory.discard(start, size)
            self.discarded += size
            start += size

    def on_reset(self) -> None:
        self._held = None
        self._actual = 0

    def save_state(self) -> dict[str, Any]:
        return {"target": self._target, "actual": self._actual}

    def restore_state(self, state: dict[str, Any]) -> None:
        target, actual = state.get("target"), state.get("actual")
        for value in (target, actual):
            if not isinstance(value, int) or not 0 <= value <= 0xFFFF_FFFF:
                raise SnapshotError("balloon: the saved sizes are not sizes")
        assert isinstance(target, int)
        assert isinstance(actual, int)
        self._target = target
        self._actual = actual

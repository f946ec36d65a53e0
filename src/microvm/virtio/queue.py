"""The split virtqueue, device side. [virtio-v1.2] 2.7.

A queue is three areas of guest memory. The *descriptor table* names buffers: address, size, whether the device may
write, and which descriptor follows; a chain of them is one request. The driver offers requests in the *available
ring*: it writes the index of a chain's first descriptor (the head) into the next entry and then steps ``avail.idx``.
The device walks the chain, does the work, and gives the head back in the *used ring* with the number of bytes it
wrote, stepping ``used.idx`` last. Both indices run freely modulo 65536; an entry is at the index modulo the queue size.
A descriptor may point to an *indirect* table, which holds a whole chain outside the queue's own table.

What is ours to guard against: the other side is hostile and runs at the same time.

* Everything is fetched once, into Python integers, then checked, then used. An indirect table is copied as a whole.
* The rings must lie in one piece of guest memory, aligned; that is checked when the queue is enabled and the
  addresses cannot change while it is. From then on the rings are reached through views made at that moment.
* ``avail.idx`` may be ahead of us by at most the queue size; anything else is not a ring any more.
* A chain has a time to live equal to the size of the table it is in, so a loop ends; a head that is in flight
  already cannot be offered again, so the chains in flight are bounded by the queue size. Chains that share
  descriptors other than the head are two views of the same memory, which harms nobody but the driver.
* Segments are checked against guest memory as a whole and their sum against 2**32. Readable ones come first. Empty
  ones are skipped: the specification forbids them nowhere for this ring, and they name no memory.

What is broken raises VirtqueueError or GuestMemoryError, and the device goes inert until the driver resets it.

Suppression. ``avail.flags`` says that the driver wants no interrupts, ``used.flags`` that we want no notifications.
Both sides store one word and then load another, and if either processor lets the load overtake the store, a wake-up is
lost and the queue hangs. Python has no fence, but taking a lock is an atomic read-modify-write and as such a full
barrier on x86, so an uncontended lock serves as one, once a batch. Event indices (EVENT_IDX) would need it once a
chain and are not offered. Loads are not reordered with loads, nor stores with stores, on x86.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Final

from ..errors import GuestMemoryError, InternalError, VirtqueueError
from ..memory import GuestMemory
from ..spec.virtio import (
    AVAIL_ALIGN,
    AVAIL_HEADER_SIZE,
    AVAIL_NO_INTERRUPT,
    DESC_ALIGN,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    USED_ALIGN,
    USED_ELEMENT_SIZE,
    USED_HEADER_SIZE,
    USED_NO_NOTIFY,
    DescFlag,
)
from .chain import Chain

MAX_INDIRECT: Final = 1024
"""Entries of an indirect table. Linux fills one for every request and stays below 1024; without a cap a guest could
have the host copy and decode 4 GiB of table."""

MAX_CHAIN_BYTES: Final = 1 << 32
"""All segments of a chain together. [virtio-v1.2] 2.7.5: the sum fits 2**32, so used lengths fit their field."""

_NEXT: Final = DescFlag.NEXT
_WRITE: Final = DescFlag.WRITE
_INDIRECT: Final = DescFlag.INDIRECT
_unpack: Final = DESCRIPTOR.unpack_from


@dataclass(frozen=True, slots=True)
class QueueState:
    """What survives a snapshot: addresses, positions, and the heads that were popped but not pushed, oldest first."""

    size: int = 0
    desc_gpa: int = 0
    avail_gpa: int = 0
    used_gpa: int = 0
    ready: bool = False
    indirect: bool = False
    next_avail: int = 0
    next_used: int = 0
    in_flight: tuple[int, ...] = ()


class Queue:
    """One split virtqueue.

    ``size``, ``desc_gpa``, ``avail_gpa``, ``used_gpa`` and ``indirect`` are set by the transport while the queue is not
    ``ready``. Not thread-safe: the device's lock is held by whoever calls.
    """

    __slots__ = (
        "_avail",
        "_desc",
        "_fence",
        "_in_flight",
        "_mask",
        "_next_avail",
        "_next_used",
        "_replay",
        "_seen",
        "_used16",
        "_used32",
        "avail_gpa",
        "desc_gpa",
        "index",
        "indirect",
        "max_size",
        "memory",
        "name",
        "pushed",
        "ready",
        "size",
        "used_gpa",
    )

    def __init__(self, memory: GuestMemory, index: int, name: str, max_size: int) -> None:
        self.memory = memory
        self.index = index
        self.name = name
        self.max_size = max_size
        self._fence = threading.Lock()
        self.reset()

    def __repr__(self) -> str:
        return f"<Queue {self.index} {self.name}: size {self.size}, {'ready' if self.ready else 'not ready'}>"

    def reset(self) -> None:
        """Forget everything, chains in flight included, and let go of guest memory."""
        self.size = 0
        self.desc_gpa = 0
        self.avail_gpa = 0
        self.used_gpa = 0
        self.indirect = False
        self._next_avail = 0
        self._next_used = 0
        self._in_flight: dict[int, Chain] = {}
        self._replay: deque[int] = deque()
        self.disable()

    def enable(self) -> None:
        """Check size and areas and start serving. Raises VirtqueueError, and the queue stays off."""
        size = self.size
        if not 0 < size <= self.max_size or size & (size - 1):
            raise VirtqueueError(f"queue {self.name}: size {size} is not a power of two up to {self.max_size}")
        desc = self._area("descriptor table", self.desc_gpa, size * DESCRIPTOR_SIZE, DESC_ALIGN)
        avail = self._area("available ring", self.avail_gpa, AVAIL_HEADER_SIZE + 2 * size, AVAIL_ALIGN)
        used = self._area("used ring", self.used_gpa, USED_HEADER_SIZE + USED_ELEMENT_SIZE * size, USED_ALIGN)
        self._desc = desc
        self._avail = avail.cast("H")
        self._used16 = used.cast("H")
        self._used32 = used.cast("I")
        self._mask = size - 1
        self._seen = self._next_avail
        self.pushed = False
        self.ready = True

    def disable(self) -> None:
        """Stop serving. Chains in flight are forgotten; completing one later does nothing."""
        self.ready = False
        self.pushed = False
        self._seen = 0
        self._mask = 0
        self._in_flight.clear()
        self._replay.clear()
        self._desc = self._avail = self._used16 = self._used32 = memoryview(b"")

    def _area(self, what: str, gpa: int, size: int, align: int) -> memoryview:
        if gpa % align:
            raise VirtqueueError(f"queue {self.name}: {what} at {gpa:#x} is not aligned to {align}")
        try:
            return self.memory.view(gpa, size)
        except GuestMemoryError:
            raise VirtqueueError(f"queue {self.name}: {what} at {gpa:#x} is outside guest memory") from None

    @property
    def in_flight(self) -> int:
        """Chains popped and not pushed; never more than the queue size."""
        return len(self._in_flight)

    def pending(self) -> int:
        """Chains the driver has offered and nobody has popped, by the driver's word."""
        if not self.ready:
            return 0
        return ((self._avail[1] - self._next_avail) & 0xFFFF) + len(self._replay)

    def pop(self) -> Chain | None:
        """The next chain the driver offered, or None. Raises VirtqueueError, GuestMemoryError; see the module."""
        at = self._next_avail
        if at == self._seen or self._replay:
            if not self.ready:
                return None
            if self._replay:
                return self._walk(self._replay.popleft())
            index = self._avail[1]
            ahead = (index - at) & 0xFFFF
            if not ahead:
                return None
            if ahead > self.size:
                # Without this a guest makes us serve 65535 stale entries for one store.
                raise VirtqueueError(f"queue {self.name}: avail.idx is {ahead} ahead in a queue of {self.size}")
            self._seen = index
        chain = self._walk(self._avail[2 + (at & self._mask)])
        self._next_avail = (at + 1) & 0xFFFF
        return chain

    def _walk(self, head: int) -> Chain:
        memory = self.memory
        first = memory.regions[0]
        low, high = first.gpa, first.end
        table: memoryview | bytes = self._desc
        left = limit = self.size
        if head >= limit or head in self._in_flight:
            raise VirtqueueError(f"queue {self.name}: head {head} is {'out of range' if head >= limit else 'in use'}")
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        readable_bytes = writable_bytes = 0
        index = head
        while True:
            gpa, size, flags, index = _unpack(table, index << 4)
            if flags & _INDIRECT:
                if table is not self._desc or flags & _NEXT or not self.indirect:
                    raise VirtqueueError(f"queue {self.name}: an indirect descriptor where none is allowed")
                if not 0 < size <= MAX_INDIRECT * DESCRIPTOR_SIZE or size % DESCRIPTOR_SIZE:
                    raise VirtqueueError(f"queue {self.name}: an indirect table of {size} bytes")
                table = memory.read(gpa, size)
                left = limit = size >> 4
                index = 0
                continue
            if size:
                if gpa < low or gpa + size > high:
                    memory.region_of(gpa, size)
                if flags & _WRITE:
                    writable.append((gpa, size))
                    writable_bytes += size
                elif writable:
                    raise VirtqueueError(f"queue {self.name}: a readable descriptor after a writable one")
                else:
                    readable.append((gpa, size))
                    readable_bytes += size
            if not flags & _NEXT:
                break
            left -= 1
            if not left:
                raise VirtqueueError(f"queue {self.name}: the chain at {head} is longer than its table, or a loop")
            if index >= limit:
                raise VirtqueueError(f"queue {self.name}: next descriptor {index} is out of range")
        if readable_bytes + writable_bytes >= MAX_CHAIN_BYTES:
            raise VirtqueueError(f"queue {self.name}: the chain at {head} adds up to more than 4 GiB")
        chain = Chain(self, memory, head, readable, readable_bytes, writable, writable_bytes)
        self._in_flight[head] = chain
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give ``chain`` back with ``written`` bytes from the start of its writable part.

        Payload is reported to `GuestMemory.written` first, then the element is stored, then the index. A chain from
        before a reset is dropped. Raises InternalError for a chain pushed twice or too many bytes: our bugs.
        """
        head = chain.head
        if self._in_flight.get(head) is not chain:
            if chain.completed:
                raise InternalError(f"queue {self.name}: chain {head} was completed twice")
            return
        if not 0 <= written <= chain.writable_bytes:
            raise InternalError(f"queue {self.name}: {written} bytes written to {chain!r}")
        del self._in_flight[head]
        chain.completed = True
        dirty = chain.dirty
        if chain.viewed and written > dirty:
            dirty = written
        if dirty:
            report = self.memory.written
            for gpa, size in chain.writable:
                if size >= dirty:
                    report(gpa, dirty)
                    break
                report(gpa, size)
                dirty -= size
        at = self._next_used
        slot = 1 + ((at & self._mask) << 1)
        elements = self._used32
        elements[slot] = head
        elements[slot + 1] = written
        self._next_used = at = (at + 1) & 0xFFFF
        self._used16[1] = at
        self.pushed = True

    def finish(self) -> bool:
        """End a batch of pushes: report the used ring as written and say whether the driver wants an interrupt."""
        if not self.pushed:
            return False
        self.pushed = False
        self.memory.written(self.used_gpa, USED_HEADER_SIZE + USED_ELEMENT_SIZE * self.size)
        with self._fence:
            pass
        return not self._avail[0] & AVAIL_NO_INTERRUPT

    def suppress_notify(self) -> None:
        """Ask the driver not to notify: worth an exit for each request it adds while a batch is being served."""
        if self.ready:
            self._used16[0] = USED_NO_NOTIFY

    def allow_notify(self) -> bool:
        """Ask for notifications again. Returns whether something was offered meanwhile, which nobody will announce."""
        if not self.ready:
            return False
        self._used16[0] = 0
        with self._fence:
            pass
        return self.pending() > 0

    def save(self) -> QueueState:
        """The state to restore from. The queue goes on as it was."""
        return QueueState(
            size=self.size,
            desc_gpa=self.desc_gpa,
            avail_gpa=self.avail_gpa,
            used_gpa=self.used_gpa,
            ready=self.ready,
            indirect=self.indirect,
            next_avail=self._next_avail,
            next_used=self._next_used,
            in_flight=(*self._in_flight, *self._replay),
        )

    def restore(self, state: QueueState) -> None:
        """Take up a saved state. Chains that were in flight are popped again, first. Raises VirtqueueError."""
        self.reset()
        self.size = state.size
        self.desc_gpa = state.desc_gpa
        self.avail_gpa = state.avail_gpa
        self.used_gpa = state.used_gpa
        self.indirect = state.indirect
        self._next_avail = state.next_avail & 0xFFFF
        self._next_used = state.next_used & 0xFFFF
        if state.ready:
            self.enable()
            if len(state.in_flight) > self.size:
                self.disable()
                raise VirtqueueError(f"queue {self.name}: {len(state.in_flight)} chains in flight in {self.size}")
            self._replay.extend(state.in_flight)

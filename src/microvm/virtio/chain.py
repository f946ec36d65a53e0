"""A descriptor chain: one request of the driver, as memory the device may read followed by memory it may write.

`Queue.pop` has checked every segment against guest memory by the time a chain exists, but the bytes stay the
guest's: `read` and `unpack` copy once, views are for payload that is moved and never looked at twice.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

from ..errors import VirtqueueError

if TYPE_CHECKING:
    from ..memory import GuestMemory
    from .queue import Queue


class Chain:
    """One popped request. Belongs to its `Queue`; a device gives it back exactly once (`VirtioDevice.complete`).

    ``readable`` and ``writable`` are lists of ``(gpa, size)`` as the device sees them, without empty segments;
    ``readable_bytes`` and ``writable_bytes`` their sums. Reading and writing each have a cursor that starts at 0.
    [virtio-v1.2] 2.7.4.
    """

    __slots__ = (
        "_memory",
        "_read_at",
        "_write_at",
        "completed",
        "dirty",
        "head",
        "queue",
        "readable",
        "readable_bytes",
        "viewed",
        "writable",
        "writable_bytes",
    )

    def __init__(
        self,
        queue: Queue,
        memory: GuestMemory,
        head: int,
        readable: list[tuple[int, int]],
        readable_bytes: int,
        writable: list[tuple[int, int]],
        writable_bytes: int,
    ) -> None:
        self.queue = queue
        self.head = head
        self.readable = readable
        self.readable_bytes = readable_bytes
        self.writable = writable
        self.writable_bytes = writable_bytes
        self.viewed = False
        self.dirty = 0
        self.completed = False
        self._memory = memory
        self._read_at = 0
        self._write_at = 0

    def __repr__(self) -> str:
        return f"<Chain {self.head}: {self.readable_bytes} readable, {self.writable_bytes} writable>"

    @property
    def written(self) -> int:
        """Bytes written so far with `write`: what a handler returns when it used nothing else."""
        return self._write_at

    @property
    def unread(self) -> int:
        """Readable bytes that the cursor has not passed."""
        return self.readable_bytes - self._read_at

    def read(self, size: int) -> bytes:
        """A private copy of the next ``size`` readable bytes, fewer at the end. The caller caps ``size``."""
        at = self._read_at
        readable = self.readable
        if at == 0 and readable and size <= readable[0][1]:
            self._read_at = size
            return self._memory.read(readable[0][0], size)
        data = b"".join(bytes(view) for view in self._views(readable, at, size))
        self._read_at = at + len(data)
        return data

    def read_all(self, cap: int) -> bytes:
        """A private copy of all readable bytes left. Raises VirtqueueError if there are more than ``cap``.

        ``cap`` is what keeps a guest from choosing how much the host allocates: descriptors may all name the same
        large buffer.
        """
        if self.unread > cap:
            raise VirtqueueError(f"a request of {self.unread} bytes where at most {cap} are taken")
        return self.read(self.unread)

    def unpack(self, layout: Struct) -> tuple[int, ...]:
        """The next readable bytes as one record, fetched once. Raises VirtqueueError if the chain is too short."""
        at = self._read_at
        size = layout.size
        if at == 0 and self.readable and size <= self.readable[0][1]:
            self._read_at = size
            return self._memory.unpack(layout, self.readable[0][0])
        data = self.read(size)
        if len(data) < size:
            raise VirtqueueError(f"a request of {self.readable_bytes} bytes where a header of {size} is due")
        return layout.unpack(data)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write ``data`` at the cursor and return the bytes written in all, as a handler returns them.

        What does not fit is dropped: devices that care look at ``writable_bytes`` first.
        """
        at = self._write_at
        self._write_at = at + self.write_at(at, data)
        return self._write_at

    def write_at(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write ``data`` at ``offset`` of the writable bytes, independent of the cursor. Returns how many fitted."""
        done = 0
        size = len(data)
        for gpa, length in self.writable:
            if offset >= length:
                offset -= length
                continue
            if done == size:
                break
            piece = min(length - offset, size - done)
            self._memory.write(gpa + offset, data if piece == size else data[done : done + piece])
            done += piece
            offset = 0
        return done

    def write_last(self, value: int) -> None:
        """Store ``value`` into the very last writable byte, where devices with a status byte have it.

        Raises VirtqueueError if nothing is writable. Completing the chain reports all of it as changed.
        """
        if not self.writable:
            raise VirtqueueError("a request without room for its status")
        gpa, size = self.writable[-1]
        self._memory.store_u8(gpa + size - 1, value)
        self.dirty = self.writable_bytes

    def readable_views(self, offset: int = 0, size: int | None = None) -> list[memoryview]:
        """Windows on the readable bytes from ``offset``, at most ``size`` of them, for ``os.pwritev`` and the like.

        Independent of the cursor. Drop them before the chain is completed: afterwards the memory is the driver's.
        """
        return self._views(self.readable, offset, self.readable_bytes if size is None else size)

    def writable_views(self, offset: int = 0, size: int | None = None) -> list[memoryview]:
        """Windows on the writable bytes from ``offset``, at most ``size`` of them, for ``os.preadv`` and the like.

        Completing the chain with ``written`` bytes reports that many from the start as changed. Whoever changes
        others says so with `mark_dirty`.
        """
        self.viewed = True
        return self._views(self.writable, offset, self.writable_bytes if size is None else size)

    def mark_dirty(self, size: int) -> None:
        """The first ``size`` writable bytes may have changed, although fewer are returned as written."""
        if size > self.dirty:
            self.dirty = size

    def _views(self, segments: list[tuple[int, int]], offset: int, size: int) -> list[memoryview]:
        memory = self._memory
        first = memory.regions[0]
        low, high, window = first.gpa, first.end, first.view
        views = []
        for gpa, length in segments:
            if offset:
                if offset >= length:
                    offset -= length
                    continue
                gpa += offset
                length -= offset
                offset = 0
            if length >= size:
                if size <= 0:
                    break
                length = size
            size -= length
            if gpa >= low and gpa + length <= high:
                start = gpa - low
                views.append(window[start : start + length])
            else:
                views.append(memory.view(gpa, length))
        return views

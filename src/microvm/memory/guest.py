"""Guest memory: a few host mappings addressed by guest-physical address.

The guest is hostile and runs at the same time, so three rules hold everywhere:

* Copy once. ``read`` and ``unpack`` return private copies; validate the copy and use the copy. A view of guest
  memory is for moving payload only, never for looking at a field twice.
* Every access is checked against one region, with Python integers, so ``gpa + size`` cannot wrap.
* Words the guest polls (ring indices) go through ``load_*`` and ``store_*``, which are single aligned machine
  accesses. ``struct.pack_into`` clears its target first: a spinning reader saw 0 in one read of ten.

Whoever writes guest memory behind the vCPU's back tells ``written``: the software CPU must forget code it
translated from those bytes, and snapshots must know the page changed. ``write`` does so itself.
"""

from __future__ import annotations

import mmap
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Final

from .._os.mapping import can_map_over, map_over, private_pages
from ..errors import ConfigError, GuestMemoryError

PAGE_SIZE: Final = 4096
HOLE_START: Final = 0xC000_0000
HOLE_END: Final = 0x1_0000_0000
MIN_MEMORY_MIB: Final = 64
MAX_MEMORY_MIB: Final = 1 << 20
MAX_HOLES: Final = 4096
"""Pieces of a mapped file that are replaced by zeroes to give them back: each is one of the host's limited mappings
(65,530 a process on Linux), and the guest chooses them. What goes beyond is zeroed by writing."""
MIN_HOLE: Final = 256 << 10


class MemoryRegion:
    """One contiguous piece of guest-physical memory backed by a writable host buffer.

    ``buffer`` is kept alive by the region; ``hva`` is its host address for the backends' mapping calls.
    """

    __slots__ = ("_u8", "_u16", "_u32", "_u64", "buffer", "end", "gpa", "hva", "size", "view")

    def __init__(self, gpa: int, view: memoryview, buffer: object, hva: int) -> None:
        size = view.nbytes
        if gpa % PAGE_SIZE or size % PAGE_SIZE or size == 0 or hva % PAGE_SIZE:
            raise ConfigError("memory region", hex(gpa), "regions are whole 4 KiB pages")
        self.gpa = gpa
        self.size = size
        self.end = gpa + size
        self.hva = hva
        self.buffer = buffer
        self.view = view
        self._u8 = view.cast("B")
        self._u16 = view.cast("H")
        self._u32 = view.cast("I")
        self._u64 = view.cast("Q")

    def __repr__(self) -> str:
        return f"<MemoryRegion {self.gpa:#x}-{self.end:#x}>"

    def release(self) -> None:
        """Drop the views so that the buffer can be unmapped."""
        for view in (self._u8, self._u16, self._u32, self._u64, self.view):
            view.release()


def _address_of(buffer: mmap.mmap) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def anonymous_mapping(size: int) -> mmap.mmap:
    """``size`` bytes of zeroed, private, lazily committed host memory.

    Private matters on Linux: a forked child must get its own copy, not share the guest with its parent.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, size)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return mmap.mmap(-1, size, flags=flags)


class GuestMemory:
    """All memory of one guest.

    Thread-safe in the sense the hardware is: single loads and stores are atomic, longer copies are not.
    """

    def __init__(self, regions: list[MemoryRegion]) -> None:
        self.regions = sorted(regions, key=lambda region: region.gpa)
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if low.end > high.gpa:
                raise ConfigError("memory region", hex(high.gpa), "overlaps another region")
        self._observers: list[Callable[[int, int], None]] = []
        self._mapping: mmap.mmap | None = None
        self._of_file = False
        self._holes: list[tuple[int, int]] = []
        self._first = self.regions[0]

    @classmethod
    def from_mapping(cls, mapping: mmap.mmap, *, of_file: bool = False) -> GuestMemory:
        """Lay one host mapping out as RAM: from 0 to 3 GiB, the rest from 4 GiB up. The mapping becomes ours.

        ``of_file`` says that it is a private mapping of a file, whose pages come back when they are thrown away. The
        gap below 4 GiB holds the APICs and the virtio devices (`boot/layout.py`).
        """
        size = len(mapping)
        hva = _address_of(mapping)
        whole = memoryview(mapping)
        low = min(size, HOLE_START)
        regions = [MemoryRegion(0, whole[:low], mapping, hva)]
        if size > low:
            regions.append(MemoryRegion(HOLE_END, whole[low:], mapping, hva + low))
        memory = cls(regions)
        memory._mapping = mapping
        memory._of_file = of_file
        return memory

    @classmethod
    def allocate(cls, size: int) -> GuestMemory:
        """``size`` bytes of zeroed RAM, committed by the host page by page as the guest touches it.

        Raises ConfigError if the size is not whole pages, HostError-free otherwise: the mapping is lazy.
        """
        if size <= 0 or size % PAGE_SIZE:
            raise ConfigError("memory", size, "a positive multiple of 4096 bytes")
        return cls.from_mapping(anonymous_mapping(size))

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        return sum(region.size for region in self.regions)

    def region_of(self, gpa: int, size: int) -> MemoryRegion:
        """The one region that holds all of ``size`` bytes at ``gpa``. Raises GuestMemoryError."""
        region = self._first
        if gpa >= 0 and size >= 0:
            if gpa + size <= region.end and gpa >= region.gpa:
                return region
            for region in self.regions:
                if region.gpa <= gpa and gpa + size <= region.end:
                    return region
        raise GuestMemoryError(f"guest address {gpa:#x} + {size:#x} is outside guest memory")

    def read(self, gpa: int, size: int) -> bytes:
        """A private copy of ``size`` bytes. Raises GuestMemoryError. The caller caps ``size``."""
        region = self.region_of(gpa, size)
        start = gpa - region.gpa
        return bytes(region.view[start : start + size])

    def unpack(self, layout: struct.Struct, gpa: int) -> tuple[int, ...]:
        """Decode one record from a private copy: one fetch, however many fields. Raises GuestMemoryError."""
        region = self.region_of(gpa, layout.size)
        return layout.unpack_from(region.view, gpa - region.gpa)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` into the guest and report it as written. Raises GuestMemoryError."""
        size = len(data)
        region = self.region_of(gpa, size)
        start = gpa - region.gpa
        region.view[start : start + size] = data
        self.written(gpa, size)

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable window on guest memory for moving payload without a copy. Raises GuestMemoryError.

        The guest can change the bytes at any time. Whoever writes through it calls ``written`` afterwards.
        """
        region = self.region_of(gpa, size)
        start = gpa - region.gpa
        return region.view[start : start + size]

    def load_u8(self, gpa: int) -> int:
        region = self.region_of(gpa, 1)
        return region._u8[gpa - region.gpa]

    def load_u16(self, gpa: int) -> int:
        """One atomic little-endian load; ``gpa`` must be aligned. Raises GuestMemoryError."""
        region = self.region_of(gpa, 2)
        return region._u16[_aligned(gpa, region, 2) >> 1]

    def load_u32(self, gpa: int) -> int:
        region = self.region_of(gpa, 4)
        return region._u32[_aligned(gpa, region, 4) >> 2]

    def load_u64(self, gpa: int) -> int:
        region = self.region_of(gpa, 8)
        return region._u64[_aligned(gpa, region, 8) >> 3]

    def store_u8(self, gpa: int, value: int) -> None:
        region = self.region_of(gpa, 1)
        region._u8[gpa - region.gpa] = value

    def store_u16(self, gpa: int, value: int) -> None:
        """One atomic little-endian store, not reported as written. Raises GuestMemoryError."""
        region = self.region_of(gpa, 2)
        region._u16[_aligned(gpa, region, 2) >> 1] = value

    def store_u32(self, gpa: int, value: int) -> None:
        region = self.region_of(gpa, 4)
        region._u32[_aligned(gpa, region, 4) >> 2] = value

    def store_u64(self, gpa: int, value: int) -> None:
        region = self.region_of(gpa, 8)
        region._u64[_aligned(gpa, region, 8) >> 3] = value

    def observe(self, observer: Callable[[int, int], None]) -> None:
        """Call ``observer(gpa, size)`` for every write the host makes to guest memory, on the writing thread."""
        self._observers.append(observer)

    def written(self, gpa: int, size: int) -> None:
        """Report that the host wrote ``size`` bytes at ``gpa``, before the guest is told of them."""
        for observer in self._observers:
            observer(gpa, size)

    def discard(self, gpa: int, size: int) -> None:
        """Give whole pages back to the host; they read as zeroes afterwards. Raises GuestMemoryError.

        For ballooning and free page reporting: really frees host memory where the host can
        (``madvise(MADV_DONTNEED)``); elsewhere the pages are zeroed, which costs time but keeps the meaning.
        """
        region = self.region_of(gpa, size)
        if gpa % PAGE_SIZE or size % PAGE_SIZE:
            raise GuestMemoryError(f"guest range {gpa:#x} + {size:#x} is not whole pages")
        mapping = self._mapping
        if self._of_file:
            self._punch(region, gpa, size)
        elif sys.platform != "win32" and mapping is not None:
            mapping.madvise(mmap.MADV_DONTNEED, region.hva - self.regions[0].hva + gpa - region.gpa, size)
        else:
            start = gpa - region.gpa
            region.view[start : start + size] = bytes(size)
        self.written(gpa, size)

    def _punch(self, region: MemoryRegion, gpa: int, size: int) -> None:
        """`discard` for a private mapping of a file: MADV_DONTNEED would bring the file's content back."""
        start = gpa - region.gpa
        hva = region.hva + start
        if size >= MIN_HOLE and len(self._holes) < MAX_HOLES and can_map_over() and map_over(hva, size):
            self._holes.append(((hva - self.regions[0].hva) // PAGE_SIZE, size // PAGE_SIZE))
            return
        for at in range(start, start + size, MIN_HOLE):
            end = min(at + MIN_HOLE, start + size)
            region.view[at:end] = bytes(end - at)

    @property
    def image(self) -> memoryview:
        """All RAM as one piece, in the order of the regions, the hole below 4 GiB left out. For snapshots.

        Only of memory that is one mapping. The caller releases it before `close`.
        """
        assert self._mapping is not None
        return memoryview(self._mapping)

    def written_pages(self) -> list[tuple[int, int]] | None:
        """Pages of `image` that may differ from what the memory began with: zeroes, or the file it is a mapping of.

        Ascending pairs of first page and number of pages, or None where the host does not tell.
        """
        written = private_pages(self.regions[0].hva, self.size)
        if written is None or not self._holes:
            return written
        return _union(written + self._holes)

    def __iter__(self) -> Iterator[MemoryRegion]:
        return iter(self.regions)

    def close(self) -> None:
        """Unmap. No vCPU may run and no view may be left."""
        for region in self.regions:
            region.release()
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:
                # A view is still held by somebody: the addresses stay until it goes, the memory does not.
                if sys.platform != "win32":
                    mapping.madvise(mmap.MADV_DONTNEED)


def _union(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, count in sorted(ranges):
        if merged and first <= sum(merged[-1]):
            start, length = merged[-1]
            merged[-1] = (start, max(length, first + count - start))
        else:
            merged.append((first, count))
    return merged


def _aligned(gpa: int, region: MemoryRegion, size: int) -> int:
    if gpa & (size - 1):
        raise GuestMemoryError(f"guest address {gpa:#x} is not aligned to {size} bytes")
    return gpa - region.gpa

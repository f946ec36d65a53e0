"""The split ring against a driver that breaks every rule. [virtio-v1.2] 2.7."""

from __future__ import annotations

import ctypes
import dataclasses
import mmap

import pytest

from microvm.errors import GuestMemoryError, InternalError, VirtqueueError
from microvm.memory import GuestMemory, MemoryRegion
from microvm.memory.guest import anonymous_mapping
from microvm.spec.virtio import DescFlag
from microvm.virtio import Queue
from microvm.virtio.queue import MAX_INDIRECT

DESC, AVAIL, USED, DATA = 0x1000, 0x2000, 0x3000, 0x10000
SIZE = 8
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT


class Ring:
    """A queue, and the driver's side of it by hand."""

    def __init__(self, memory: GuestMemory | None = None) -> None:
        self.memory = memory or GuestMemory.allocate(1 << 20)
        self.queue = Queue(self.memory, 0, "test", 256)
        self.set()
        self.queue.enable()
        self.index = 0

    def set(self) -> None:
        queue = self.queue
        queue.size, queue.desc_gpa, queue.avail_gpa, queue.used_gpa, queue.indirect = SIZE, DESC, AVAIL, USED, True

    def desc(self, index: int, gpa: int, size: int, flags: int = 0, after: int = 0, table: int = DESC) -> None:
        record = (
            gpa.to_bytes(8, "little")
            + size.to_bytes(4, "little")
            + flags.to_bytes(2, "little")
            + after.to_bytes(2, "little")
        )
        self.memory.write(table + 16 * index, record)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.store_u16(AVAIL + 4 + 2 * (self.index % SIZE), head)
            self.index = (self.index + 1) & 0xFFFF
        self.memory.store_u16(AVAIL + 2, self.index)


@pytest.fixture
def ring() -> Ring:
    return Ring()


def test_an_empty_ring_pops_nothing(ring: Ring) -> None:
    assert ring.queue.pop() is None


def test_a_chain_is_readable_then_writable(ring: Ring) -> None:
    ring.desc(3, DATA, 16, NEXT, 1)
    ring.desc(1, DATA + 0x100, 32, NEXT | WRITE, 0)
    ring.desc(0, DATA + 0x200, 1, WRITE)
    ring.offer(3)
    chain = ring.queue.pop()
    assert chain is not None
    assert chain.head == 3
    assert chain.readable == [(DATA, 16)]
    assert chain.writable == [(DATA + 0x100, 32), (DATA + 0x200, 1)]
    assert (chain.readable_bytes, chain.writable_bytes) == (16, 33)


def test_push_publishes_head_and_length(ring: Ring) -> None:
    ring.desc(5, DATA, 64, WRITE)
    ring.offer(5)
    chain = ring.queue.pop()
    assert chain is not None
    ring.queue.push(chain, 7)
    assert ring.memory.load_u16(USED + 2) == 1
    assert (ring.memory.load_u32(USED + 4), ring.memory.load_u32(USED + 8)) == (5, 7)


def test_payload_written_through_views_is_reported_before_the_index_moves(ring: Ring) -> None:
    ring.desc(0, DATA, 64, WRITE | NEXT, 1)
    ring.desc(1, DATA + 0x1000, 64, WRITE)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    seen = []
    ring.memory.observe(lambda gpa, size: seen.append((gpa, size, ring.memory.load_u16(USED + 2))))
    for view in chain.writable_views():
        view[:] = b"x" * len(view)
    ring.queue.push(chain, 80)
    assert seen == [(DATA, 64, 0), (DATA + 0x1000, 16, 0)]
    assert ring.queue.finish()
    assert seen[2][:2] == (USED, 4 + 8 * SIZE)


def test_indices_wrap_at_65536(ring: Ring) -> None:
    ring.queue.restore(dataclasses.replace(ring.queue.save(), next_avail=0xFFFC, next_used=0xFFFC))
    ring.index = 0xFFFC
    for count in range(3 * SIZE):
        ring.desc(count % SIZE, DATA, 8, WRITE)
        ring.offer(count % SIZE)
        chain = ring.queue.pop()
        assert chain is not None
        ring.queue.push(chain, count % 8)
    assert ring.memory.load_u16(USED + 2) == 3 * SIZE - 4
    assert [ring.memory.load_u32(USED + 4 + 8 * slot) for slot in range(SIZE)] == [4, 5, 6, 7, 0, 1, 2, 3]


@pytest.mark.parametrize("jump", [SIZE + 1, 0x7FFF, 0xFFFF])
def test_avail_idx_jump_is_a_guest_error(ring: Ring, jump: int) -> None:
    ring.memory.store_u16(AVAIL + 2, jump)
    with pytest.raises(VirtqueueError, match=r"avail\.idx"):
        ring.queue.pop()


def test_avail_idx_that_goes_back_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 8)
    ring.offer(0)
    assert ring.queue.pop() is not None
    ring.memory.store_u16(AVAIL + 2, 0)
    with pytest.raises(VirtqueueError, match=r"avail\.idx"):
        ring.queue.pop()


def test_a_head_out_of_range_is_a_guest_error(ring: Ring) -> None:
    ring.offer(SIZE)
    with pytest.raises(VirtqueueError, match="head 8 is out of range"):
        ring.queue.pop()


def test_a_head_in_flight_cannot_be_offered_again(ring: Ring) -> None:
    ring.desc(0, DATA, 8)
    ring.offer(0, 0)
    assert ring.queue.pop() is not None
    with pytest.raises(VirtqueueError, match="head 0 is in use"):
        ring.queue.pop()


def test_two_chains_may_share_a_tail(ring: Ring) -> None:
    ring.desc(0, DATA, 8, NEXT, 2)
    ring.desc(1, DATA + 8, 8, NEXT, 2)
    ring.desc(2, DATA + 16, 8, WRITE)
    ring.offer(0, 1)
    first, second = ring.queue.pop(), ring.queue.pop()
    assert first is not None
    assert second is not None
    assert first.writable == second.writable
    ring.queue.push(second, 8)
    ring.queue.push(first, 8)
    assert ring.queue.in_flight == 0


def test_a_loop_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 8, NEXT, 1)
    ring.desc(1, DATA, 8, NEXT, 0)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="loop"):
        ring.queue.pop()


def test_a_chain_may_use_the_whole_table(ring: Ring) -> None:
    for index in range(SIZE):
        ring.desc(index, DATA, 8, NEXT if index < SIZE - 1 else 0, index + 1)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    assert len(chain.readable) == SIZE


def test_a_next_index_out_of_range_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 8, NEXT, SIZE)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="next descriptor 8"):
        ring.queue.pop()


def test_readable_after_writable_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 8, NEXT | WRITE, 1)
    ring.desc(1, DATA, 8)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="readable descriptor after"):
        ring.queue.pop()


@pytest.mark.parametrize(
    ("gpa", "size"), [(1 << 20, 1), ((1 << 20) - 4, 8), (0xFFFF_FFFF_FFFF_FFFF, 2), (DATA, 0xFFFF_FFFF), (1 << 63, 16)]
)
def test_a_segment_outside_memory_is_a_guest_error(ring: Ring, gpa: int, size: int) -> None:
    ring.desc(0, gpa, size, WRITE)
    ring.offer(0)
    with pytest.raises(GuestMemoryError):
        ring.queue.pop()


def test_an_empty_segment_is_skipped_wherever_it_points(ring: Ring) -> None:
    ring.desc(0, 1 << 60, 0, NEXT, 1)
    ring.desc(1, DATA, 8)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    assert chain.readable == [(DATA, 8)]


def test_segments_that_add_up_to_4_gib_are_a_guest_error() -> None:
    class Vast(GuestMemory):
        """Memory that claims to be 2 GiB long without the test having to map it."""

        def region_of(self, gpa: int, size: int) -> MemoryRegion:
            return super().region_of(gpa, min(size, 16))

    mapping = anonymous_mapping(1 << 20)
    ring = Ring(Vast.from_mapping(mapping))
    ring.desc(0, DATA, 1 << 31, NEXT, 1)
    ring.desc(1, DATA, 1 << 31)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="4 GiB"):
        ring.queue.pop()


def test_an_indirect_table_holds_the_chain(ring: Ring) -> None:
    ring.desc(0, DATA, 48, INDIRECT | WRITE)  # WRITE means nothing here. [virtio-v1.2] 2.7.5.3.2
    ring.desc(0, DATA + 0x100, 8, NEXT, 2, table=DATA)
    ring.desc(2, DATA + 0x200, 8, NEXT | WRITE, 1, table=DATA)
    ring.desc(1, DATA + 0x300, 8, WRITE, table=DATA)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    assert chain.readable == [(DATA + 0x100, 8)]
    assert chain.writable == [(DATA + 0x200, 8), (DATA + 0x300, 8)]


def test_an_indirect_table_may_follow_direct_descriptors(ring: Ring) -> None:
    ring.desc(0, DATA + 0x100, 8, NEXT, 1)
    ring.desc(1, DATA, 16, INDIRECT)
    ring.desc(0, DATA + 0x200, 8, table=DATA)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    assert chain.readable == [(DATA + 0x100, 8), (DATA + 0x200, 8)]


@pytest.mark.parametrize("size", [0, 8, 24, 16 * (MAX_INDIRECT + 1), 0xFFFF_FFF0])
def test_an_odd_indirect_table_is_a_guest_error(ring: Ring, size: int) -> None:
    ring.desc(0, DATA, size, INDIRECT)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="indirect table"):
        ring.queue.pop()


def test_an_indirect_table_outside_memory_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, (1 << 20) - 16, 32, INDIRECT)
    ring.offer(0)
    with pytest.raises(GuestMemoryError):
        ring.queue.pop()


def test_an_indirect_table_in_an_indirect_table_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 16, INDIRECT)
    ring.desc(0, DATA, 16, INDIRECT, table=DATA)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="indirect"):
        ring.queue.pop()


def test_an_indirect_descriptor_with_a_successor_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 16, INDIRECT | NEXT, 1)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="indirect"):
        ring.queue.pop()


def test_an_indirect_descriptor_without_the_feature_is_a_guest_error(ring: Ring) -> None:
    ring.queue.indirect = False
    ring.desc(0, DATA, 16, INDIRECT)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="indirect"):
        ring.queue.pop()


def test_a_loop_in_an_indirect_table_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 32, INDIRECT)
    ring.desc(0, DATA, 8, NEXT, 1, table=DATA)
    ring.desc(1, DATA, 8, NEXT, 0, table=DATA)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="loop"):
        ring.queue.pop()


def test_an_indirect_next_out_of_range_is_a_guest_error(ring: Ring) -> None:
    ring.desc(0, DATA, 32, INDIRECT)
    ring.desc(0, DATA, 8, NEXT, 2, table=DATA)
    ring.offer(0)
    with pytest.raises(VirtqueueError, match="next descriptor 2"):
        ring.queue.pop()


@pytest.mark.parametrize("size", [0, 3, 12, 512, 0xFFFF_FFFF])
def test_a_size_that_is_no_power_of_two_up_to_the_maximum_is_refused(ring: Ring, size: int) -> None:
    ring.queue.disable()
    ring.queue.size = size
    with pytest.raises(VirtqueueError, match="power of two"):
        ring.queue.enable()
    assert not ring.queue.ready


@pytest.mark.parametrize("area", ["desc_gpa", "avail_gpa", "used_gpa"])
@pytest.mark.parametrize("gpa", [0x1001, (1 << 20) - 16, 1 << 40, (1 << 64) - 16])
def test_a_ring_misaligned_or_outside_memory_is_refused(ring: Ring, area: str, gpa: int) -> None:
    ring.queue.disable()
    setattr(ring.queue, area, gpa)
    with pytest.raises(VirtqueueError, match=r"not aligned|outside guest memory"):
        ring.queue.enable()
    assert ring.queue.pop() is None


def test_a_chain_from_before_a_reset_is_dropped(ring: Ring) -> None:
    ring.desc(0, DATA, 8, WRITE)
    ring.offer(0)
    stale = ring.queue.pop()
    assert stale is not None
    ring.queue.reset()
    ring.set()
    ring.queue.enable()
    ring.memory.store_u16(USED + 2, 0)
    assert ring.queue.pop() is not None  # the same head, another chain
    ring.queue.push(stale, 8)
    assert ring.memory.load_u16(USED + 2) == 0


def test_completing_twice_is_our_bug(ring: Ring) -> None:
    ring.desc(0, DATA, 8, WRITE)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    ring.queue.push(chain, 8)
    with pytest.raises(InternalError, match="twice"):
        ring.queue.push(chain, 8)


def test_writing_more_than_there_is_room_is_our_bug(ring: Ring) -> None:
    ring.desc(0, DATA, 8, WRITE)
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    with pytest.raises(InternalError, match="9 bytes"):
        ring.queue.push(chain, 9)


def test_finish_wants_an_interrupt_only_after_a_push_and_unless_suppressed(ring: Ring) -> None:
    assert not ring.queue.finish()
    for suppressed in (False, True):
        ring.memory.store_u16(AVAIL, int(suppressed))
        ring.desc(0, DATA, 8)
        ring.offer(0)
        chain = ring.queue.pop()
        assert chain is not None
        ring.queue.push(chain, 0)
        assert ring.queue.finish() is not suppressed
        assert not ring.queue.finish()


def test_allowing_notifications_reports_what_was_missed(ring: Ring) -> None:
    ring.queue.suppress_notify()
    assert ring.memory.load_u16(USED) == 1
    ring.desc(0, DATA, 8)
    ring.offer(0)
    assert ring.queue.allow_notify()
    assert ring.memory.load_u16(USED) == 0
    assert ring.queue.pop() is not None
    assert not ring.queue.allow_notify()


def test_chains_in_flight_are_popped_again_after_a_restore(ring: Ring) -> None:
    for head in (4, 2, 6):
        ring.desc(head, DATA + head, 8, WRITE)
    ring.offer(4, 2, 6)
    four, two = ring.queue.pop(), ring.queue.pop()
    assert four is not None
    assert two is not None
    ring.queue.push(four, 8)
    state = ring.queue.save()
    assert state.in_flight == (2,)
    other = Queue(ring.memory, 0, "test", 256)
    other.restore(state)
    assert other.save() == state
    heads = []
    while (chain := other.pop()) is not None:
        heads.append(chain.head)
        other.push(chain, 8)
    assert heads == [2, 6]
    assert ring.memory.load_u16(USED + 2) == 3


def test_a_saved_queue_with_absurd_positions_is_contained(ring: Ring) -> None:
    state = dataclasses.replace(ring.queue.save(), in_flight=tuple(range(SIZE + 1)))
    with pytest.raises(VirtqueueError):
        ring.queue.restore(state)
    assert not ring.queue.ready


def test_segments_in_high_memory_are_served() -> None:
    regions = []
    for gpa in (0, 1 << 32):
        mapping = mmap.mmap(-1, 1 << 20)
        hva = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        regions.append(MemoryRegion(gpa, memoryview(mapping), mapping, hva))
    ring = Ring(GuestMemory(regions))
    ring.desc(0, (1 << 32) + 0x100, 8, NEXT, 1)
    ring.desc(1, (1 << 32) + 0x200, 8, WRITE)
    ring.memory.write((1 << 32) + 0x100, b"highmem!")
    ring.offer(0)
    chain = ring.queue.pop()
    assert chain is not None
    assert b"".join(bytes(view) for view in chain.readable_views()) == b"highmem!"
    chain.writable_views()[0][:] = b"answered"
    ring.queue.push(chain, 8)
    assert ring.memory.read((1 << 32) + 0x200, 8) == b"answered"

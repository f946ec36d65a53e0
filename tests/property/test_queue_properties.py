"""Rings full of garbage never hurt the host; rings that keep the rules lose nothing."""

from __future__ import annotations

from struct import pack

from hypothesis import given, settings
from hypothesis import strategies as st

from microvm.errors import GuestError
from microvm.memory import GuestMemory
from microvm.spec.virtio import DeviceId
from microvm.testing import FakeDriver
from microvm.virtio import Chain, Queue, QueueSpec, VirtioDevice
from microvm.virtio.queue import MAX_CHAIN_BYTES, MAX_INDIRECT

SIZE = 8
MEMORY = 0x8000
DESC, AVAIL, USED = 0x0, 0x1000, 0x2000

gpas = st.one_of(
    st.integers(0, MEMORY + 64), st.integers(0, (1 << 64) - 1), st.sampled_from([DESC, 0x3000, MEMORY - 16])
)
sizes = st.one_of(st.integers(0, 256), st.integers(0, (1 << 32) - 1), st.sampled_from([16, 32, 64, MEMORY]))
flags = st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF))
indices = st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF))
descriptors = st.lists(st.tuples(gpas, sizes, flags, indices), max_size=32)


@settings(max_examples=400, deadline=None)
@given(
    table=descriptors,
    more=descriptors,
    heads=st.lists(indices, max_size=SIZE),
    jump=st.integers(0, 0xFFFF),
    fair=st.booleans(),
)
def test_whatever_is_in_a_ring_chains_stay_inside_memory_or_are_guest_errors(
    table: list[tuple[int, int, int, int]],
    more: list[tuple[int, int, int, int]],
    heads: list[int],
    jump: int,
    fair: bool,
) -> None:
    memory = GuestMemory.allocate(MEMORY)
    for base, entries in ((DESC, table), (0x3000, more)):
        memory.write(base, b"".join(pack("<QIHH", *entry) for entry in entries))
    memory.write(AVAIL, pack(f"<HH{len(heads)}H", 0, len(heads) if fair else jump, *heads))
    queue = Queue(memory, 0, "test", 256)
    queue.size, queue.desc_gpa, queue.avail_gpa, queue.used_gpa, queue.indirect = SIZE, DESC, AVAIL, USED, True
    queue.enable()
    kept: list[Chain] = []
    try:
        for _ in range(SIZE + 1):
            chain = queue.pop()
            if chain is None:
                break
            kept.append(chain)
            assert len(chain.readable) + len(chain.writable) <= SIZE + MAX_INDIRECT
            assert chain.readable_bytes + chain.writable_bytes < MAX_CHAIN_BYTES
            for gpa, size in (*chain.readable, *chain.writable):
                assert size > 0
                assert gpa >= 0
                assert gpa + size <= MEMORY
            assert sum(map(len, chain.readable_views())) == chain.readable_bytes
            assert sum(map(len, chain.writable_views())) == chain.writable_bytes
    except GuestError:
        pass
    assert queue.in_flight == len(kept) <= SIZE
    for chain in kept:
        queue.push(chain, chain.writable_bytes)
    assert queue.in_flight == 0
    memory.close()


class Echo(VirtioDevice):
    device_id = DeviceId.ENTROPY
    queues = (QueueSpec("requests", 32),)

    def on_requests(self, chain: Chain) -> int:
        return chain.write(chain.read_all(1 << 16))


pieces = st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5)
rooms = st.lists(st.integers(1, 60), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(
    batches=st.lists(st.lists(st.tuples(pieces, rooms, st.booleans()), max_size=3), max_size=6),
    deferred=st.booleans(),
    move=st.integers(0, 6),
)
def test_requests_that_keep_the_rules_are_all_answered_in_order(
    batches: list[list[tuple[list[bytes], list[int], bool]]], deferred: bool, move: int
) -> None:
    driver = FakeDriver(Echo(), memory=GuestMemory.allocate(2 << 20), deferred=deferred, queue_size=32).start()
    for number, batch in enumerate(batches):
        expected = []
        for readable, writable, indirect in batch:
            driver.add("requests", readable, writable, indirect=indirect)
            expected.append(b"".join(readable)[: sum(writable)])
        driver.notify("requests")
        if number == move:
            driver.move_to(Echo())
        driver.run()
        assert [used.data for used in driver.collect("requests")] == expected
    driver.close()

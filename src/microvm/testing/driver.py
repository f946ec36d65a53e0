"""A guest driver for tests: drives a device through its registers and rings, as a kernel would.

    driver = FakeDriver(Rng(lambda size: b"7" * size))
    driver.start()
    assert driver.request("requests", writable=16) == b"7" * 16

Everything goes through guest memory and the register file, so a test sees what a guest sees. What a well-behaved
driver would never do is a call away: `descriptor` and `offer` write raw table entries and heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ..irq import NullIrq
from ..memory import GuestMemory
from ..spec.virtio import (
    AVAIL_HEADER_SIZE,
    DESCRIPTOR,
    DESCRIPTOR_SIZE,
    USED_ELEMENT_SIZE,
    USED_HEADER_SIZE,
    DescFlag,
    Feature,
    MmioReg,
    Status,
)
from ..virtio import VirtioDevice, VirtioMmio

_BUFFERS: Final = 0x10_0000
_RING_STEP: Final = 0x1_0000
_INIT: Final = (Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER)
_AGREED: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK


@dataclass(frozen=True, slots=True)
class Used:
    """A chain that came back: its head, how many bytes the device says it wrote, and those bytes."""

    head: int
    written: int
    data: bytes


class _Ring:
    """The driver's half of one queue."""

    def __init__(self, index: int, name: str, size: int) -> None:
        self.index = index
        self.name = name
        self.size = size
        self.desc_gpa = 0x1_0000 + index * _RING_STEP
        self.avail_gpa = self.desc_gpa + 0x8000
        self.used_gpa = self.desc_gpa + 0xA000
        self.forget()

    def forget(self) -> None:
        self.free = list(range(self.size - 1, -1, -1))
        self.avail_index = 0
        self.used_index = 0
        self.chains: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}


class FakeDriver:
    """Plays the guest's driver for ``device``.

    ``memory`` is made (4 MiB) unless given. With ``deferred`` notifications wait in `notified` until `run` serves them,
    as an I/O thread would; otherwise the notifying call serves the queue before it returns. ``queue_size`` caps the
    size used for each queue (at most 256).
    """

    def __init__(
        self,
        device: VirtioDevice,
        *,
        memory: GuestMemory | None = None,
        deferred: bool = False,
        queue_size: int = 256,
    ) -> None:
        self.device = device
        self.memory = memory if memory is not None else GuestMemory.allocate(4 << 20)
        self.irq = NullIrq()
        self.notified: list[int] = []
        self.features = 0
        self._deferred = deferred
        self.mmio = self._connect(device)
        self._queue_size = queue_size
        self._next_buffer = _BUFFERS
        self.rings = [
            _Ring(index, spec.name, min(queue_size, spec.max_size)) for index, spec in enumerate(device.queues)
        ]

    def _connect(self, device: VirtioDevice) -> VirtioMmio:
        return VirtioMmio(device, self.memory, self.irq, self.notified.append if self._deferred else None)

    # Registers.

    def read(self, register: int, size: int = 4) -> int:
        """Read a register of `MmioReg`."""
        return self.mmio.mmio_read(register, size)

    def write(self, register: int, value: int, size: int = 4) -> None:
        """Write a register of `MmioReg`."""
        self.mmio.mmio_write(register, size, value)

    def config(self, offset: int, size: int = 4) -> int:
        """Read ``size`` bytes of configuration space as a little-endian integer."""
        return self.mmio.mmio_read(MmioReg.CONFIG + offset, size)

    @property
    def status(self) -> int:
        """The status register."""
        return self.read(MmioReg.STATUS)

    @property
    def needs_reset(self) -> bool:
        """Whether the device gave up on us."""
        return bool(self.status & Status.DEVICE_NEEDS_RESET)

    def take_interrupts(self) -> int:
        """Read the interrupt status, acknowledge it, and return it: what an interrupt handler does."""
        status = self.read(MmioReg.INTERRUPT_STATUS)
        self.write(MmioReg.INTERRUPT_ACK, status)
        return status

    # Initialization. [virtio-v1.2] 3.1.1.

    def start(self, features: int | None = None) -> FakeDriver:
        """Bring the device up with ``features`` (all it offers unless given) and every queue. Returns self."""
        self.negotiate(features)
        for ring in self.rings:
            self.set_queue(ring.index)
        self.write(MmioReg.STATUS, _AGREED | Status.DRIVER_OK)
        return self

    def negotiate(self, features: int | None = None) -> int:
        """Reset, then go as far as FEATURES_OK. Returns the status register."""
        self.reset()
        for step in _INIT:
            self.write(MmioReg.STATUS, step)
        chosen = self.offered() if features is None else features | Feature.VERSION_1
        for word in (0, 1):
            self.write(MmioReg.DRIVER_FEATURES_SEL, word)
            self.write(MmioReg.DRIVER_FEATURES, chosen >> 32 * word & 0xFFFF_FFFF)
        self.write(MmioReg.STATUS, _AGREED)
        self.features = chosen
        return self.status

    def offered(self) -> int:
        """The device's features, all 64 bits."""
        offered = 0
        for word in (0, 1):
            self.write(MmioReg.DEVICE_FEATURES_SEL, word)
            offered |= self.read(MmioReg.DEVICE_FEATURES) << 32 * word
        return offered

    def set_queue(self, queue: int | str, size: int | None = None) -> None:
        """Configure and enable one queue."""
        ring = self.ring(queue)
        self.write(MmioReg.QUEUE_SEL, ring.index)
        self.write(MmioReg.QUEUE_NUM, ring.size if size is None else size)
        for low, gpa in (
            (MmioReg.QUEUE_DESC_LOW, ring.desc_gpa),
            (MmioReg.QUEUE_DRIVER_LOW, ring.avail_gpa),
            (MmioReg.QUEUE_DEVICE_LOW, ring.used_gpa),
        ):
            self.write(low, gpa & 0xFFFF_FFFF)
            self.write(low + 4, gpa >> 32)
        self.write(MmioReg.QUEUE_READY, 1)

    def reset(self) -> None:
        """Reset the device and forget all rings."""
        self.write(MmioReg.STATUS, 0)
        for ring in self.rings:
            ring.forget()
            self.memory.write(ring.desc_gpa, bytes(DESCRIPTOR_SIZE * ring.size))
            self.memory.write(ring.avail_gpa, bytes(AVAIL_HEADER_SIZE + 2 * ring.size))
            self.memory.write(ring.used_gpa, bytes(USED_HEADER_SIZE + USED_ELEMENT_SIZE * ring.size))

    def move_to(self, device: VirtioDevice) -> FakeDriver:
        """Snapshot the device and go on with the state restored into ``device``, a fresh one. Returns self."""
        state = self.mmio.save()
        self.device = device
        self.notified.clear()
        self.mmio = self._connect(device)
        self.mmio.restore(state)
        self.mmio.resume()
        return self

    # Requests.

    def ring(self, queue: int | str) -> _Ring:
        """The driver's half of a queue, by index or name."""
        for ring in self.rings:
            if queue in (ring.index, ring.name):
                return ring
        raise KeyError(queue)

    def request(self, queue: int | str, readable: bytes | Iterable[bytes] = b"", writable: int = 0) -> bytes:
        """Offer one chain, notify, and return what the device wrote. Raises LookupError if it did not come back."""
        head = self.add(queue, readable, writable)
        self.notify(queue)
        self.run()
        for used in self.collect(queue):
            if used.head == head:
                return used.data
        raise LookupError(f"the device has not completed chain {head}")

    def add(
        self,
        queue: int | str,
        readable: bytes | Iterable[bytes] = b"",
        writable: int | Iterable[int] = 0,
        *,
        indirect: bool = False,
    ) -> int:
        """Build a chain from readable pieces and writable sizes, and offer it without notifying. Returns the head."""
        pieces = [readable] if isinstance(readable, bytes) else list(readable)
        sizes = [writable] if isinstance(writable, int) else list(writable)
        entries: list[tuple[int, int, int]] = []
        for piece in pieces:
            if piece:
                gpa = self.buffer(len(piece))
                self.memory.write(gpa, piece)
                entries.append((gpa, len(piece), 0))
        entries.extend((self.buffer(size), size, DescFlag.WRITE) for size in sizes if size)
        return self.add_segments(queue, entries, indirect=indirect)

    def add_segments(self, queue: int | str, entries: list[tuple[int, int, int]], *, indirect: bool = False) -> int:
        """Build a chain from ``(gpa, size, flags)`` entries and offer it without notifying. Returns the head."""
        ring = self.ring(queue)
        if indirect:
            table = self.buffer(DESCRIPTOR_SIZE * len(entries))
            indices = [ring.free.pop()]
            self._link(table, list(range(len(entries))), entries)
            self.descriptor(queue, indices[0], table, DESCRIPTOR_SIZE * len(entries), DescFlag.INDIRECT)
        else:
            indices = [ring.free.pop() for _ in entries]
            self._link(ring.desc_gpa, indices, entries)
        ring.chains[indices[0]] = (indices, [(gpa, size) for gpa, size, flags in entries if flags & DescFlag.WRITE])
        self.offer(queue, indices[0])
        return indices[0]

    def _link(self, table_gpa: int, indices: list[int], entries: list[tuple[int, int, int]]) -> None:
        for at, (gpa, size, flags) in enumerate(entries):
            last = at == len(entries) - 1
            record = DESCRIPTOR.pack(
                gpa, size, flags if last else flags | DescFlag.NEXT, 0 if last else indices[at + 1]
            )
            self.memory.write(table_gpa + DESCRIPTOR_SIZE * indices[at], record)

    def buffer(self, size: int, align: int = 16) -> int:
        """Guest memory for a buffer; reused when it runs out. Returns its address."""
        gpa = -(-self._next_buffer // align) * align
        if gpa + size > self.memory.regions[0].end:
            gpa = _BUFFERS
        self._next_buffer = gpa + size
        return gpa

    def descriptor(
        self, queue: int | str, index: int, gpa: int, size: int, flags: int = 0, next_index: int = 0
    ) -> None:
        """Write one raw entry of the queue's descriptor table."""
        ring = self.ring(queue)
        self.memory.write(ring.desc_gpa + DESCRIPTOR_SIZE * index, DESCRIPTOR.pack(gpa, size, flags, next_index))

    def offer(self, queue: int | str, head: int) -> None:
        """Put a raw head into the available ring and step the index."""
        ring = self.ring(queue)
        self.memory.store_u16(ring.avail_gpa + AVAIL_HEADER_SIZE + 2 * (ring.avail_index % ring.size), head)
        ring.avail_index = (ring.avail_index + 1) & 0xFFFF
        self.memory.store_u16(ring.avail_gpa + 2, ring.avail_index)

    def notify(self, queue: int | str) -> None:
        """Write QueueNotify."""
        self.write(MmioReg.QUEUE_NOTIFY, self.ring(queue).index)

    def run(self, rounds: int = 1000) -> int:
        """Serve deferred notifications until none is left, at most ``rounds``. Returns how many were served."""
        served = 0
        while self.notified and served < rounds:
            self.mmio.process(self.notified.pop(0))
            served += 1
        return served

    def collect(self, queue: int | str) -> list[Used]:
        """All chains that came back since the last call, oldest first; their descriptors are free again."""
        ring = self.ring(queue)
        memory = self.memory
        used = []
        while ring.used_index != memory.load_u16(ring.used_gpa + 2):
            slot = ring.used_gpa + USED_HEADER_SIZE + USED_ELEMENT_SIZE * (ring.used_index % ring.size)
            head, written = memory.load_u32(slot), memory.load_u32(slot + 4)
            ring.used_index = (ring.used_index + 1) & 0xFFFF
            indices, segments = ring.chains.pop(head, ([], []))
            ring.free.extend(indices)
            data, left = b"", written
            for gpa, size in segments:
                data += memory.read(gpa, min(size, left))
                left -= min(size, left)
            used.append(Used(head, written, data))
        return used

    def wants_notify(self, queue: int | str) -> bool:
        """Whether the device asks to be notified of new chains."""
        return not self.memory.load_u16(self.ring(queue).used_gpa) & 1

    def suppress_interrupts(self, queue: int | str, suppress: bool = True) -> None:
        """Set or clear the available ring's no-interrupt flag."""
        self.memory.store_u16(self.ring(queue).avail_gpa, int(suppress))

    def close(self) -> None:
        """Reset the device and free the memory."""
        self.reset()
        self.memory.close()

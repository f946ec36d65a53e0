"""A guest's vsock driver for tests and benchmarks: packets in and out through a `FakeDriver`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..devices.vsock import Vsock
from ..memory import GuestMemory
from ..spec.virtio import DescFlag, MmioReg
from ..spec.virtio_vsock import HEADER, HEADER_SIZE, HOST_CID, QUEUE_EVENT, QUEUE_RX, QUEUE_TX, Header, Op, Type
from ..virtio import VirtioDevice, VirtioMmio
from .driver import FakeDriver

_RX_GPA: Final = 0x20_0000
_TX_GPA: Final = 0x10_0000
_TX_ROOM: Final = 0x8_0000


class _Driver(FakeDriver):
    def __init__(self, device: VirtioDevice, memory: GuestMemory, notifier: Callable[[int], None] | None) -> None:
        self._notifier = notifier
        super().__init__(device, memory=memory)

    def _connect(self, device: VirtioDevice) -> VirtioMmio:
        return VirtioMmio(device, self.memory, self.irq, self._notifier)


class FakeVsockGuest:
    """Plays the guest for ``device``: ``start`` brings it up with ``buffers`` receive buffers of ``payload`` bytes.

    `send` puts a packet into the transmit queue, `receive` returns those that came and gives the buffers back. With
    ``notifier`` notifications go there (an I/O thread); otherwise the notifying call serves the queue.
    """

    def __init__(
        self,
        device: Vsock,
        *,
        buffers: int = 64,
        payload: int = 4096,
        notifier: Callable[[int], None] | None = None,
        split_header: bool = False,
    ) -> None:
        self.device = device
        self.memory = GuestMemory.allocate(64 << 20)
        self.driver = _Driver(device, self.memory, notifier)
        self.refill = True
        self.held: list[int] = []
        self._size = HEADER_SIZE + payload
        self._split = split_header
        self._count = buffers
        self._slots: dict[int, int] = {}

    def start(self) -> FakeVsockGuest:
        """Negotiate, set up the queues, and offer the receive buffers. Returns self."""
        self.driver.start()
        self._slots.clear()
        self.held = list(range(self._count))
        if self.refill:
            self.give_back()
        return self

    def give_back(self, count: int | None = None) -> None:
        """Offer receive buffers that are held, all of them unless told, and notify if the device wants that."""
        step = -(-self._size // 4096) * 4096
        given, self.held = (self.held, []) if count is None else (self.held[:count], self.held[count:])
        for slot in given:
            gpa = _RX_GPA + slot * step
            if self._split:
                entries = [
                    (gpa, HEADER_SIZE, DescFlag.WRITE),
                    (gpa + HEADER_SIZE, self._size - HEADER_SIZE, DescFlag.WRITE),
                ]
            else:
                entries = [(gpa, self._size, DescFlag.WRITE)]
            self._slots[self.driver.add_segments(QUEUE_RX, entries)] = slot
        if given and self.driver.wants_notify(QUEUE_RX):
            self.driver.notify(QUEUE_RX)

    def packet(
        self, op: int, guest_port: int, host_port: int, data: bytes = b"", *, notify: bool = True, **changes: int
    ) -> None:
        """Send one packet; ``changes`` replace fields of the header."""
        header = Header(
            src_cid=self.device.cid,
            dst_cid=HOST_CID,
            src_port=guest_port,
            dst_port=host_port,
            size=len(data),
            type=Type.STREAM,
            op=op,
            flags=0,
            buf_alloc=1 << 18,
            fwd_cnt=0,
        )._replace(**changes)
        self.raw([HEADER.pack(*header), data], notify=notify)

    def raw(self, pieces: list[bytes], *, notify: bool = True) -> None:
        """Put any bytes into the transmit queue."""
        self.driver.collect(QUEUE_TX)
        gpa = _TX_GPA + self.driver.ring(QUEUE_TX).avail_index % 2 * _TX_ROOM
        entries = []
        for piece in pieces:
            if piece:
                self.memory.write(gpa, piece)
                entries.append((gpa, len(piece), 0))
                gpa += len(piece)
        self.driver.add_segments(QUEUE_TX, entries)
        if notify and self.driver.wants_notify(QUEUE_TX):
            self.driver.notify(QUEUE_TX)

    def receive(self) -> list[tuple[Header, bytes]]:
        """The packets that came since the last call, oldest first."""
        packets = []
        for used in self.driver.collect(QUEUE_RX):
            self.held.append(self._slots.pop(used.head))
            header = Header(*HEADER.unpack_from(used.data))
            packets.append((header, used.data[HEADER_SIZE:]))
        if self.refill:
            self.give_back()
        return packets

    def ops(self) -> list[int]:
        """The operations of the packets that came since the last call."""
        return [header.op for header, _ in self.receive()]

    def open(self, guest_port: int, host_port: int, buf_alloc: int = 1 << 18) -> Header:
        """Connect to a port of the host. Returns the answer."""
        self.packet(Op.REQUEST, guest_port, host_port, buf_alloc=buf_alloc)
        return self.receive()[-1][0]

    def offer_event(self) -> None:
        """Offer one event buffer."""
        self.driver.add(QUEUE_EVENT, writable=4)
        self.driver.notify(QUEUE_EVENT)

    @property
    def needs_reset(self) -> bool:
        """Whether the device gave up on us."""
        return self.driver.needs_reset

    def reset(self) -> None:
        """Write 0 to the status register."""
        self.driver.write(MmioReg.STATUS, 0)

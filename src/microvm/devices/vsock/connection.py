"""One stream between a port of the guest and a port of the host. [virtio-v1.2] 5.10.6.

Flow control. Each side tells in every packet how large its receive buffer is (``buf_alloc``) and how many bytes have
left it for good (``fwd_cnt``, modulo 2**32); the other side counts what it sent (``tx_cnt``) and may have at most
``buf_alloc - (tx_cnt - fwd_cnt)`` more on the way. Towards the guest that is what keeps its kernel from dropping; in
our direction it is a promise that costs us memory, so a guest that breaks it is reset, never buffered.

Bytes from the guest go straight from its memory to the endpoint. What the endpoint does not take is copied into
``pending`` and offered again when the endpoint asks (`Connection.resume`): that is the only buffer, it is never
larger than the ``buf_alloc`` we gave, and a snapshot finds in it all that the guest believes delivered. Bytes for the
guest are read by the endpoint directly into the guest's receive buffers (`Connection.fill`); nothing is queued here.

Closing. A side that will not send, or not receive, says so with SHUTDOWN, for good. When one side has said both, the
other answers RST and the pair of ports is free again. We answer as soon as the guest has said both, while what it sent
before may still be on its way to the endpoint (`Phase.DRAINING`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from ...spec.virtio_vsock import Op, Shutdown

if TYPE_CHECKING:
    from .device import Vsock

MASK: Final = 0xFFFF_FFFF
FILL_LIMIT: Final = 256 * 1024
"""Bytes one `Connection.fill` moves at most, so that one busy stream leaves room for its neighbours."""

_MAX_WINDOW: Final = 64
"""Receive buffers read into with one system call at most: 256 KiB with Linux's 4 KiB buffers."""


class Phase:
    """Where a connection is in its life."""

    CONNECTING: Final = 0  # the host asked, the guest has not answered
    OPEN: Final = 1
    CLOSING: Final = 2  # we said SHUTDOWN to both directions and wait for RST; nobody listens any more
    DRAINING: Final = 3  # the guest is done; its last bytes are still on their way to the endpoint
    CLOSED: Final = 4


class Endpoint(Protocol):
    """The host's end of a connection. Every method is called with the device's lock held, on whatever thread serves
    the device: the I/O thread, or a vCPU thread for `on_closed` when the driver resets the device.
    """

    def on_connected(self) -> None:
        """The guest accepted the connection the host asked for."""

    def on_data(self, views: list[memoryview]) -> int:
        """Take bytes from the guest, in order; return how many. The views are void after the call.

        Whoever takes fewer than all calls `Connection.resume` when there is room again. The bytes can change under
        the reader: move them, do not parse them here.
        """

    def on_writable(self) -> None:
        """A `Connection.fill` that was blocked may go on."""

    def on_shutdown(self, flags: int) -> None:
        """The guest will no longer do what ``flags`` say (`Shutdown`). All it sent before was taken."""

    def on_closed(self, reset: bool) -> None:
        """The connection is over; the last call.

        ``reset`` says that the guest had not ended its stream: it refused, or bytes may be missing.
        """


@dataclass(slots=True)
class ConnectionState:
    """All that a snapshot must keep of a connection."""

    host_port: int
    guest_port: int
    phase: int
    buf_alloc: int
    fwd_cnt: int = 0  # bytes the endpoint took
    told_fwd_cnt: int = 0  # what the guest last heard of that
    tx_cnt: int = 0  # bytes sent to the guest
    peer_buf_alloc: int = 0
    peer_fwd_cnt: int = 0
    local_shutdown: int = 0
    peer_shutdown: int = 0
    owed: int = 0  # packets to send once there is a receive buffer, as bits 1 << Op
    pending: bytearray = field(default_factory=bytearray)


class Connection:
    """One stream, as its endpoint sees it. All methods want the device's lock: ``with device.batch():``."""

    __slots__ = ("_credit_blocked", "_device", "_told_shutdown", "_window", "endpoint", "state")

    def __init__(self, device: Vsock, state: ConnectionState) -> None:
        self._device = device
        self.state = state
        self.endpoint: Endpoint | None = None
        self._window = 1
        self._credit_blocked = False
        self._told_shutdown = 0

    def __repr__(self) -> str:
        return f"<Connection host port {self.host_port}, guest port {self.guest_port}, phase {self.state.phase}>"

    @property
    def host_port(self) -> int:
        """The port on the host's side."""
        return self.state.host_port

    @property
    def guest_port(self) -> int:
        """The port on the guest's side."""
        return self.state.guest_port

    # For the endpoint.

    @property
    def open(self) -> bool:
        """Whether the guest has agreed and neither side has ended the connection as a whole."""
        return self.state.phase == Phase.OPEN

    @property
    def closed(self) -> bool:
        """Whether nothing is left of it: the ports are free and the endpoint is not called again."""
        return self.state.phase == Phase.CLOSED

    def peer_free(self) -> int:
        """How many bytes the guest would take now. The guest chooses the numbers, so it can come out as anything."""
        state = self.state
        return max(0, state.peer_buf_alloc - ((state.tx_cnt - state.peer_fwd_cnt) & MASK))

    def fill(self, read: Callable[[list[memoryview]], int]) -> bool:
        """Move bytes to the guest: ``read(views)`` fills the guest's receive buffers in order and returns the count.

        ``read`` returns 0 when it has nothing; fewer than asked for ends the call, and so does `FILL_LIMIT`. Returns
        whether the guest can take more: if not, `Endpoint.on_writable` says when, unless the connection ended.
        Raises VirtqueueError for a broken ring, for the batch to contain.
        """
        state = self.state
        device = self._device
        moved = 0
        while moved < FILL_LIMIT:
            if state.phase != Phase.OPEN or state.local_shutdown & Shutdown.SEND:
                return False
            if state.peer_shutdown & Shutdown.RECEIVE:
                return False
            if not device.send_owed():
                device.starve(self)
                return False
            credit = self.peer_free()
            if not credit:
                self._credit_blocked = True
                device.owe(self, Op.CREDIT_REQUEST)
                device.send_owed()
                return False
            asked, count = device.send_data(self, read, credit, self._window)
            if not asked:
                device.starve(self)
                return False
            moved += count
            if count < asked:
                # What comes next is likely to be as long as this was.
                if 2 * count < asked and self._window > 1:
                    self._window //= 2
                return True
            if self._window < _MAX_WINDOW:
                self._window *= 2
        return True

    def send(self, data: bytes | bytearray | memoryview) -> int:
        """Copy as much of ``data`` to the guest as it takes now. Returns how much; `on_writable` says when to go on."""
        rest = memoryview(data)
        size = len(rest)

        def read(views: list[memoryview]) -> int:
            nonlocal rest
            total = 0
            for view in views:
                count = min(len(view), len(rest))
                view[:count] = rest[:count]
                rest = rest[count:]
                total += count
            return total

        while rest and self.fill(read):
            pass
        return size - len(rest)

    def resume(self) -> None:
        """Offer the endpoint what it had not taken. To be called when it has room again."""
        state = self.state
        while state.pending and self.endpoint is not None:
            pending = state.pending
            with memoryview(pending) as view:
                taken = self.endpoint.on_data([view])
            if state.pending is not pending or not taken:
                break  # reset meanwhile, or full
            del pending[:taken]
            self._forwarded(taken)
        self._after_data()
        self._device.send_owed()

    def shutdown(self, flags: int) -> None:
        """Tell the guest that the host will no longer receive or send (`Shutdown`).

        With both said the endpoint is done: it gets no more calls, and bytes it has not taken are dropped. A guest
        should answer with RST; whoever wants to be sure that the connection ends calls `reset` some time later.
        """
        state = self.state
        if state.phase == Phase.CONNECTING:
            self.reset()
            return
        if state.phase == Phase.DRAINING and flags & Shutdown.RECEIVE:
            self._device.forget(self)
        if state.phase != Phase.OPEN or not flags & ~state.local_shutdown:
            return
        state.local_shutdown |= flags & Shutdown.BOTH
        if state.local_shutdown & Shutdown.RECEIVE:
            state.pending = bytearray()
        if state.local_shutdown == Shutdown.BOTH:
            state.phase = Phase.CLOSING
            self.endpoint = None
            self._device.unblock(self)
        self._device.owe(self, Op.SHUTDOWN)
        self._device.send_owed()

    def reset(self) -> None:
        """End the connection at once and tell the guest. The endpoint gets no more calls."""
        state = self.state
        if state.phase == Phase.CLOSED:
            return
        self.endpoint = None
        known_to_guest = state.phase != Phase.DRAINING and not state.owed & (1 << Op.REQUEST)
        self._device.forget(self)
        if known_to_guest:
            self._device.refuse(state.host_port, state.guest_port)
            self._device.send_owed()

    # For the device.

    def receive(self, op: int, flags: int, views: list[memoryview], size: int, buf_alloc: int, fwd_cnt: int) -> None:
        """One packet of the guest for this connection; ``size`` payload bytes, or -1 if the chain holds fewer."""
        state = self.state
        state.peer_buf_alloc = buf_alloc
        state.peer_fwd_cnt = fwd_cnt
        if op == Op.RW:
            self._receive_data(views, size)
        elif op == Op.RST:
            self.abort()
        elif op == Op.SHUTDOWN:
            self._receive_shutdown(flags & Shutdown.BOTH)
        elif op == Op.CREDIT_REQUEST:
            if state.phase == Phase.OPEN:
                self._device.owe(self, Op.CREDIT_UPDATE)
        elif op == Op.RESPONSE:
            if state.phase != Phase.CONNECTING or state.owed & (1 << Op.REQUEST):
                self.violated()
                return
            state.phase = Phase.OPEN
            if self.endpoint is not None:
                self.endpoint.on_connected()
        elif op != Op.CREDIT_UPDATE:
            # A REQUEST for ports in use means that the guest has lost track; the rest means nothing at all.
            self.violated()
        if self._credit_blocked and self.peer_free():
            self._credit_blocked = False
            if self.endpoint is not None:
                self.endpoint.on_writable()

    def abort(self) -> None:
        """The guest has ended the connection, or is itself gone. Bytes from before an orderly end are delivered."""
        state = self.state
        if state.pending and state.peer_shutdown & Shutdown.SEND and self.endpoint is not None:
            self._device.drain(self)
            return
        endpoint, self.endpoint = self.endpoint, None
        whole = bool(state.peer_shutdown & Shutdown.SEND)
        self._device.forget(self)
        if endpoint is not None:
            endpoint.on_closed(reset=not whole)

    def violated(self) -> None:
        """The guest broke the protocol on this connection: end it on both sides."""
        endpoint = self.endpoint
        self._device.violations += 1
        self.reset()
        if endpoint is not None:
            endpoint.on_closed(reset=True)

    def _receive_data(self, views: list[memoryview], size: int) -> None:
        state = self.state
        if state.phase == Phase.CLOSING:
            return  # sent before the guest read our SHUTDOWN
        if size < 0 or state.phase != Phase.OPEN or state.peer_shutdown & Shutdown.SEND:
            self.violated()
            return
        if state.local_shutdown & Shutdown.RECEIVE:
            self._forwarded(size)
            return
        pending = state.pending
        if len(pending) + size > state.buf_alloc:
            # The credit we gave is the memory we spend; a guest that ignores it would choose how much that is.
            self.violated()
            return
        endpoint = self.endpoint
        if not size or endpoint is None:
            return
        taken = 0
        if not pending:
            taken = endpoint.on_data(views)
            if state.phase != Phase.OPEN or self.endpoint is None:
                return
            self._forwarded(taken)
        if taken < size:
            pending = state.pending
            for view in views:
                if taken >= len(view):
                    taken -= len(view)
                else:
                    pending += view[taken:]
                    taken = 0

    def _forwarded(self, count: int) -> None:
        state = self.state
        state.fwd_cnt = (state.fwd_cnt + count) & MASK
        # Half the window keeps a steady sender going; each update costs the guest a buffer and an interrupt.
        if (state.fwd_cnt - state.told_fwd_cnt) & MASK >= state.buf_alloc // 2 and state.phase == Phase.OPEN:
            self._device.owe(self, Op.CREDIT_UPDATE)

    def _receive_shutdown(self, flags: int) -> None:
        state = self.state
        if state.phase == Phase.CONNECTING:
            self.violated()
            return
        state.peer_shutdown |= flags
        if state.peer_shutdown == Shutdown.BOTH:
            # The answer that frees the ports. It does not wait for the endpoint: the bytes are ours by now.
            self._device.refuse(state.host_port, state.guest_port)
            self.abort()
            return
        self._after_data()

    def _after_data(self) -> None:
        """Tell the endpoint of a shutdown once what came before it has been taken."""
        state = self.state
        if state.phase == Phase.DRAINING:
            if not state.pending:
                self.abort()
            return
        news = state.peer_shutdown & ~self._told_shutdown
        if state.pending:
            news &= ~Shutdown.SEND
        if news and self.endpoint is not None:
            self._told_shutdown |= news
            self.endpoint.on_shutdown(news)

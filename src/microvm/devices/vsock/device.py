"""The socket device: packets in and out, and which connection they belong to. [virtio-v1.2] 5.10.

Memory is bounded whatever the guest does. Connections are capped, and so is what each may have buffered. Packets owed
to the guest while it offers no receive buffers are bits of a connection, so there is at most one of each kind; RSTs
for ports that have no connection are a set, capped as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import astuple, fields
from typing import Any, Final

from ...errors import ConfigError, GuestError, SnapshotError, StateError, VirtqueueError
from ...spec.virtio import DeviceId
from ...spec.virtio_vsock import (
    CID_ANY,
    CONFIG,
    EVENT,
    EVENT_TRANSPORT_RESET,
    F_STREAM,
    FIRST_GUEST_CID,
    HEADER,
    HEADER_SIZE,
    HOST_CID,
    MAX_PORT,
    QUEUE_EVENT,
    QUEUE_RX,
    Op,
    Shutdown,
    Type,
)
from ...virtio import Chain, QueueSpec, VirtioDevice
from .connection import MASK, Connection, ConnectionState, Endpoint, Phase

MAX_CONNECTIONS: Final = 1024
"""Connections the guest may have opened at one time, those that drain included; the host may open as many again."""

MAX_REFUSALS: Final = 2048
"""RSTs owed for ports without a connection. Beyond it they are dropped: the guest's connect times out instead."""

BUF_ALLOC: Final = 256 * 1024
SMALL_BUF_ALLOC: Final = 16 * 1024
LARGE_BUFFERS: Final = 32 << 20
"""Receive buffer given to a connection, and the sum from which on it is the small one: a guest that opens all it can
and sends all it may, to hosts that read nothing, costs 64 MiB."""

FIRST_HOST_PORT: Final = 0xC000_0000
"""The host's end of connections it opens gets a port from here on; guests cannot connect to these."""

_ORDER: Final = (Op.REQUEST, Op.RESPONSE, Op.CREDIT_REQUEST, Op.SHUTDOWN, Op.CREDIT_UPDATE)
_OWABLE: Final = sum(1 << op for op in _ORDER)
_CREDIT_UPDATE: Final = 1 << Op.CREDIT_UPDATE


class _RxBuffer:
    """A receive buffer of the guest: room for one header, and views for the payload."""

    __slots__ = ("chain", "header", "room", "views")

    def __init__(self, chain: Chain) -> None:
        if chain.writable_bytes <= HEADER_SIZE:
            raise VirtqueueError(f"a receive buffer of {chain.writable_bytes} bytes, which holds no data")
        self.chain = chain
        self.room = chain.writable_bytes - HEADER_SIZE
        self.header: memoryview | None = None
        views = chain.writable_views()
        first = views[0]
        if len(first) == HEADER_SIZE:
            self.header = first
            self.views = views[1:]
        elif len(first) > HEADER_SIZE:
            self.header = first[:HEADER_SIZE]
            views[0] = first[HEADER_SIZE:]
            self.views = views
        else:
            self.views = chain.writable_views(HEADER_SIZE)

    def put_header(self, header: bytes) -> None:
        if self.header is not None:
            self.header[:] = header
        else:
            self.chain.write_at(0, header)


class Vsock(VirtioDevice):
    """A socket device for the guest with context id ``cid``.

    ``accept(connection)`` decides on a connection the guest asks for, by ``connection.host_port``: it returns the
    host's end, or None to refuse. ``adopt(connection)`` does the same for connections found in a snapshot; without it
    they are reset. Both run with the device's lock held. Raises ConfigError for a reserved ``cid``.
    """

    device_id = DeviceId.VSOCK
    queues = (QueueSpec("rx", 256), QueueSpec("tx", 256), QueueSpec("event", 16))
    device_features = F_STREAM

    def __init__(
        self,
        cid: int = FIRST_GUEST_CID,
        accept: Callable[[Connection], Endpoint | None] | None = None,
        adopt: Callable[[Connection], Endpoint | None] | None = None,
    ) -> None:
        super().__init__()
        if not FIRST_GUEST_CID <= cid < CID_ANY:
            raise ConfigError("vsock cid", cid, "a number from 3 to 4294967294")
        self.cid = cid
        self.config = CONFIG.pack(cid)
        self.accept = accept
        self.adopt = adopt
        self.dropped = 0
        self.violations = 0
        self._connections: dict[int, Connection] = {}
        self._draining: set[Connection] = set()
        self._guest_opened = 0
        self._allocated = 0
        self._next_host_port = FIRST_HOST_PORT
        self._buffers: deque[_RxBuffer] = deque()
        self._owed: dict[Connection, None] = {}
        self._refusals: dict[tuple[int, int, int, int], None] = {}
        self._starved: dict[Connection, None] = {}
        self._event_owed = False

    # For the host.

    @property
    def connections(self) -> list[Connection]:
        """All there are, those that drain included. With the lock held."""
        return [*self._connections.values(), *self._draining]

    def connect(self, guest_port: int, endpoint: Endpoint) -> Connection:
        """Ask the guest for a connection to ``guest_port``; the endpoint hears `on_connected` or `on_closed`.

        Before the driver is up the request waits for it. Any thread. Raises ConfigError for a port that cannot be,
        StateError if the host has too many connections.
        """
        if not 0 <= guest_port <= MAX_PORT:
            raise ConfigError("vsock port", guest_port, "a number from 0 to 4294967294")
        with self.lock:
            if len(self._connections) - self._guest_opened >= MAX_CONNECTIONS:
                raise StateError(f"{MAX_CONNECTIONS} connections to the guest are open already")
            port = self._next_host_port
            while port << 32 | guest_port in self._connections:
                port = port + 1 if port < MAX_PORT else FIRST_HOST_PORT
            self._next_host_port = port + 1 if port < MAX_PORT else FIRST_HOST_PORT
            connection = self._add(port, guest_port, Phase.CONNECTING)
            connection.endpoint = endpoint
            with self.batch():
                self.owe(connection, Op.REQUEST)
                self.send_owed()
        return connection

    def transport_reset(self) -> None:
        """End every connection and have the driver drop its own and read its context id again. Any thread.

        What a machine does that was restored as a copy. [virtio-v1.2] 5.10.6.7.
        """
        with self.batch():
            self._end_all()
            self._event_owed = True
            self.fill_event()

    # Queues.

    def on_tx(self, chain: Chain) -> int:
        """A packet from the guest."""
        # One fetch: from here on only the copy counts, whatever the guest does to its memory.
        src_cid, dst_cid, src_port, dst_port, size, kind, op, flags, buf_alloc, fwd_cnt = chain.unpack(HEADER)
        if src_cid != self.cid:
            self.dropped += 1  # not its name: an answer would go to somebody who asked nothing
            return 0
        connection = None
        if kind == Type.STREAM and dst_cid == HOST_CID:
            connection = self._connections.get(dst_port << 32 | src_port)
            if connection is None and op == Op.REQUEST:
                self._accept(dst_port, src_port, buf_alloc, fwd_cnt)
                self.send_owed()
                return 0
        if connection is not None:
            views: list[memoryview] = []
            if op == Op.RW:
                if size > chain.readable_bytes - HEADER_SIZE:
                    size = -1
                elif size <= connection.state.buf_alloc:
                    views = chain.readable_views(HEADER_SIZE, size)
            connection.receive(op, flags, views, size, buf_alloc, fwd_cnt)
        elif op != Op.RST:
            # An RST is never answered: two ends that disagree would do nothing else.
            self.refuse(dst_port, src_port, dst_cid, kind)
        self.send_owed()
        return 0

    def fill_rx(self) -> None:
        """The driver has added receive buffers."""
        if not self.send_owed():
            return
        for connection in list(self._starved):
            if not self._has_buffer():
                return
            if connection in self._starved:
                del self._starved[connection]
                if connection.endpoint is not None:
                    connection.endpoint.on_writable()

    def fill_event(self) -> None:
        """The driver has added event buffers."""
        if self._event_owed:
            chain = self.pop(QUEUE_EVENT)
            if chain is not None:
                self._event_owed = False
                self.complete(chain, chain.write(EVENT.pack(EVENT_TRANSPORT_RESET)))

    def on_activate(self) -> None:
        """The driver is up: connections that were asked for early can be made."""
        self.send_owed()
        self.fill_event()

    def on_reset(self) -> None:
        """The driver starts over, and with it everything it knew."""
        self._buffers.clear()
        self._refusals.clear()
        self._event_owed = False
        self._end_all()

    def fail(self, error: GuestError) -> None:
        """The device is inert until the driver resets it, so no stream goes on: the host's ends hear of it now."""
        super().fail(error)
        self._buffers.clear()
        self._end_all()

    # For connections.

    def owe(self, connection: Connection, op: int) -> None:
        """Note a packet without payload, to be sent by `send_owed`. A second one of the same kind changes nothing."""
        connection.state.owed |= 1 << op
        self._owed[connection] = None

    def refuse(self, host_port: int, guest_port: int, host_cid: int = HOST_CID, kind: int = Type.STREAM) -> None:
        """Note an RST for a pair of ports that has no connection (any more)."""
        if len(self._refusals) >= MAX_REFUSALS:
            # Happens only to a guest that sends packets and offers no buffers for the answers.
            self.dropped += 1
            return
        self._refusals[host_cid, host_port, guest_port, kind] = None

    def send_owed(self) -> bool:
        """Send what is owed, as far as the guest has receive buffers. Returns whether nothing is left.

        Raises VirtqueueError for a broken ring, for the batch to contain.
        """
        refusals, owed = self._refusals, self._owed
        if not owed and not refusals:
            return True
        while refusals:
            # First, so that a pair of ports is over in the guest before it is used again.
            if not self._has_buffer():
                return False
            key = next(iter(refusals))
            del refusals[key]
            cid, host_port, guest_port, kind = key
            buffer = self._buffers.popleft()
            buffer.put_header(HEADER.pack(cid, self.cid, host_port, guest_port, 0, kind, Op.RST, 0, 0, 0))
            self.complete(buffer.chain, HEADER_SIZE)
        while owed:
            connection = next(iter(owed))
            state = connection.state
            for op in _ORDER:
                if state.owed & (1 << op):
                    if not self._has_buffer():
                        return False
                    state.owed &= ~(1 << op)
                    flags = state.local_shutdown if op == Op.SHUTDOWN else 0
                    buffer = self._buffers.popleft()
                    buffer.put_header(self._header(state, op, 0, flags))
                    self.complete(buffer.chain, HEADER_SIZE)
            del owed[connection]
        return True

    def send_data(
        self, connection: Connection, read: Callable[[list[memoryview]], int], credit: int, window: int
    ) -> tuple[int, int]:
        """Have ``read`` fill up to ``window`` receive buffers with up to ``credit`` bytes, and send them.

        Returns how much was asked for (0: no buffer is there) and how much came.
        """
        buffers = self._buffers
        while len(buffers) < window:
            chain = self.pop(QUEUE_RX)
            if chain is None:
                break
            buffers.append(_RxBuffer(chain))
        views: list[memoryview] = []
        asked = 0
        for index, buffer in enumerate(buffers):
            if index == window or asked == credit:
                break
            room = buffer.room
            if asked + room <= credit:
                views += buffer.views
                asked += room
            else:
                views += buffer.chain.writable_views(HEADER_SIZE, credit - asked)
                asked = credit
        if not asked:
            return 0, 0
        left = count = read(views)
        state = connection.state
        while left > 0:
            buffer = buffers.popleft()
            size = min(buffer.room, left)
            left -= size
            buffer.put_header(self._header(state, Op.RW, size, 0))
            state.tx_cnt = (state.tx_cnt + size) & MASK
            self.complete(buffer.chain, HEADER_SIZE + size)
        return asked, count

    def starve(self, connection: Connection) -> None:
        """Tell this connection's endpoint when there are receive buffers again."""
        self._starved[connection] = None

    def unblock(self, connection: Connection) -> None:
        """No longer tell this connection's endpoint anything about receive buffers."""
        self._starved.pop(connection, None)

    def forget(self, connection: Connection) -> None:
        """Take a connection out of the books. Idempotent."""
        state = connection.state
        if state.phase == Phase.CLOSED:
            return
        self._detach(connection)
        self._draining.discard(connection)
        self._allocated -= state.buf_alloc
        if state.host_port < FIRST_HOST_PORT:
            self._guest_opened -= 1
        state.phase = Phase.CLOSED
        state.pending = bytearray()

    def drain(self, connection: Connection) -> None:
        """Free the ports, but keep the connection until its endpoint has taken what is pending."""
        self._detach(connection)
        connection.state.phase = Phase.DRAINING
        self._draining.add(connection)

    def _detach(self, connection: Connection) -> None:
        state = connection.state
        key = state.host_port << 32 | state.guest_port
        if self._connections.get(key) is connection:
            del self._connections[key]
        state.owed = 0
        self._owed.pop(connection, None)
        self._starved.pop(connection, None)

    def _has_buffer(self) -> bool:
        if self._buffers:
            return True
        chain = self.pop(QUEUE_RX)
        if chain is None:
            return False
        self._buffers.append(_RxBuffer(chain))
        return True

    def _header(self, state: ConnectionState, op: int, size: int, flags: int) -> bytes:
        # Every packet carries the credit, which makes an update that is still owed unnecessary.
        state.owed &= ~_CREDIT_UPDATE
        state.told_fwd_cnt = fwd_cnt = state.fwd_cnt
        return HEADER.pack(
            HOST_CID,
            self.cid,
            state.host_port,
            state.guest_port,
            size,
            Type.STREAM,
            op,
            flags,
            state.buf_alloc,
            fwd_cnt,
        )

    def _add(self, host_port: int, guest_port: int, phase: int) -> Connection:
        size = BUF_ALLOC if self._allocated + BUF_ALLOC <= LARGE_BUFFERS else SMALL_BUF_ALLOC
        return self._enter(ConnectionState(host_port, guest_port, phase, size))

    def _enter(self, state: ConnectionState) -> Connection:
        connection = Connection(self, state)
        self._connections[state.host_port << 32 | state.guest_port] = connection
        self._allocated += state.buf_alloc
        if state.host_port < FIRST_HOST_PORT:
            self._guest_opened += 1
        return connection

    def _accept(self, host_port: int, guest_port: int, buf_alloc: int, fwd_cnt: int) -> None:
        # The host's own ports are no services; keeping the guest out also tells by the port who opened a connection.
        if self.accept is None or host_port >= FIRST_HOST_PORT or self._guest_opened >= MAX_CONNECTIONS:
            self.refuse(host_port, guest_port)
            return
        connection = self._add(host_port, guest_port, Phase.OPEN)
        connection.state.peer_buf_alloc = buf_alloc
        connection.state.peer_fwd_cnt = fwd_cnt
        self.owe(connection, Op.RESPONSE)
        endpoint = self.accept(connection)
        if endpoint is None:
            self.forget(connection)
            self.refuse(host_port, guest_port)
        else:
            connection.endpoint = endpoint

    def _end_all(self) -> None:
        for connection in list(self._connections.values()):
            # A request that no driver has seen yet is still good: a kernel that boots begins with a reset.
            if not connection.state.owed & (1 << Op.REQUEST):
                connection.abort()

    # Snapshots.

    def save_state(self) -> dict[str, Any]:
        return {
            "cid": self.cid,
            "next_host_port": self._next_host_port,
            "event_owed": self._event_owed,
            "refusals": [list(key) for key in self._refusals],
            "connections": [
                [bytes(value) if isinstance(value, bytearray) else value for value in astuple(connection.state)]
                for connection in self.connections
            ],
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        try:
            same_cid = _number(state["cid"]) == self.cid
            self._next_host_port = max(FIRST_HOST_PORT, min(_number(state["next_host_port"]), MAX_PORT))
            self._event_owed = bool(state["event_owed"]) or not same_cid
            for cid, host_port, guest_port, kind in state["refusals"][:MAX_REFUSALS]:
                key = (_number(cid, 64), _number(host_port), _number(guest_port), _number(kind, 16))
                self._refusals[key] = None
            if len(state["connections"]) > 3 * MAX_CONNECTIONS:
                raise ValueError("too many connections")
            states = [_connection_state(values) for values in state["connections"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SnapshotError(f"the saved state of the socket device is damaged: {error}") from error
        for saved in states:
            self._restore_connection(saved, same_cid)

    def _restore_connection(self, state: ConnectionState, same_cid: bool) -> None:
        phase = state.phase
        if phase == Phase.CLOSED or state.host_port << 32 | state.guest_port in self._connections:
            return
        connection = self._enter(state)
        if phase == Phase.DRAINING:
            self.drain(connection)
        if phase != Phase.CLOSING:
            connection.endpoint = self.adopt(connection) if self.adopt is not None and same_cid else None
            if connection.endpoint is None:
                if same_cid:
                    connection.reset()
                else:
                    self.forget(connection)
                return
        if state.owed:
            self._owed[connection] = None


def _number(value: object, bits: int = 32) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise ValueError(f"{value!r} is not a number of {bits} bits")
    return value


def _connection_state(values: list[Any]) -> ConnectionState:
    *numbers, pending = values
    if len(values) != len(fields(ConnectionState)) or not isinstance(pending, bytes):
        raise ValueError("a connection has other fields")
    for number in numbers:
        _number(number)
    state = ConnectionState(*numbers)
    state.pending = bytearray(pending)
    if state.phase > Phase.CLOSED or state.buf_alloc > BUF_ALLOC or len(pending) > state.buf_alloc:
        raise ValueError("a connection is in no possible state")
    if state.owed & ~_OWABLE or (state.local_shutdown | state.peer_shutdown) & ~Shutdown.BOTH:
        raise ValueError("a connection owes packets that do not exist")
    return state

"""A hostile guest against the socket device: any packets, in any order, with any answers of the host's end."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microvm.devices.vsock import Connection, Endpoint, Phase, Vsock
from microvm.devices.vsock.device import BUF_ALLOC, LARGE_BUFFERS, MAX_REFUSALS, SMALL_BUF_ALLOC
from microvm.spec.virtio_vsock import HEADER_SIZE, HOST_CID, Op, Shutdown
from microvm.testing.vsock import FakeVsockGuest

PORTS = st.integers(0, 2)
COUNTS = st.sampled_from([0, 1, 100, 5000, 1 << 18, 0x7FFF_FFFF, 0xFFFF_FFFF]) | st.integers(0, 0xFFFF_FFFF)
OPS = st.sampled_from([Op.REQUEST, Op.RESPONSE, Op.RST, Op.SHUTDOWN, Op.RW, Op.RW, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST])
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "size": COUNTS,
        "type": st.integers(0, 3),
        "flags": st.integers(0, 0xFFFF_FFFF),
        "buf_alloc": COUNTS,
        "fwd_cnt": COUNTS,
        "src_cid": st.sampled_from([0, 2, 3, 4, 1 << 32, (1 << 64) - 1]),
        "dst_cid": st.sampled_from([0, 2, 3, (1 << 64) - 1]),
        "dst_port": st.sampled_from([0, 5, 0xC000_0000, 0xC000_0001, 0xFFFF_FFFF]),
    },
)
PACKETS = st.tuples(st.just("packet"), OPS | st.integers(0, 0xFFFF), PORTS, st.binary(max_size=64), CHANGES)
STEPS = (
    PACKETS
    | PACKETS
    | st.tuples(st.just("raw"), st.lists(st.binary(max_size=60), min_size=1, max_size=3))
    | st.tuples(st.just("bulk"), PORTS, st.integers(1, 5))
    | st.tuples(
        st.just("host"), st.sampled_from(["send", "resume", "reset", "half", "full", "room"]), st.integers(0, 9)
    )
    | st.tuples(st.just("connect"), PORTS)
    | st.tuples(st.just("receive"), st.booleans())
    | st.tuples(st.just("reset"))
)


class Peer:
    """Takes what it has room for and remembers how often it was told that all is over."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.closed = 0
        self.connection: Connection | None = None

    def on_connected(self) -> None:
        assert not self.closed

    def on_data(self, views: list[memoryview]) -> int:
        assert not self.closed
        taken = min(self.room, sum(map(len, views)))
        self.room -= taken
        return taken

    def on_writable(self) -> None:
        assert not self.closed
        assert self.connection is not None
        self.connection.send(b"again")

    def on_shutdown(self, flags: int) -> None:
        assert not self.closed
        assert flags

    def on_closed(self, reset: bool) -> None:
        self.closed += 1
        assert self.closed == 1


class World:
    def __init__(self, buffers: int, room: int) -> None:
        self.room = room
        self.peers: list[Peer] = []
        self.device = Vsock(accept=self.accept)
        self.guest = FakeVsockGuest(self.device, buffers=buffers, payload=512).start()

    def accept(self, connection: Connection) -> Endpoint | None:
        if connection.host_port == 5:
            return None
        return self.peer(connection)

    def peer(self, connection: Connection | None = None) -> Peer:
        peer = Peer(self.room)
        peer.connection = connection
        self.peers.append(peer)
        return peer

    def step(self, step: tuple[object, ...]) -> None:
        guest = self.guest
        match step:
            case ("packet", int(op), int(port), bytes(data), dict(changes)):
                guest.packet(op, port, 0, data, **changes)
            case ("raw", list(pieces)):
                if any(pieces):
                    guest.raw(pieces)
            case ("bulk", int(port), int(count)):
                for _ in range(count):
                    guest.packet(Op.RW, port, 0, bytes(65536))
            case ("connect", int(port)):
                peer = self.peer()
                peer.connection = self.device.connect(port, peer)
            case ("receive", bool(refill)):
                guest.refill = refill
                guest.receive()
            case ("reset",):
                guest.start()
            case ("host", str(what), int(which)):
                if self.peers:
                    self.host(what, self.peers[which % len(self.peers)])

    def host(self, what: str, peer: Peer) -> None:
        connection = peer.connection
        assert connection is not None
        with self.device.batch():
            if what == "send":
                before, free = connection.state.tx_cnt, connection.peer_free()
                sent = connection.send(bytes(3000))
                assert sent <= free
                assert (connection.state.tx_cnt - before) & 0xFFFF_FFFF == sent
            elif what == "resume":
                connection.resume()
            elif what == "reset":
                connection.reset()
            elif what == "half":
                connection.shutdown(Shutdown.SEND)
            elif what == "full":
                connection.shutdown(Shutdown.BOTH)
            else:
                peer.room += 1000

    def check(self) -> None:
        device = self.device
        buffers = 0
        for connection in device.connections:
            state = connection.state
            assert state.phase != Phase.CLOSED
            assert len(state.pending) <= state.buf_alloc
            buffers += state.buf_alloc
        assert buffers <= LARGE_BUFFERS + len(device.connections) * SMALL_BUF_ALLOC
        assert buffers == device._allocated
        assert device._guest_opened == sum(c.host_port < 0xC000_0000 for c in device.connections)
        assert len(device._refusals) <= MAX_REFUSALS
        for book in (device._owed, device._starved):
            assert set(book) <= set(device.connections)
        for peer in self.peers:
            assert peer.connection is not None
            if peer.closed:
                assert peer.connection.closed
        for header, data in self.guest.receive():
            assert header.src_cid != 3
            assert header.dst_cid == 3
            assert header.size == len(data)
            assert header.op == Op.RST or header.src_cid == HOST_CID


@given(
    st.lists(STEPS, max_size=40),
    st.sampled_from([1, 3, 40]),
    st.sampled_from([0, 50, BUF_ALLOC // 2, 1 << 40]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_guest_breaks_the_device(steps: list[tuple[object, ...]], buffers: int, room: int) -> None:
    world = World(buffers, room)
    for step in [("packet", Op.REQUEST, 0, b"", {}), *steps]:
        world.step(step)
        world.check()
    # Whatever happened: after a reset a new guest is served.
    world.guest.refill = True
    world.guest.start()
    assert Op.RST not in world.guest.ops()
    assert world.guest.open(9, 9).op == Op.RESPONSE


@given(
    st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=30),
    st.lists(st.integers(0, 400), min_size=1, max_size=30),
    st.lists(st.integers(1, 2000), min_size=1, max_size=30),
    st.integers(HEADER_SIZE + 1, 700),
    st.integers(0, 0xFFFF_FFFF),
)
@settings(max_examples=60, deadline=None)
def test_streams_keep_their_bytes_and_their_order(
    pieces: list[bytes], rooms: list[int], windows: list[int], payload: int, counter: int
) -> None:
    got: list[bytes] = []

    class Slow(Peer):
        def on_data(self, views: list[memoryview]) -> int:
            data = b"".join(views)[: self.room]
            self.room -= len(data)
            got.append(data)
            return len(data)

        def on_writable(self) -> None:
            pass

    peer = Slow(0)

    def accept(connection: Connection) -> Endpoint:
        peer.connection = connection
        return peer

    guest = FakeVsockGuest(Vsock(accept=accept), buffers=4, payload=payload).start()
    guest.open(1, 1)
    connection = peer.connection
    assert connection is not None
    state = connection.state
    state.tx_cnt = state.fwd_cnt = state.told_fwd_cnt = counter  # somewhere on the way round 2**32
    stream = b"".join(pieces)
    back = b""
    sent = step = 0
    while len(b"".join(got)) < len(stream) or len(back) < len(stream):
        if step < len(pieces):
            guest.packet(Op.RW, 1, 1, pieces[step], buf_alloc=0)
        peer.room += rooms[step % len(rooms)] if step < len(pieces) else 1 << 20
        connection.resume()
        window = windows[step % len(windows)]
        received = (counter + len(back)) & 0xFFFF_FFFF
        guest.packet(Op.CREDIT_UPDATE, 1, 1, buf_alloc=window, fwd_cnt=received)
        sent += connection.send(stream[sent:])
        assert sent - len(back) <= window
        for header, data in guest.receive():
            if header.op == Op.RW:
                back += data
        step += 1
    assert b"".join(got) == stream == back

"""The socket device, driven through its rings by a guest that may be anything."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from microvm.devices.vsock import FIRST_HOST_PORT, Connection, Endpoint, Vsock
from microvm.devices.vsock import device as vsock_device
from microvm.devices.vsock.connection import FILL_LIMIT
from microvm.devices.vsock.device import BUF_ALLOC, LARGE_BUFFERS, MAX_CONNECTIONS, MAX_REFUSALS, SMALL_BUF_ALLOC
from microvm.errors import ConfigError, SnapshotError, StateError
from microvm.spec.virtio_vsock import HEADER, HEADER_SIZE, HOST_CID, QUEUE_RX, Header, Op, Shutdown, Type
from microvm.testing.vsock import FakeVsockGuest

GUEST = 1000  # ports
HOST = 5000


class Peer:
    """An endpoint that keeps everything, and takes no more than ``room`` bytes."""

    def __init__(self, room: int = 1 << 40) -> None:
        self.room = room
        self.connection: Connection | None = None
        self.got = b""
        self.events: list[object] = []
        self.on_write: Callable[[], None] | None = None

    @property
    def conn(self) -> Connection:
        assert self.connection is not None
        return self.connection

    def on_connected(self) -> None:
        self.events.append("connected")

    def on_data(self, views: list[memoryview]) -> int:
        data = b"".join(views)[: self.room]
        self.room -= len(data)
        self.got += data
        return len(data)

    def on_writable(self) -> None:
        self.events.append("writable")
        if self.on_write is not None:
            self.on_write()

    def on_shutdown(self, flags: int) -> None:
        self.events.append(("shutdown", flags))

    def on_closed(self, reset: bool) -> None:
        self.events.append(("closed", reset))


class World:
    """A device, its guest, and a peer for each connection the guest makes."""

    def __init__(self, room: int = 1 << 40, **guest: int | bool) -> None:
        self.room = room
        self.peers: list[Peer] = []
        self.device = Vsock(accept=self.accept)
        self.guest = FakeVsockGuest(self.device, **guest).start()  # type: ignore[arg-type]

    def accept(self, connection: Connection) -> Endpoint | None:
        if connection.host_port != HOST:
            return None
        peer = Peer(self.room)
        peer.connection = connection
        self.peers.append(peer)
        return peer

    def open(self, buf_alloc: int = 1 << 18, guest_port: int = GUEST) -> Peer:
        assert self.guest.open(guest_port, HOST, buf_alloc).op == Op.RESPONSE
        return self.peers[-1]

    def connect(self, port: int = 7) -> Peer:
        peer = Peer()
        peer.connection = self.device.connect(port, peer)
        return peer


def test_identity_and_configuration() -> None:
    guest = FakeVsockGuest(Vsock(42)).start()
    assert guest.device.device_id == 19
    assert guest.driver.config(0, 4) == 42
    assert guest.driver.config(4, 4) == 0
    for reserved in (0, 1, 2, 0xFFFF_FFFF, 1 << 32, -1):
        with pytest.raises(ConfigError):
            Vsock(reserved)


def test_guest_connects_sends_and_receives() -> None:
    world = World()
    answer = world.guest.open(GUEST, HOST)
    assert (answer.op, answer.src_cid, answer.dst_cid) == (Op.RESPONSE, HOST_CID, 3)
    assert (answer.src_port, answer.dst_port, answer.type) == (HOST, GUEST, Type.STREAM)
    assert answer.buf_alloc == BUF_ALLOC
    peer = world.peers[0]
    world.guest.packet(Op.RW, GUEST, HOST, b"hello")
    assert peer.got == b"hello"
    assert peer.conn.send(b"world") == 5
    (header, data) = world.guest.receive()[0]
    assert (header.op, header.size, data) == (Op.RW, 5, b"world")
    assert header.fwd_cnt == 5


@pytest.mark.parametrize("split", [False, True])
def test_long_stream_to_the_guest_arrives_in_order(split: bool) -> None:
    world = World(split_header=split)
    peer = world.open(buf_alloc=1 << 20)
    stream = bytes(range(256)) * 2000
    sent, got, total = 0, b"", 0
    while len(got) < len(stream):
        sent += peer.conn.send(stream[sent:])
        for header, data in world.guest.receive():
            assert header.op == Op.RW
            assert header.size == len(data)
            got += data
        total += 1
        world.guest.packet(Op.CREDIT_UPDATE, GUEST, HOST, buf_alloc=1 << 20, fwd_cnt=len(got))
    assert got == stream
    assert total < 100


def test_refused_by_nobody_listening_and_by_ports_of_the_host() -> None:
    world = World()
    assert world.guest.open(GUEST, 1).op == Op.RST
    world.device.accept = lambda connection: Peer()
    assert world.guest.open(GUEST, FIRST_HOST_PORT).op == Op.RST
    assert not world.device.connections
    world.device.accept = None
    assert world.guest.open(GUEST, HOST).op == Op.RST


def test_host_connects_and_is_accepted_or_refused() -> None:
    world = World()
    peer = world.connect(7)
    (request, _) = world.guest.receive()[0]
    assert (request.op, request.dst_port, request.src_port) == (Op.REQUEST, 7, peer.conn.host_port)
    assert peer.conn.send(b"early") == 0
    world.guest.packet(Op.RESPONSE, 7, request.src_port)
    assert peer.events == ["connected"]
    assert peer.conn.send(b"data") == 4
    other = world.connect(8)
    world.guest.packet(Op.RST, 8, other.conn.host_port)
    assert other.events == [("closed", True)]
    assert other.conn.closed
    with pytest.raises(ConfigError):
        world.connect(1 << 32)


def test_request_waits_for_the_driver_and_survives_its_first_reset() -> None:
    device = Vsock()
    peer = Peer()
    device.connect(7, peer)
    guest = FakeVsockGuest(device).start()
    assert guest.ops() == [Op.REQUEST]
    assert peer.events == []


def test_what_the_endpoint_does_not_take_is_kept_and_offered_again_in_order() -> None:
    world = World(room=3)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"abcdef")
    world.guest.packet(Op.RW, GUEST, HOST, b"ghi")
    assert (peer.got, bytes(peer.conn.state.pending)) == (b"abc", b"defghi")
    peer.room = 4
    peer.conn.resume()
    assert (peer.got, bytes(peer.conn.state.pending)) == (b"abcdefg", b"hi")
    peer.room = 100
    peer.conn.resume()
    world.guest.packet(Op.RW, GUEST, HOST, b"jk")
    assert peer.got == b"abcdefghijk"


def test_guest_that_sends_more_than_its_credit_is_reset() -> None:
    world = World(room=0)
    peer = world.open()
    for _ in range(BUF_ALLOC // 65536):
        world.guest.packet(Op.RW, GUEST, HOST, bytes(65536))
    assert len(peer.conn.state.pending) == BUF_ALLOC
    world.guest.receive()
    world.guest.packet(Op.RW, GUEST, HOST, b"x")
    assert peer.events == [("closed", True)]
    assert world.guest.ops() == [Op.RST]
    assert not world.device.connections
    assert not peer.conn.state.pending


def test_one_packet_larger_than_the_buffer_is_reset() -> None:
    world = World()
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, bytes(BUF_ALLOC + 1))
    assert peer.events == [("closed", True)]
    assert peer.got == b""


def test_credit_update_follows_half_a_window_and_is_asked_for_otherwise() -> None:
    world = World()
    world.open()
    world.guest.packet(Op.RW, GUEST, HOST, bytes(BUF_ALLOC // 2 - 1))
    assert world.guest.ops() == []
    world.guest.packet(Op.RW, GUEST, HOST, b"x")
    ((header, _),) = world.guest.receive()
    assert (header.op, header.fwd_cnt) == (Op.CREDIT_UPDATE, BUF_ALLOC // 2)
    world.guest.packet(Op.CREDIT_REQUEST, GUEST, HOST)
    assert world.guest.ops() == [Op.CREDIT_UPDATE]


def test_credit_is_given_only_for_what_the_endpoint_took() -> None:
    world = World(room=0)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, bytes(BUF_ALLOC))
    assert world.guest.ops() == []
    peer.room = BUF_ALLOC // 2
    peer.conn.resume()
    ((header, _),) = world.guest.receive()
    assert (header.op, header.fwd_cnt) == (Op.CREDIT_UPDATE, BUF_ALLOC // 2)


def test_no_more_is_sent_than_the_guest_gave_credit_for() -> None:
    world = World()
    peer = world.open(buf_alloc=5000)
    assert peer.conn.send(bytes(9000)) == 5000
    packets = world.guest.receive()
    assert [header.size for header, _ in packets] == [4096, 904, 0]
    assert packets[-1][0].op == Op.CREDIT_REQUEST
    world.guest.packet(Op.CREDIT_UPDATE, GUEST, HOST, buf_alloc=5000, fwd_cnt=5000)
    assert peer.events == ["writable"]
    assert peer.conn.send(bytes(9000)) == 5000


def test_credit_counters_wrap() -> None:
    world = World()
    peer = world.open()
    state = peer.conn.state
    state.tx_cnt = 0xFFFF_FF00
    state.fwd_cnt = state.told_fwd_cnt = 0xFFFF_FFF0
    world.guest.packet(Op.CREDIT_UPDATE, GUEST, HOST, buf_alloc=4096, fwd_cnt=0xFFFF_FF00)
    assert peer.conn.send(bytes(9000)) == 4096
    assert state.tx_cnt == (0xFFFF_FF00 + 4096) & 0xFFFF_FFFF
    world.guest.receive()
    world.guest.packet(Op.CREDIT_UPDATE, GUEST, HOST, buf_alloc=4096, fwd_cnt=state.tx_cnt)
    assert peer.conn.peer_free() == 4096
    world.guest.packet(Op.RW, GUEST, HOST, bytes(BUF_ALLOC // 2))
    ((header, _),) = world.guest.receive()
    assert header.fwd_cnt == (0xFFFF_FFF0 + BUF_ALLOC // 2) & 0xFFFF_FFFF


def test_absurd_credit_from_the_guest_means_none() -> None:
    world = World()
    peer = world.open()
    world.guest.packet(Op.CREDIT_UPDATE, GUEST, HOST, buf_alloc=100, fwd_cnt=0x8000_0000)
    assert peer.conn.peer_free() == 0
    assert peer.conn.send(b"x") == 0


def test_lack_of_receive_buffers_blocks_and_new_ones_unblock() -> None:
    world = World(buffers=2)
    peer = world.open()
    world.guest.refill = False
    world.guest.receive()
    assert peer.conn.send(bytes(100_000)) == 2 * 4096
    assert not peer.conn.fill(lambda views: 1 // 0)
    world.guest.receive()
    world.guest.give_back()
    assert peer.events == ["writable"]
    assert peer.conn.send(b"x") == 1


def test_starved_connections_take_turns() -> None:
    world = World(buffers=1)
    peers = [world.open(guest_port=port) for port in (1, 2, 3)]
    world.guest.refill = False
    world.guest.receive()
    for peer in peers:
        peer.on_write = lambda peer=peer: peer.conn.send(bytes(10_000)) and None  # type: ignore[misc]
        peer.conn.send(bytes(10_000))
    order = []
    for _ in range(7):
        order += [header.dst_port for header, _ in world.guest.receive()]
        world.guest.give_back()
    assert order == [1, 1, 2, 3, 1, 2, 3]  # the first had the only buffer, and then waits behind nobody


def test_one_fill_moves_a_bounded_amount() -> None:
    world = World(payload=65536, buffers=32)
    peer = world.open(buf_alloc=1 << 24)
    moved = 0

    def endless(views: list[memoryview]) -> int:
        nonlocal moved
        count = sum(map(len, views))
        moved += count
        return count

    assert peer.conn.fill(endless)
    assert FILL_LIMIT <= moved < 12 * FILL_LIMIT


def test_short_messages_take_one_read_and_one_buffer() -> None:
    world = World()
    peer = world.open()
    asked: list[int] = []

    def short(views: list[memoryview]) -> int:
        asked.append(len(views))
        views[0][:2] = b"hi"
        return 2

    for _ in range(3):
        assert peer.conn.fill(short)
    assert asked == [1, 1, 1]
    assert [data for _, data in world.guest.receive()] == [b"hi"] * 3


def test_half_close_by_the_guest_is_told_after_its_last_byte() -> None:
    world = World(room=2)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"last")
    world.guest.packet(Op.SHUTDOWN, GUEST, HOST, flags=Shutdown.SEND)
    assert peer.events == []
    peer.room = 10
    peer.conn.resume()
    assert (peer.got, peer.events) == (b"last", [("shutdown", Shutdown.SEND)])
    assert peer.conn.send(b"still open") == 10
    world.guest.packet(Op.RW, GUEST, HOST, b"liar")
    assert peer.events[-1] == ("closed", True)
    assert peer.got == b"last"


def test_guest_that_will_not_receive_is_sent_nothing() -> None:
    world = World()
    peer = world.open()
    world.guest.packet(Op.SHUTDOWN, GUEST, HOST, flags=Shutdown.RECEIVE)
    assert peer.events == [("shutdown", Shutdown.RECEIVE)]
    assert peer.conn.send(b"x") == 0
    world.guest.packet(Op.RW, GUEST, HOST, b"more")
    assert peer.got == b"more"


def test_half_close_by_the_host() -> None:
    world = World()
    peer = world.open()
    assert peer.conn.send(b"last") == 4
    peer.conn.shutdown(Shutdown.SEND)
    packets = world.guest.receive()
    assert [(header.op, header.flags) for header, _ in packets] == [(Op.RW, 0), (Op.SHUTDOWN, Shutdown.SEND)]
    assert peer.conn.send(b"x") == 0
    world.guest.packet(Op.RW, GUEST, HOST, b"answer")
    assert peer.got == b"answer"
    peer.conn.shutdown(Shutdown.SEND)
    assert world.guest.ops() == []


def test_full_close_by_the_guest_is_answered_at_once_and_drains() -> None:
    world = World(room=1)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"tail")
    world.guest.packet(Op.SHUTDOWN, GUEST, HOST, flags=Shutdown.BOTH)
    assert world.guest.ops() == [Op.RST]
    assert peer.events == []
    again = world.open()  # the ports are free although the old stream is still draining
    assert len(world.device.connections) == 2
    peer.room = 10
    peer.conn.resume()
    assert (peer.got, peer.events) == (b"tail", [("closed", False)])
    world.guest.packet(Op.RW, GUEST, HOST, b"n")
    assert again.got == b"n"
    assert world.device.connections == [again.conn]


def test_full_close_by_the_host_waits_for_the_answer() -> None:
    world = World()
    peer = world.open()
    peer.conn.shutdown(Shutdown.BOTH)
    ((header, _),) = world.guest.receive()
    assert (header.op, header.flags) == (Op.SHUTDOWN, Shutdown.BOTH)
    world.guest.packet(Op.RW, GUEST, HOST, b"on its way already")
    assert (peer.got, world.guest.ops()) == (b"", [])
    world.guest.packet(Op.RST, GUEST, HOST)
    assert (world.device.connections, world.guest.ops(), peer.events) == ([], [], [])


def test_both_sides_closing_at_once_ends_with_an_rst() -> None:
    world = World()
    peer = world.open()
    peer.conn.shutdown(Shutdown.BOTH)
    world.guest.packet(Op.SHUTDOWN, GUEST, HOST, flags=Shutdown.BOTH)
    assert world.guest.ops() == [Op.SHUTDOWN, Op.RST]
    assert not world.device.connections


def test_rst_breaks_the_stream_off() -> None:
    world = World(room=0)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"lost")
    world.guest.packet(Op.RST, GUEST, HOST)
    assert peer.events == [("closed", True)]
    assert (world.guest.ops(), world.device.connections) == ([], [])
    assert peer.conn.send(b"x") == 0
    peer.conn.reset()
    peer.conn.resume()
    peer.conn.shutdown(Shutdown.BOTH)
    assert world.guest.ops() == []


def test_rst_after_the_guest_ended_its_stream_loses_nothing() -> None:
    world = World(room=0)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"kept")
    world.guest.packet(Op.SHUTDOWN, GUEST, HOST, flags=Shutdown.SEND)
    world.guest.packet(Op.RST, GUEST, HOST)
    peer.room = 10
    peer.conn.resume()
    assert (peer.got, peer.events) == (b"kept", [("closed", False)])


def test_reset_by_the_host() -> None:
    world = World()
    peer = world.open()
    peer.conn.reset()
    assert world.guest.ops() == [Op.RST]
    assert peer.events == []
    device = Vsock()
    early = device.connect(7, Peer())
    early.reset()
    assert FakeVsockGuest(device).start().ops() == []


@pytest.mark.parametrize(
    ("op", "changes"),
    [
        (Op.REQUEST, {}),
        (Op.RESPONSE, {}),
        (Op.INVALID, {}),
        (99, {}),
        (Op.RW, {"size": 100}),
        (Op.RW, {"size": 0xFFFF_FFFF}),
    ],
)
def test_packets_that_make_no_sense_reset_the_connection(op: int, changes: dict[str, int]) -> None:
    world = World()
    peer = world.open()
    world.guest.packet(op, GUEST, HOST, b"abc" if op == Op.RW else b"", **changes)
    assert peer.events == [("closed", True)]
    assert peer.got == b""
    assert world.guest.ops() == [Op.RST]
    assert world.device.violations == 1
    assert not world.guest.needs_reset


@pytest.mark.parametrize("op", [Op.RW, Op.SHUTDOWN])
def test_guest_that_answers_a_request_with_anything_else_is_reset(op: int) -> None:
    world = World()
    peer = world.connect(7)
    world.guest.receive()
    world.guest.packet(op, 7, peer.conn.host_port, b"x" if op == Op.RW else b"")
    assert peer.events == [("closed", True)]
    assert world.guest.ops() == [Op.RST]


def test_response_before_the_request_was_sent_is_a_violation() -> None:
    world = World(buffers=1)
    world.guest.refill = False
    world.open()  # takes the only buffer
    peer = world.connect(7)
    world.guest.packet(Op.RESPONSE, 7, FIRST_HOST_PORT)
    assert peer.events == [("closed", True)]


def test_unknown_type_is_refused_with_the_same_type() -> None:
    world = World()
    peer = world.open()
    for kind in (Type.SEQPACKET, 7):
        world.guest.packet(Op.RW, GUEST, HOST, b"x", type=kind)
        ((header, _),) = world.guest.receive()
        assert (header.op, header.type) == (Op.RST, kind)
    assert peer.events == []


def test_other_destinations_are_refused_and_forged_sources_dropped() -> None:
    world = World()
    world.guest.packet(Op.REQUEST, GUEST, HOST, dst_cid=1 << 40)
    ((header, _),) = world.guest.receive()
    assert (header.op, header.src_cid) == (Op.RST, 1 << 40)
    world.guest.packet(Op.REQUEST, GUEST, HOST, src_cid=4)
    world.guest.packet(Op.REQUEST, GUEST, HOST, src_cid=3 | 1 << 32)
    assert world.guest.ops() == []
    assert world.device.dropped == 2


def test_stray_packets_are_answered_with_rst_but_a_stray_rst_is_not() -> None:
    world = World()
    for op in (Op.RW, Op.RESPONSE, Op.SHUTDOWN, Op.CREDIT_REQUEST, 77):
        world.guest.packet(op, GUEST, HOST)
        assert world.guest.ops() == [Op.RST]
    world.guest.packet(Op.RST, GUEST, HOST)
    world.guest.packet(Op.RST, GUEST, HOST, type=9)
    assert world.guest.ops() == []


def test_packet_shorter_than_a_header_is_a_guest_error() -> None:
    world = World()
    peer = world.open()
    world.guest.raw([bytes(HEADER_SIZE - 1)])
    assert world.guest.needs_reset
    assert peer.events == [("closed", True)]
    world.guest.start()
    assert world.guest.open(GUEST, HOST).op == Op.RESPONSE


def test_header_and_payload_may_be_split_anywhere() -> None:
    world = World()
    peer = world.open()
    header = HEADER.pack(*Header(3, 2, GUEST, HOST, 6, Type.STREAM, Op.RW, 0, 1000, 0))
    packet = header + b"abcdef" + b"beyond"
    world.guest.raw([packet[:10], packet[10:46], packet[46:48], packet[48:]])
    assert peer.got == b"abcdef"


def test_receive_buffer_without_room_for_data_is_a_guest_error() -> None:
    world = World(payload=0)
    world.connect(7)
    assert world.guest.needs_reset


def test_receive_buffer_with_a_fragmented_header_is_served() -> None:
    world = World(buffers=0)
    world.guest.driver.add(QUEUE_RX, writable=[10, 20, 20, 50])
    world.guest.driver.add(QUEUE_RX, writable=[10, 20, 20, 50])
    world.guest.packet(Op.REQUEST, GUEST, HOST)
    peer = world.peers[0]
    assert peer.conn.send(b"0123456789" * 5) == 50
    response, data = world.guest.driver.collect(QUEUE_RX)
    assert Header(*HEADER.unpack(response.data)).op == Op.RESPONSE
    assert data.data[HEADER_SIZE:] == b"0123456789" * 5


def test_owed_packets_do_not_pile_up_while_the_guest_offers_no_buffers() -> None:
    world = World(buffers=1)
    peer = world.open()
    world.guest.refill = False
    world.connect(7)  # the last buffer
    for _ in range(300):
        world.guest.packet(Op.CREDIT_REQUEST, GUEST, HOST)
    for port in range(MAX_REFUSALS + 100):
        world.guest.packet(Op.RW, port + 2000, HOST)
    assert world.device.dropped == 100
    assert len(world.device.save_state()["refusals"]) == MAX_REFUSALS
    world.guest.refill = True
    ops: list[int] = []
    while new := world.guest.ops():
        ops += new
    assert ops == [Op.REQUEST] + [Op.RST] * MAX_REFUSALS + [Op.CREDIT_UPDATE]
    assert peer.events == []


def test_connections_of_the_guest_are_capped() -> None:
    world = World(buffers=128)
    for port in range(MAX_CONNECTIONS):
        assert world.guest.open(port, HOST).op == Op.RESPONSE
    assert world.guest.open(MAX_CONNECTIONS, HOST).op == Op.RST
    assert world.guest.open(0, HOST).op == Op.RST  # in use: ends the old one
    assert world.guest.open(0, HOST).op == Op.RESPONSE
    sizes = [connection.state.buf_alloc for connection in world.device.connections]
    assert sum(sizes) <= LARGE_BUFFERS + MAX_CONNECTIONS * SMALL_BUF_ALLOC
    world.guest.receive()
    world.connect()  # the host's own are counted apart
    assert world.guest.ops() == [Op.REQUEST]


def test_draining_connections_count_as_connections() -> None:
    world = World(room=0, buffers=128)
    for port in range(MAX_CONNECTIONS):
        world.guest.packet(Op.REQUEST, port, HOST)
        world.guest.packet(Op.RW, port, HOST, b"x")
        world.guest.packet(Op.SHUTDOWN, port, HOST, flags=Shutdown.BOTH)
        world.guest.receive()
    assert len(world.device.connections) == MAX_CONNECTIONS
    assert world.guest.open(5000, HOST).op == Op.RST
    world.peers[0].conn.reset()
    assert world.guest.open(5000, HOST).op == Op.RESPONSE


def test_connections_of_the_host_are_capped_and_get_different_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_device, "MAX_CONNECTIONS", 3)
    world = World()
    ports = {world.connect().conn.host_port for _ in range(3)}
    assert len(ports) == 3
    with pytest.raises(StateError):
        world.connect()


def test_small_packets_cost_no_more_memory_than_their_bytes() -> None:
    world = World(room=0)
    peer = world.open()
    for _ in range(500):
        world.guest.packet(Op.RW, GUEST, HOST, b"x")
    assert type(peer.conn.state.pending) is bytearray
    assert len(peer.conn.state.pending) == 500


def test_reset_by_the_driver_ends_every_connection() -> None:
    world = World()
    peer = world.open()
    world.guest.reset()
    assert peer.events == [("closed", True)]
    assert not world.device.connections
    peer.conn.send(b"x")
    world.guest.start()
    assert world.guest.ops() == []


def test_transport_reset_tells_the_driver_when_it_listens() -> None:
    world = World()
    peer = world.open()
    world.device.transport_reset()
    assert peer.events == [("closed", True)]
    world.guest.offer_event()
    assert [used.data for used in world.guest.driver.collect("event")] == [bytes(4)]
    world.guest.offer_event()
    assert world.guest.driver.collect("event") == []


def test_restored_device_goes_on_where_it_was() -> None:
    world = World(room=2)
    peer = world.open()
    world.guest.packet(Op.RW, GUEST, HOST, b"abcdef")
    peer.conn.send(b"before")
    world.guest.receive()
    adopted = Peer()

    def adopt(connection: Connection) -> Endpoint:
        adopted.connection = connection
        return adopted

    device = Vsock(accept=world.accept, adopt=adopt)
    world.guest.driver.move_to(device)
    world.guest.device = device
    adopted.conn.resume()
    world.guest.packet(Op.RW, GUEST, HOST, b"gh")
    assert adopted.got == b"cdefgh"
    assert adopted.conn.send(b"after") == 5
    ((header, data),) = world.guest.receive()
    assert (data, header.fwd_cnt) == (b"after", 8)
    assert adopted.conn.state.tx_cnt == 11


def test_restored_connections_nobody_adopts_are_reset() -> None:
    world = World(room=0)
    world.open(guest_port=1)
    world.open(guest_port=2)
    world.guest.packet(Op.RW, 2, HOST, b"x")
    world.guest.packet(Op.SHUTDOWN, 2, HOST, flags=Shutdown.BOTH)
    closing = world.open(guest_port=3)
    closing.conn.shutdown(Shutdown.BOTH)
    world.connect(9)
    world.guest.receive()
    device = Vsock()
    world.guest.driver.move_to(device)
    world.guest.device = device
    assert sorted(header.dst_port for header, _ in world.guest.receive()) == [1, 9]
    assert [connection.guest_port for connection in device.connections] == [3]


def test_device_restored_under_another_cid_drops_connections_and_says_so() -> None:
    world = World()
    world.open()
    device = Vsock(9, adopt=lambda connection: Peer())
    world.guest.driver.move_to(device)
    world.guest.device = device
    assert (world.guest.ops(), device.connections) == ([], [])
    world.guest.offer_event()
    assert len(world.guest.driver.collect("event")) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"cid": "3"},
        {"next_host_port": -1},
        {"refusals": [[1, 2, 3]]},
        {"refusals": [[1, 2, 3, 1 << 16]]},
        {"connections": [[1, 2, 3]]},
        {"connections": [[HOST, GUEST, 1, BUF_ALLOC + 1, 0, 0, 0, 0, 0, 0, 0, 0, b""]]},
        {"connections": [[HOST, GUEST, 9, BUF_ALLOC, 0, 0, 0, 0, 0, 0, 0, 0, b""]]},
        {"connections": [[HOST, GUEST, 1, 16, 0, 0, 0, 0, 0, 0, 0, 0, bytes(17)]]},
        {"connections": [[HOST, GUEST, 1, 16, 0, 0, 0, 0, 0, 0, 0, 1 << Op.RW, b""]]},
        {"connections": [[HOST, GUEST, 1, 16, 0, 0, 0, 0, 0, 0, 8, 0, b""]]},
        {"connections": [[HOST, GUEST, 1, 16, 0, 0, 0, 0, 0, 0, 0, 0, "text"]]},
        {"connections": 5},
    ],
)
def test_damaged_state_is_a_snapshot_error(damage: dict[str, object]) -> None:
    state = Vsock().save_state() | damage
    with pytest.raises(SnapshotError):
        Vsock().restore_state(state)

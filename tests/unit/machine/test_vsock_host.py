"""The host's end of the guest's sockets: real sockets and the real I/O thread, with a guest that is a test."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from microvm.devices.vsock import Vsock
from microvm.errors import ConfigError, StateError
from microvm.machine import vsock_path, vsock_pump
from microvm.machine.reactor import Reactor
from microvm.machine.vsock_host import VsockHost
from microvm.spec.virtio_vsock import Header, Op, Shutdown
from microvm.testing.vsock import FakeVsockGuest

T = TypeVar("T")
WAIT_S = 10.0
PORT = 5000


def until(check: Callable[[], T]) -> T:
    """Wait until ``check`` returns something true."""
    deadline = time.monotonic() + WAIT_S
    while not (result := check()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)
    return result


class Machine:
    """Reactor, device and host as a machine wires them, and the guest's side in the test's thread."""

    def __init__(self, path: str | None = None, *, start_guest: bool = True) -> None:
        self.errors: list[Exception] = []
        self.reactor = Reactor(self.errors.append)
        self.device = Vsock()
        self.host = VsockHost(self.device, self.reactor, path)
        self.guest = FakeVsockGuest(self.device, notifier=self.notify)
        self.packets: list[tuple[Header, bytes]] = []
        self.host.start()
        self.reactor.start()
        if start_guest:
            self.guest.start()

    def notify(self, index: int) -> None:
        self.reactor.call_soon_threadsafe(lambda: self.guest.driver.mmio.process(index))

    def packet(self, op: int | None = None) -> tuple[Header, bytes]:
        """The next packet (of that kind; others are skipped)."""

        def take() -> tuple[Header, bytes] | None:
            self.packets += self.guest.receive()
            while self.packets:
                packet = self.packets.pop(0)
                if op is None or packet[0].op == op:
                    return packet
            return None

        return until(take)

    def data(self, size: int, guest_port: int, host_port: int) -> bytes:
        """The next ``size`` bytes, all acknowledged."""
        got = b""
        while len(got) < size:
            got += self.packet(Op.RW)[1]
            self.guest.packet(Op.CREDIT_UPDATE, guest_port, host_port, fwd_cnt=len(got))
        return got

    def settle(self) -> None:
        """Wait until the I/O thread has done what it was told."""
        for _ in range(3):
            self.reactor.call_and_wait(lambda: None)

    def open(self, guest_port: int = 1000, host_port: int = PORT) -> Header:
        self.guest.packet(Op.REQUEST, guest_port, host_port)
        return self.packet()[0]

    def stop(self) -> None:
        self.host.close()
        self.reactor.stop()
        assert self.errors == []


@pytest.fixture
def machine() -> Iterator[Machine]:
    files = os.listdir("/proc/self/fd")
    machine = Machine()
    yield machine
    machine.stop()
    assert len(os.listdir("/proc/self/fd")) == len(files), "a descriptor is left open"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vsock")


@pytest.fixture
def door(path: str) -> Iterator[Machine]:
    files = os.listdir("/proc/self/fd")
    machine = Machine(path)
    yield machine
    machine.stop()
    assert not os.path.exists(path)
    assert len(os.listdir("/proc/self/fd")) == len(files), "a descriptor is left open"


def idle(machine: Machine) -> bool:
    """Whether the I/O thread sleeps."""
    machine.settle()
    before = machine.reactor.call_and_wait(time.thread_time)
    time.sleep(0.1)
    return machine.reactor.call_and_wait(time.thread_time) - before < 0.02


def in_thread(function: Callable[[], T]) -> Callable[[], T]:
    """Run ``function`` in a thread; the returned call waits for its result, or raises what it raised."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised in the test's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def wait() -> T:
        thread.join(WAIT_S)
        assert not thread.is_alive()
        if errors:
            raise errors[0]
        return results[0]

    return wait


def connect(machine: Machine, port: int = 7) -> tuple[socket.socket, int]:
    """A stream the host opened and the guest accepted, and its port on the host's side."""
    wait = in_thread(lambda: machine.host.connect(port, WAIT_S))
    request, _ = machine.packet(Op.REQUEST)
    machine.guest.packet(Op.RESPONSE, port, request.src_port)
    stream = wait()
    stream.settimeout(WAIT_S)
    return stream, request.src_port


def test_host_connects_and_bytes_go_both_ways(machine: Machine) -> None:
    stream, host_port = connect(machine)
    with stream:
        stream.sendall(b"ping")
        assert machine.packet(Op.RW)[1] == b"ping"
        machine.guest.packet(Op.RW, 7, host_port, b"pong")
        assert stream.recv(100) == b"pong"
        with stream.makefile("rb") as file:
            machine.guest.packet(Op.RW, 7, host_port, b"line\n")
            assert file.readline() == b"line\n"


def test_connect_is_refused_by_the_guest(machine: Machine) -> None:
    wait = in_thread(lambda: machine.host.connect(7, WAIT_S))
    request, _ = machine.packet(Op.REQUEST)
    machine.guest.packet(Op.RST, 7, request.src_port)
    with pytest.raises(ConnectionRefusedError):
        wait()


def test_connect_times_out_and_takes_the_request_back(machine: Machine) -> None:
    with pytest.raises(TimeoutError):
        machine.host.connect(7, 0.01)
    assert machine.packet()[0].op == Op.REQUEST
    assert machine.packet()[0].op == Op.RST
    assert not machine.device.connections


def test_connect_waits_for_a_guest_that_still_boots() -> None:
    machine = Machine(start_guest=False)
    wait = in_thread(lambda: machine.host.connect(7, WAIT_S))
    until(lambda: machine.device.connections)
    machine.guest.start()
    request, _ = machine.packet(Op.REQUEST)
    machine.guest.packet(Op.RESPONSE, 7, request.src_port)
    wait().close()
    machine.stop()


def test_impossible_ports_and_moments(machine: Machine) -> None:
    with pytest.raises(ConfigError):
        machine.host.connect(-1)
    with pytest.raises(ConfigError):
        machine.host.listen(1 << 32)
    with pytest.raises(ConfigError):
        machine.host.listen(1, 0)
    listener = machine.host.listen(1)
    with pytest.raises(StateError):
        machine.host.listen(1)
    listener.close()
    machine.host.listen(1).close()
    machine.host.close()
    with pytest.raises(StateError):
        machine.host.connect(7)
    with pytest.raises(StateError):
        machine.host.listen(1)


def test_guest_connects_to_a_listener(machine: Machine) -> None:
    with machine.host.listen(PORT) as listener:
        assert machine.open().op == Op.RESPONSE
        machine.guest.packet(Op.RW, 1000, PORT, b"hello")
        with listener.accept(WAIT_S) as stream:
            assert stream.recv(100) == b"hello"
            stream.sendall(b"welcome")
            assert machine.packet(Op.RW)[1] == b"welcome"
        with pytest.raises(TimeoutError):
            listener.accept(0.01)
    assert machine.open(1001).op != Op.RESPONSE


def test_backlog_is_a_bound(machine: Machine) -> None:
    with machine.host.listen(PORT, backlog=2) as listener:
        assert [machine.open(port).op for port in (1, 2, 3)] == [Op.RESPONSE, Op.RESPONSE, Op.RST]
        listener.accept(WAIT_S).close()
        assert machine.open(4).op in (Op.RESPONSE, Op.SHUTDOWN)
    # What nobody accepted is shut down when the listener closes.
    assert machine.packet(Op.SHUTDOWN)


def test_closing_a_listener_wakes_who_waits(machine: Machine) -> None:
    listener = machine.host.listen(PORT)
    wait = in_thread(listener.accept)
    listener.close()
    with pytest.raises(ConnectionAbortedError):
        wait()


def test_streams_of_many_megabytes_arrive_whole_both_ways(machine: Machine) -> None:
    stream, host_port = connect(machine)
    payload = os.urandom(1 << 20) * 3
    wait = in_thread(lambda: stream.sendall(payload))
    assert machine.data(len(payload), 7, host_port) == payload
    wait()

    def read() -> bytes:
        got = b""
        while len(got) < len(payload):
            got += stream.recv(1 << 20)
            time.sleep(0.001)  # a slow reader: what it does not take in time is kept by the device
        return got

    wait_read = in_thread(read)
    sent = forwarded = 0
    while sent < len(payload):
        until(lambda: machine.device.connections)
        while sent - forwarded >= 1 << 18:
            forwarded = machine.packet(Op.CREDIT_UPDATE)[0].fwd_cnt - 0
        piece = payload[sent : sent + min(65536, (1 << 18) - (sent - forwarded))]
        machine.guest.packet(Op.RW, 7, host_port, piece)
        sent += len(piece)
        machine.settle()
    assert wait_read() == payload
    stream.close()


def test_a_reader_that_does_not_read_stops_the_guest_and_goes_on(machine: Machine) -> None:
    stream, host_port = connect(machine)
    connection = machine.device.connections[0]
    sent = 0
    while len(connection.state.pending) < 1 << 18:
        credit = (1 << 18) - len(connection.state.pending)
        machine.guest.packet(Op.RW, 7, host_port, bytes(min(65536, credit)))
        sent += min(65536, credit)
        machine.settle()
    got = 0
    while got < sent:
        got += len(stream.recv(1 << 20))
    until(lambda: not connection.state.pending)
    assert idle(machine)
    stream.close()


def test_half_close_by_the_host_reaches_the_guest_and_the_answer_comes_back(machine: Machine) -> None:
    stream, host_port = connect(machine)
    stream.sendall(b"question")
    stream.shutdown(socket.SHUT_WR)
    assert machine.packet()[1] == b"question"
    header, _ = machine.packet()
    assert (header.op, header.flags) == (Op.SHUTDOWN, Shutdown.SEND)
    machine.guest.packet(Op.RW, 7, host_port, b"answer")
    machine.guest.packet(Op.SHUTDOWN, 7, host_port, flags=Shutdown.BOTH)
    assert machine.packet()[0].op == Op.RST
    assert stream.recv(100) == b"answer"
    assert stream.recv(100) == b""
    stream.close()


def test_half_close_by_the_guest_leaves_the_other_direction_open(machine: Machine) -> None:
    stream, host_port = connect(machine)
    machine.guest.packet(Op.RW, 7, host_port, b"last")
    machine.guest.packet(Op.SHUTDOWN, 7, host_port, flags=Shutdown.SEND)
    assert stream.recv(100) == b"last"
    assert stream.recv(100) == b""
    stream.sendall(b"reply")
    assert machine.packet()[1] == b"reply"
    stream.close()
    assert machine.packet(Op.SHUTDOWN)[0].flags
    until(lambda: machine.device.connections[0].state.local_shutdown == Shutdown.BOTH)


def test_guest_that_stops_receiving_breaks_the_pipe(machine: Machine) -> None:
    stream, host_port = connect(machine)
    machine.guest.packet(Op.SHUTDOWN, 7, host_port, flags=Shutdown.RECEIVE)
    machine.settle()
    with pytest.raises(BrokenPipeError):
        stream.sendall(b"x")
    stream.close()
    until(lambda: machine.device.connections[0].state.local_shutdown == Shutdown.BOTH)


def test_rst_is_a_connection_reset_after_the_bytes_before_it(machine: Machine) -> None:
    stream, host_port = connect(machine)
    machine.guest.packet(Op.RW, 7, host_port, b"part")
    machine.guest.packet(Op.RST, 7, host_port)
    assert stream.recv(100) == b"part"
    with pytest.raises(ConnectionResetError):
        stream.recv(100)
    with pytest.raises(ConnectionResetError):
        stream.recv_into(bytearray(10))
    stream.close()


def test_closing_the_stream_shuts_the_guest_down_and_frees_the_descriptor(machine: Machine) -> None:
    files = len(os.listdir("/proc/self/fd"))
    stream, host_port = connect(machine)
    stream.close()
    while machine.packet(Op.SHUTDOWN)[0].flags != Shutdown.BOTH:
        pass
    machine.guest.packet(Op.RST, 7, host_port)
    until(lambda: not machine.device.connections)
    assert len(os.listdir("/proc/self/fd")) == files


def test_closing_after_half_close_is_noticed_though_the_guest_is_silent(machine: Machine) -> None:
    stream, _ = connect(machine)
    stream.shutdown(socket.SHUT_WR)
    assert machine.packet(Op.SHUTDOWN)[0].flags == Shutdown.SEND
    stream.close()
    assert machine.packet(Op.SHUTDOWN)[0].flags == Shutdown.BOTH


def test_closing_the_stream_resets_a_guest_that_goes_on_sending(machine: Machine) -> None:
    stream, host_port = connect(machine)
    machine.reactor.call_and_wait(stream.close)  # so that the end is not noticed before the bytes come
    machine.guest.packet(Op.RW, 7, host_port, b"to nobody")
    assert machine.packet()[0].op in (Op.RST, Op.SHUTDOWN)


def test_guest_that_never_answers_a_close_is_reset(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_pump, "CLOSE_TIMEOUT_S", 0.01)
    stream, _ = connect(machine)
    stream.close()
    assert machine.packet(Op.RST)
    assert not machine.device.connections


def test_streams_end_with_the_machine() -> None:
    machine = Machine()
    stream, _ = connect(machine)
    listener = machine.host.listen(PORT)
    waiting = in_thread(listener.accept)
    connecting = in_thread(lambda: machine.host.connect(8))
    machine.packet(Op.REQUEST)
    machine.stop()
    machine.host.close()
    with pytest.raises(ConnectionResetError):
        stream.recv(1)
    with pytest.raises(ConnectionAbortedError):
        waiting()
    with pytest.raises(ConnectionAbortedError):
        connecting()
    stream.close()


def test_driver_reset_on_another_thread_breaks_the_streams(machine: Machine) -> None:
    stream, _ = connect(machine)
    machine.guest.reset()
    with pytest.raises(ConnectionResetError):
        stream.recv(1)
    stream.close()


def test_idle_and_blocked_connections_cost_no_time(machine: Machine) -> None:
    stream, _ = connect(machine)
    machine.guest.refill = False
    stream.setblocking(False)
    fill(machine, stream)
    other, other_port = connect_without_refill(machine)
    machine.guest.packet(Op.RW, 9, other_port, bytes(1 << 18))  # nobody reads it
    machine.settle()
    assert idle(machine)
    stream.close()
    other.close()


def fill(machine: Machine, stream: socket.socket) -> None:
    """Send until nobody on the way takes any more."""
    stuck = 0
    while stuck < 3:
        try:
            stream.send(bytes(65536))
            stuck = 0
        except BlockingIOError:
            stuck += 1
            machine.settle()


def connect_without_refill(machine: Machine) -> tuple[socket.socket, int]:
    machine.packets += machine.guest.receive()
    machine.guest.give_back(60)
    wait = in_thread(lambda: machine.host.connect(9, WAIT_S))

    def step() -> Header | None:
        for header, _ in machine.guest.receive():
            if header.op == Op.REQUEST:
                return header
        machine.guest.give_back(5)
        return None

    request = until(step)
    machine.guest.packet(Op.RESPONSE, 9, request.src_port)
    return wait(), request.src_port


def test_many_connections_at_once(machine: Machine) -> None:
    with machine.host.listen(PORT) as listener:
        streams = []
        for port in range(100):
            assert machine.open(port).op == Op.RESPONSE
            streams.append(listener.accept(WAIT_S))
        for port, stream in enumerate(streams):
            stream.sendall(b"%d" % port)
            header, data = machine.packet(Op.RW)
            assert (header.dst_port, data) == (port, b"%d" % port)
        for stream in streams:
            stream.close()


# Unix sockets on a path.


def dial(path: str, line: bytes) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(WAIT_S)
    client.connect(path)
    client.sendall(line)
    return client


def test_path_is_private_while_it_lasts(door: Machine, path: str) -> None:
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_ISSOCK(os.stat(path).st_mode)


def test_connect_line_puts_through_to_the_guest(door: Machine, path: str) -> None:
    with dial(path, b"CONNECT 52\nearly") as client:
        request, _ = door.packet(Op.REQUEST)
        assert request.dst_port == 52
        door.guest.packet(Op.RESPONSE, 52, request.src_port)
        assert client.recv(100) == b"OK %d\n" % request.src_port
        assert door.packet(Op.RW)[1] == b"early"
        door.guest.packet(Op.RW, 52, request.src_port, b"reply")
        assert client.recv(100) == b"reply"


def test_connect_line_may_come_in_pieces(door: Machine, path: str) -> None:
    with dial(path, b"CONN") as client:
        door.settle()
        client.sendall(b"ECT 52")
        door.settle()
        client.sendall(b"\n")
        assert door.packet(Op.REQUEST)[0].dst_port == 52


def test_refusal_by_the_guest_hangs_up(door: Machine, path: str) -> None:
    with dial(path, b"CONNECT 52\n") as client:
        request, _ = door.packet(Op.REQUEST)
        door.guest.packet(Op.RST, 52, request.src_port)
        assert client.recv(100) == b""


@pytest.mark.parametrize(
    "line", [b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"GET / HTTP\n", b"C" * 40]
)
def test_other_lines_hang_up(door: Machine, path: str, line: bytes) -> None:
    with dial(path, line) as client:
        client.settimeout(vsock_path.HANDSHAKE_TIMEOUT_S / 2)  # at once, not when the patience ends
        try:
            assert client.recv(100) == b""
        except ConnectionResetError:
            pass  # the same, told by a kernel that had unread bytes to throw away
    door.settle()
    assert not door.device.connections


def test_caller_that_says_nothing_is_hung_up_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vsock_path, "HANDSHAKE_TIMEOUT_S", 0.01)
    machine = Machine(path)
    with dial(path, b"") as client:
        assert client.recv(100) == b""
    with dial(path, b"CONNECT 52\n") as client:  # and so is one to whom the guest says nothing
        assert client.recv(100) == b""
    machine.stop()


def test_caller_that_hangs_up_early_leaves_nothing(door: Machine, path: str) -> None:
    files = len(os.listdir("/proc/self/fd"))
    dial(path, b"CONN").close()
    dial(path, b"").close()
    until(lambda: len(os.listdir("/proc/self/fd")) == files)


def test_guest_reaches_the_socket_of_its_port(door: Machine, path: str) -> None:
    assert door.open().op == Op.RST
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{path}_{PORT}")
        assert door.open().op == Op.RST  # bound but not listening
        server.listen()
        assert door.open().op == Op.RESPONSE
        client, _ = server.accept()
        with client:
            client.settimeout(WAIT_S)
            door.guest.packet(Op.RW, 1000, PORT, b"hello")
            assert client.recv(100) == b"hello"
            client.sendall(b"back")
            assert door.packet(Op.RW)[1] == b"back"


def test_python_listener_comes_before_the_path(door: Machine, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as server, door.host.listen(PORT) as listener:
        server.bind(f"{path}_{PORT}")
        server.listen()
        assert door.open().op == Op.RESPONSE
        listener.accept(WAIT_S).close()


def test_path_in_use_is_refused_and_left_alone(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere")
    for path in (taken, dangling, tmp_path, tmp_path / "missing" / "vsock", tmp_path / ("x" * 200)):
        host = VsockHost(Vsock(), Reactor(lambda error: None), path)
        with pytest.raises(ConfigError):
            host.start()
        host.close()
    assert taken.read_text() == "mine"
    assert dangling.is_symlink()


def test_path_that_somebody_replaced_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    machine = Machine(str(path))
    path.rename(tmp_path / "elsewhere")  # keeps the number of the file, which could be given out again
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        machine.stop()
    assert path.is_socket()

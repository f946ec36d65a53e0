"""The client against a guest that lies. No agent here: the test is the guest."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from microvm.agent import protocol as wire
from microvm.agent.client import AgentClient
from microvm.errors import BootError, ExecError, ExecTimeout

Guest = Callable[[Callable[[socket.socket], None]], AgentClient]


@pytest.fixture
def guest() -> Iterator[Guest]:
    """Makes a client whose guest behaves as the given function says."""
    threads: list[threading.Thread] = []
    clients: list[AgentClient] = []

    def make(behave: Callable[[socket.socket], None]) -> AgentClient:
        def serve(sock: socket.socket) -> None:
            with sock:
                try:
                    behave(sock)
                    while sock.recv(65536):
                        pass
                except OSError:
                    pass

        def connect() -> socket.socket:
            ours, theirs = socket.socketpair()
            thread = threading.Thread(target=serve, args=(theirs,))
            thread.start()
            threads.append(thread)
            return ours

        clients.append(AgentClient(connect, request_timeout_s=0.2))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    for thread in threads:
        thread.join(5)


def sends(*frames: bytes) -> Callable[[socket.socket], None]:
    def behave(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(b"".join(frames))

    return behave


EXIT = wire.frame(wire.EXIT, struct.pack("<iIIIQQQQ", 0, 0, 5, 0, 1, 1, 1, 1))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([struct.pack("<II", 1 << 31, wire.DATA)], "a frame of 2147483648 bytes"),
        ([wire.frame(0x99)], "unexpected frame of type 0x99"),
        ([wire.frame(wire.OK)], "unexpected frame"),
        ([wire.frame(wire.DATA, b"x", 3)], "unexpected frame"),
        ([wire.frame(wire.DATA, bytes(65536), 1)] * 5, "more output than it was granted"),
        ([wire.frame(wire.END, b"", 1), wire.frame(wire.DATA, b"x", 1)], "more output than it was granted"),
        ([wire.frame(wire.EXIT, b"short")], "short answer"),
        ([wire.frame(wire.EXIT, struct.pack("<iIIIQQQQ", 9999, 0, 5, 0, 1, 1, 1, 1))], "exit code 9999"),
        ([wire.frame(wire.ERROR, b"\x02\0\0\0\xff\xff\xff\xff")], "malformed string"),
        ([wire.frame(wire.WINDOW, b"x")], "unexpected frame"),
    ],
)
def test_a_guest_that_breaks_the_protocol_is_an_exec_error(guest: Guest, frames: list[bytes], message: str) -> None:
    with pytest.raises(ExecError, match=message):
        guest(sends(*frames)).start(["x"], stdin=-3).communicate()


def test_output_is_capped(guest: Guest) -> None:
    with pytest.raises(ExecError, match="more than the 10 bytes allowed"):
        guest(sends(wire.frame(wire.DATA, b"x" * 11, 1), EXIT)).run(["x"], max_output=10)


def test_a_silent_guest_is_given_up(guest: Guest) -> None:
    client = guest(sends())
    with pytest.raises(ExecError, match=r"did not answer within 0\.2 s"):
        client.ping()
    with pytest.raises(ExecError, match="did not answer"):
        client.start(["x"])
    with pytest.raises(ExecError, match="did not answer"):
        client.files.read("/x")


def test_a_guest_that_does_not_end_a_command_in_time_is_given_up(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvm.agent.client.GRACE_S", 0.1)
    with pytest.raises(ExecTimeout) as raised:
        guest(sends(wire.frame(wire.DATA, b"so far", 1))).run(["x"], timeout=0.1)
    assert raised.value.stdout == b"so far"


def test_a_guest_that_takes_no_input_is_given_up(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microvm.agent.client.GRACE_S", 0.1)
    grant = wire.frame(wire.WINDOW, struct.pack("<I", 1 << 31), 0)
    closing = threading.Event()

    def behave(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(grant)
        closing.wait(2)

    with pytest.raises(ExecTimeout):
        guest(behave).run(["x"], input=bytes(20_000_000), timeout=0.2)
    closing.set()


def test_a_connection_that_ends_is_an_exec_error(guest: Guest) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.shutdown(socket.SHUT_RDWR)

    client = guest(behave)
    with pytest.raises(ExecError, match="connection to the guest was lost"):
        client.run(["x"])
    with pytest.raises(ExecError, match="connection to the guest was lost"):
        client.start(["x"])


def test_a_spare_connection_with_unasked_bytes_is_not_used_again(guest: Guest) -> None:
    client = guest(sends(wire.frame(wire.OK, b"1") + wire.frame(wire.OK, b"2")))
    for _ in range(3):
        client.ping()
    with pytest.raises(ExecError):
        guest(sends(wire.frame(wire.ERROR, b"\1\0\0\0" + wire.string(b"a") + wire.string(b"b")))).ping()


def test_text_from_the_guest_is_plain_and_short(guest: Guest) -> None:
    text = wire.string(b"\x1b[31m" + b"x" * 1000)
    with pytest.raises(ExecError) as raised:
        guest(sends(wire.frame(wire.ERROR, b"\x05\0\0\0" + text + text))).ping()
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 600


def test_endless_files_and_listings_are_capped(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    record = wire.pack_record(0o100644, 5, 0, b"name")

    def endless(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(wire.frame(wire.OK, record))
        while True:
            sock.sendall(wire.frame(wire.DATA, record * 500))

    with pytest.raises(ExecError, match="longer than the 100000 bytes"):
        guest(endless).files.read("/x", max_size=100_000)
    monkeypatch.setattr("microvm.agent.operations.MAX_ENTRIES", 5000)
    with pytest.raises(ExecError, match="more than 5000 files"):
        guest(endless).files.list("/x")


def ready(version: int = 1, error: bytes = b"") -> bytes:
    head = struct.pack("<IIQQ", version, 1024, 10, 20)
    return wire.frame(wire.READY, head + wire.string(b"6.1.0") + wire.string(error))


def test_ready_is_read_and_its_connection_used(guest: Guest) -> None:
    client = guest(lambda _sock: pytest.fail("a second connection was made"))
    ours, theirs = socket.socketpair()
    theirs.sendall(ready())
    found = client.wait_ready(ours, 1)
    assert (found.kernel, found.started_ns, found.ready_ns) == ("6.1.0", 10, 20)
    theirs.sendall(b"")
    answering = threading.Thread(target=sends(wire.frame(wire.OK)), args=(theirs,))
    answering.start()
    client.ping(1)
    answering.join()
    theirs.close()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (ready(error=b"no disk"), BootError, "could not set itself up: no disk"),
        (ready(version=2), ExecError, "version 2"),
        (wire.frame(wire.OK), ExecError, "unexpected frame"),
        (b"", TimeoutError, None),
    ],
)
def test_a_guest_that_is_not_ready(guest: Guest, data: bytes, error: type[Exception], message: str | None) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(data)
        with pytest.raises(error, match=message):
            guest(lambda _sock: None).wait_ready(ours, 0.1)

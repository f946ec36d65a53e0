"""The agent against a host that does not keep to the protocol, and requests about the machine."""

from __future__ import annotations

import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from microvm.agent import protocol as wire
from microvm.agent.client import AgentClient
from microvm.errors import ExecError

from .conftest import BINARY, Agent, Connect, running_agent
from .test_run import wait_until


def answer(sock: socket.socket) -> bytes:
    """All that comes until the agent hangs up or falls silent."""
    sock.settimeout(2)
    received = b""
    try:
        while data := sock.recv(65536):
            received += data
    except TimeoutError:
        pass
    return received


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<II", 0xFFFFFFFF, wire.EXEC | 1 << 8),
        struct.pack("<II", 65537, wire.DATA),
        wire.frame(0x3F, b"", 1),
        wire.frame(0xFF),
        wire.request(wire.EXEC, b"short"),
        wire.request(wire.STAT, struct.pack("<II", 0, 0xFFFFFFF0) + b"x"),
        wire.request(wire.STAT, struct.pack("<II", 0, 1) + b"xy"),
        wire.request(wire.STAT, struct.pack("<II", 0, 3) + b"a\0b\0"),
        wire.frame(wire.SIGNAL, b"x"),
    ],
)
def test_malformed_frames_end_the_connection_only(client: AgentClient, connect: Connect, data: bytes) -> None:
    with connect() as sock:
        sock.sendall(data)
        received = answer(sock)
    assert received[4] == wire.ERROR
    assert client.ping() < 5


def test_another_version_is_told(connect: Connect) -> None:
    with connect() as sock:
        sock.sendall(wire.frame(wire.PING, b"", 99))
        received = answer(sock)
    assert wire.refusal(received[8:])[1] == "protocol version"


def test_more_input_than_granted_ends_the_command(agent: Agent, connect: Connect) -> None:
    request = wire.ExecRequest(argv=["sleep", "1000"], stdin=wire.STDIO_STREAM).encode()
    with connect() as sock:
        sock.sendall(request + wire.frame(wire.DATA, bytes(65536)) * 4)
        assert b"more input than was granted" in answer(sock)
    assert wait_until(lambda: not agent.children())


def test_frames_that_cross_the_end_of_a_command_are_dropped(connect: Connect) -> None:
    late = wire.frame(wire.DATA, b"late") + wire.frame(wire.END) + wire.frame(wire.SIGNAL, struct.pack("<I", 9))
    with connect() as sock:
        sock.sendall(wire.ExecRequest(argv=["true"]).encode())
        parser = wire.FrameParser()
        while (frame := parser.pop()) is None:
            parser.feed(sock.recv(65536))
        assert frame.type == wire.EXIT
        sock.sendall(late + wire.request(wire.PING, b"still there"))
        while (frame := parser.pop()) is None:
            parser.feed(sock.recv(65536))
    assert frame == (wire.OK, 0, b"still there")


def test_a_request_in_pieces_is_understood(connect: Connect) -> None:
    with connect() as sock:
        for byte in wire.request(wire.PING, b"slow"):
            sock.sendall(bytes([byte]))
        assert answer_frame(sock).payload == b"slow"


def answer_frame(sock: socket.socket) -> wire.Frame:
    parser = wire.FrameParser()
    while (frame := parser.pop()) is None:
        data = sock.recv(65536)
        assert data
        parser.feed(data)
    return frame


HARMLESS = [wire.PING, wire.INFO, wire.CLOCK_SET, wire.RESEED, wire.FILE_READ, wire.STAT, wire.LIST, wire.THAW]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.builds(wire.frame, st.sampled_from(HARMLESS), st.binary(max_size=200), st.integers(0, 3)),
            st.builds(wire.frame, st.integers(0x40, 0xFF), st.binary(max_size=200), st.integers(0, 3)),
            st.builds(wire.frame, st.just(wire.EXEC), st.binary(max_size=80), st.just(1)),
        ),
        max_size=5,
    ),
    st.binary(max_size=20),
)
def test_no_bytes_end_the_agent(agent: Agent, frames: list[bytes], tail: bytes) -> None:
    with agent.connect() as sock:
        try:
            sock.sendall(b"".join(frames) + tail)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert agent.process.poll() is None
    with agent.connect() as sock:
        sock.sendall(wire.request(wire.PING, b"x"))
        assert answer_frame(sock).payload == b"x"


def test_many_connections_are_served_and_forgotten(agent: Agent, connect: Connect) -> None:
    before = len(agent.open_files())
    socks = [connect() for _ in range(200)]
    for sock in socks:
        sock.sendall(wire.request(wire.PING, b"x"))
    for sock in socks:
        assert answer_frame(sock).payload == b"x"
        sock.close()
    assert wait_until(lambda: len(agent.open_files()) <= before)


def test_idle_agent_sleeps(agent: Agent, client: AgentClient) -> None:
    with client.start(["sleep", "30"]):
        fields = Path(f"/proc/{agent.process.pid}/stat").read_text().split()
        time.sleep(0.5)
        assert Path(f"/proc/{agent.process.pid}/stat").read_text().split()[13:15] == fields[13:15]


def test_information(client: AgentClient) -> None:
    info = client.info()
    assert info.memory_total > info.memory_available > 0
    assert abs(info.clock_ns / 1e9 - time.time()) < 5
    assert info.processes > 0


def test_a_test_agent_leaves_the_clock_alone(client: AgentClient) -> None:
    with pytest.raises(ExecError, match="not process 1"):
        client.set_clock(0)
    with pytest.raises(ExecError, match="not process 1"):
        client.reseed()
    client.sync()
    client.freeze()
    client.thaw()


def test_shutdown_asks_commands_to_end_and_then_ends_them(tmp_path: Path) -> None:
    with running_agent(tmp_path) as agent, AgentClient(agent.connect) as client:
        polite = client.start(["sh", "-c", f"trap 'touch {tmp_path}/asked; exit' TERM; echo up; while :; do sleep 0.1; done"])
        stubborn = client.start(["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
        for process in (polite, stubborn):
            assert process.stdout
            process.stdout.readline()
        client.shutdown(grace_s=0.5)
        assert agent.process.wait(10) == 0
        assert (tmp_path / "asked").exists()
        for process in (polite, stubborn):
            process.close()


def test_outside_a_machine_it_does_nothing() -> None:
    result = subprocess.run([BINARY], capture_output=True, text=True)
    assert result.returncode == 64
    assert "process 1" in result.stderr

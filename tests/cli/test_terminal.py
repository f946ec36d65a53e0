"""Raw mode is undone, input is pumped, output to a closed pipe is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from microvm.cli import terminal


@pytest.fixture
def pty() -> Iterator[tuple[int, int]]:
    master, slave = os.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def test_raw_mode_is_undone(pty: tuple[int, int]) -> None:
    before = termios.tcgetattr(pty[1])
    with terminal.raw(pty[1]):
        assert not termios.tcgetattr(pty[1])[3] & termios.ICANON
    assert termios.tcgetattr(pty[1]) == before


def test_raw_mode_is_undone_after_an_error(pty: tuple[int, int]) -> None:
    before = termios.tcgetattr(pty[1])
    with pytest.raises(RuntimeError), terminal.raw(pty[1]):
        raise RuntimeError
    assert termios.tcgetattr(pty[1]) == before


def test_raw_mode_is_undone_when_the_program_exits_inside(pty: tuple[int, int]) -> None:
    before = termios.tcgetattr(pty[1])
    program = "import sys; from microvm.cli import terminal; terminal.raw(0).__enter__(); sys.exit(3)"
    done = subprocess.run([sys.executable, "-c", program], stdin=pty[1], timeout=60)
    assert done.returncode == 3
    assert termios.tcgetattr(pty[1]) == before


def test_what_is_no_terminal_is_said_to_be_none(pty: tuple[int, int]) -> None:
    assert terminal.is_terminal(pty[1])
    read, write = os.pipe()
    assert not terminal.is_terminal(read)
    os.close(read)
    os.close(write)
    assert not terminal.is_terminal(read)
    assert not terminal.is_open(read)
    assert terminal.size(pty[1])[0] > 0
    assert terminal.size(write) == (80, 24)


def test_resize_signal_is_passed_on_and_the_handler_restored() -> None:
    sizes: list[tuple[int, int]] = []
    before = signal.getsignal(signal.SIGWINCH)
    with terminal.on_resize(lambda columns, rows: sizes.append((columns, rows))):
        os.kill(os.getpid(), signal.SIGWINCH)
        deadline = time.monotonic() + 5
        while not sizes:
            assert time.monotonic() < deadline
            time.sleep(0.001)
    assert signal.getsignal(signal.SIGWINCH) == before


def test_pump_hands_on_input_and_its_end() -> None:
    read, write = os.pipe()
    received: list[bytes] = []
    ended = threading.Event()

    def take(data: bytes) -> None:
        received.append(data)
        if not data:
            ended.set()

    pump = terminal.InputPump(read, take)
    pump.start()
    os.write(write, b"hello")
    os.close(write)
    assert ended.wait(5)
    pump.close()
    pump.close()
    assert b"".join(received) == b"hello"
    os.close(read)


def test_pump_that_waits_for_input_can_be_closed() -> None:
    read, write = os.pipe()
    before = threading.active_count()
    pump = terminal.InputPump(read, lambda data: None)
    pump.start()
    pump.close()
    assert threading.active_count() == before
    os.write(write, b"kept")
    assert os.read(read, 10) == b"kept"
    os.close(read)
    os.close(write)


def test_closed_pipe_is_noticed() -> None:
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        terminal.write_all(write, b"x")
    os.close(write)


def test_everything_is_written_to_a_slow_non_blocking_reader() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    got = bytearray()

    def drain() -> None:
        while data := os.read(read, 65536):
            got.extend(data)

    reader = threading.Thread(target=drain)
    reader.start()
    terminal.write_all(write, bytes(1 << 20))
    os.close(write)
    reader.join(5)
    os.close(read)
    assert len(got) == 1 << 20

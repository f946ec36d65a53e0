"""The terminal this command runs on: raw mode that is always undone, its size, and reading it on a thread."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STDIN = 0
STDOUT = 1
STDERR = 2


def is_terminal(fd: int) -> bool:
    """Whether ``fd`` is open and a terminal."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def is_open(fd: int) -> bool:
    """Whether ``fd`` is open at all: a shell can start a program without its standard streams."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def size(fd: int = STDOUT) -> tuple[int, int]:
    """Columns and rows, 80 x 24 where there is no terminal."""
    try:
        found = os.get_terminal_size(fd)
    except (OSError, ValueError):
        return 80, 24
    return found.columns or 80, found.lines or 24


@contextlib.contextmanager
def raw(fd: int = STDIN) -> Iterator[None]:
    """Pass keys on as they are typed, Ctrl-C included. Undone on leaving and, should that fail, at exit."""
    if sys.platform == "win32":
        with _raw_console():
            yield
    else:
        import termios
        import tty

        before = termios.tcgetattr(fd)

        def restore() -> None:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(fd, termios.TCSADRAIN, before)

        atexit.register(restore)
        try:
            tty.setraw(fd, termios.TCSANOW)
            yield
        finally:
            restore()
            atexit.unregister(restore)


@contextlib.contextmanager
def on_resize(changed: Callable[[int, int], None], fd: int = STDOUT) -> Iterator[None]:
    """Call ``changed(columns, rows)`` whenever the terminal's size changes. Main thread only."""
    if sys.platform == "win32":
        yield
    else:
        import signal

        def handler(_number: int, _frame: FrameType | None) -> None:
            changed(*size(fd))

        before = signal.signal(signal.SIGWINCH, handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGWINCH, before)


class InputPump:
    """A thread that reads a descriptor and hands on what comes, until its end or `close`.

    ``received`` gets each piece and then ``b""`` at the end of the input; an exception it raises ends the pump.
    """

    def __init__(self, fd: int, received: Callable[[bytes], object]) -> None:
        self._fd = fd
        self._received = received
        self._wake_r, self._wake_w = os.pipe()
        self._thread = threading.Thread(target=self._main, name="stdin", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End the thread. What was typed but not read stays in the terminal."""
        if self._wake_w < 0:
            return
        os.close(self._wake_w)
        self._wake_w = -1
        # A receiver blocked on a full stream, or a console read that cannot be interrupted, must not hold up the exit.
        self._thread.join(1.0)
        if not self._thread.is_alive():
            os.close(self._wake_r)

    def _main(self) -> None:
        try:
            while self._wait():
                data = os.read(self._fd, 65536)
                self._received(data)
                if not data:
                    break
        except OSError:
            with contextlib.suppress(Exception):
                self._received(b"")

    def _wait(self) -> bool:
        """Wait for input. False when `close` was called."""
        if sys.platform == "win32":
            return self._wake_w >= 0
        import select

        poll = select.poll()  # unlike epoll it takes regular files, unlike select descriptors over 1023
        poll.register(self._fd, select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        return not any(fd == self._wake_r for fd, _ in poll.poll())


def write_all(fd: int, data: bytes) -> None:
    """Write everything. Raises BrokenPipeError where the reader has gone."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            _writable(fd)


def _writable(fd: int) -> None:
    """Wait until ``fd``, which someone else made non-blocking, takes data again."""
    if sys.platform != "win32":
        import select

        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        poll.poll()


if sys.platform == "win32":

    @contextlib.contextmanager
    def _raw_console() -> Iterator[None]:
        """[console] SetConsoleMode: no line editing, no echo, no Ctrl-C processing, escape sequences both ways."""
        import ctypes

        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        modes = []
        for number, clear, add in ((-10, 0x7, 0x200), (-11, 0, 0x4)):
            handle = kernel32.GetStdHandle(number)
            mode = ctypes.c_uint32()
            if kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
                modes.append((handle, mode.value))
                kernel32.SetConsoleMode(handle, mode.value & ~clear | add)
        try:
            yield
        finally:
            for handle, value in modes:
                kernel32.SetConsoleMode(handle, value)

"""A connected socket as a channel of frames, with deadlines. One thread may send while another receives."""

from __future__ import annotations

import select
import socket
import sys
import time
from typing import Final

from ..errors import ExecError
from . import protocol as wire

_RECEIVE: Final = 64 << 10
LOST: Final = "the connection to the guest was lost"


def _wait(sock: socket.socket, writing: bool, deadline: float | None) -> None:
    """Wait until the socket is ready. Raises TimeoutError when the monotonic time ``deadline`` passes first."""
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            left = 0.0
        fd = sock.fileno()
        if fd < 0:
            raise ExecError(LOST)
        if sys.platform != "win32":  # select() fails for descriptors above 1023
            poller = select.poll()
            poller.register(fd, select.POLLOUT if writing else select.POLLIN)
            ready = bool(poller.poll(None if left is None else left * 1000))
        else:
            sets: tuple[list[int], list[int]] = ([], [fd]) if writing else ([fd], [])
            ready = any(select.select(*sets, [], left))
        if ready:
            return
        if left == 0:
            raise TimeoutError


class Channel:
    """Owns its socket. Every method may raise ExecError for a lost connection or a guest that breaks the protocol."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._parser = wire.FrameParser()
        self.closed = False

    def send(self, data: bytes, deadline: float | None = None) -> None:
        """Send all of ``data``. Raises TimeoutError at the deadline: the channel is useless then."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except (BlockingIOError, InterruptedError):
                _wait(self._sock, True, deadline)
            except OSError as error:
                raise ExecError(LOST) from error

    def receive(self, deadline: float | None = None) -> wire.Frame:
        """The next frame. Raises TimeoutError at the deadline; nothing is lost then."""
        while (found := self._parser.pop()) is None:
            if not self.fill(deadline):
                raise ExecError(LOST)
        return found

    def pop(self) -> wire.Frame | None:
        """A frame that has arrived already."""
        return self._parser.pop()

    def fill(self, deadline: float | None) -> bool:
        """Receive once. Returns whether the other side is still there."""
        while True:
            try:
                data = self._sock.recv(_RECEIVE)
            except (BlockingIOError, InterruptedError):
                _wait(self._sock, False, deadline)
                continue
            except OSError:
                return False
            self._parser.feed(data)
            return bool(data)

    @property
    def fresh(self) -> bool:
        """Whether the next request can use it: open, and nothing has come that nobody asked for."""
        if self.closed or not self._parser.empty:
            return False
        try:
            return bool(self._sock.recv(1, socket.MSG_PEEK)) and False
        except (BlockingIOError, InterruptedError):
            return True
        except OSError:
            return False

    def release(self) -> socket.socket:
        """The socket, for another owner; this channel is over."""
        self.closed = True
        return self._sock

    def hang_up(self) -> None:
        """End the connection under a thread that waits on it; that thread then sees it lost."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """End the connection. The guest ends what ran on it."""
        self.closed = True
        self._sock.close()

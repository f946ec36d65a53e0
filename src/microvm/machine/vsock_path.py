"""A guest's sockets as Unix sockets on a path, as Firecracker's documentation defines it.

Whoever connects to PATH and sends ``CONNECT <port>\\n`` gets ``OK <port on the host's side>\\n`` once the guest
accepts, or the end of the stream. A guest that connects to port N of the host reaches whoever listens on ``PATH_N``.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Final

from ..errors import ConfigError, HostError, MicroVMError
from ..spec.virtio_vsock import MAX_PORT
from .reactor import Timer
from .vsock_pump import Pump, Pumps

HANDSHAKE_TIMEOUT_S: Final = 10.0
"""From connecting to the path until the guest has accepted."""

MAX_LINE: Final = 32
"""Bytes of a request line. ``CONNECT 4294967294`` and its newline take 19."""

_AF_UNIX: Final[int] = getattr(socket, "AF_UNIX", -1)
_BACKLOG: Final = 128
_ACCEPT_BATCH: Final = 16
_ACCEPT_RETRY_S: Final = 0.1


class UnixDoor:
    """The listening socket at ``path``. Made and closed on any thread, served on the I/O thread.

    Raises ConfigError if the path is in use or cannot be a socket's, HostError if this host has no Unix sockets.
    """

    def __init__(self, pumps: Pumps, path: str) -> None:
        self._pumps = pumps
        self._path = path
        self._calls: set[_Call] = set()
        self._closed = False
        self._sock = _listen(path)
        info = os.lstat(path)
        self._identity = (info.st_dev, info.st_ino)
        pumps.reactor.add_reader(self._sock.fileno(), self._accept)

    def connect_out(self, port: int) -> socket.socket | None:
        """A socket connected to ``PATH_<port>``, or None if nobody listens there."""
        sock = socket.socket(_AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)  # a full backlog refuses instead of holding up every device
            sock.connect(f"{self._path}_{port}")
        except OSError:
            sock.close()
            return None
        return sock

    def close(self) -> None:
        """Stop listening, remove the path if it is still ours, drop requests half made. Idempotent. I/O thread."""
        if self._closed:
            return
        self._closed = True
        for call in list(self._calls):
            call.end()
        self._pumps.reactor.remove(self._sock.fileno())
        self._sock.close()
        try:
            info = os.lstat(self._path)
            if stat.S_ISSOCK(info.st_mode) and (info.st_dev, info.st_ino) == self._identity:
                os.unlink(self._path)
        except OSError:
            pass  # gone already, or not ours to remove

    def _accept(self) -> None:
        for _ in range(_ACCEPT_BATCH):
            try:
                sock = self._sock.accept()[0]
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:
                # Out of descriptors. The connection stays in the backlog and would wake us at once again.
                self._pumps.reactor.remove(self._sock.fileno())
                self._pumps.reactor.call_later(_ACCEPT_RETRY_S, self._listen_again)
                return
            sock.setblocking(False)
            self._calls.add(_Call(self._pumps, self._calls, sock))

    def _listen_again(self) -> None:
        if not self._closed:
            self._pumps.reactor.add_reader(self._sock.fileno(), self._accept)


class _Call:
    """Somebody who has connected to the path and not yet been put through."""

    def __init__(self, pumps: Pumps, calls: set[_Call], sock: socket.socket) -> None:
        self._pumps = pumps
        self._calls = calls
        self._sock = sock
        self._line = b""
        self._pump: Pump | None = None
        self._timer: Timer = pumps.reactor.call_later(HANDSHAKE_TIMEOUT_S, self.end)
        pumps.reactor.add_reader(sock.fileno(), self._read)

    def end(self) -> None:
        """Hang up."""
        self._timer.cancel()
        self._calls.discard(self)
        if self._pump is not None:
            self._pump.give_up()
        else:
            self._pumps.reactor.remove(self._sock.fileno())
            self._sock.close()

    def _read(self) -> None:
        try:
            # Looked at first: what follows the line is for the guest and stays where it is.
            peeked = self._sock.recv(MAX_LINE - len(self._line), socket.MSG_PEEK)
            newline = peeked.find(b"\n")
            self._line += self._sock.recv(len(peeked) if newline < 0 else newline + 1)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.end()
            return
        if newline >= 0:
            self._put_through()
        elif not peeked:
            self.end()  # the end of the stream, or no room left in the line

    def _put_through(self) -> None:
        port = _parse(self._line)
        if port is None:
            self.end()
            return
        self._pumps.reactor.remove(self._sock.fileno())
        self._pump = pump = Pump(self._pumps, self._sock)
        pump.on_ready = self._ready
        try:
            pump.connect(port)
        except MicroVMError:
            self.end()

    def _ready(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._calls.discard(self)
        pump = self._pump
        if error is None and pump is not None and pump.connection is not None:
            try:
                self._sock.send(b"OK %d\n" % pump.connection.host_port)
            except OSError:
                pump.give_up()


def _parse(line: bytes) -> int | None:
    words = line.split()
    if len(words) != 2 or words[0] != b"CONNECT" or not words[1].isdigit():
        return None
    port = int(words[1])
    return port if port <= MAX_PORT else None


def _listen(path: str) -> socket.socket:
    if _AF_UNIX < 0:
        raise HostError("socket", 0, "this host has no Unix sockets", "use MicroVM.vsock.connect and listen instead")
    sock = socket.socket(_AF_UNIX, socket.SOCK_STREAM)
    bound = False
    try:
        sock.setblocking(False)
        sock.bind(path)
        bound = True
        # Nobody can connect before listen(), so there is no moment with the permissions of the umask.
        os.chmod(path, 0o600)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if bound:
            os.unlink(path)
        raise ConfigError("vsock path", path, _reason(path, error)) from error
    return sock


def _reason(path: str, error: OSError) -> str:
    if os.path.lexists(path):
        return "the path is in use; remove it if nobody serves it any more"
    return (error.strerror or str(error)).lower()

"""One socket of the host, pumped to and from one connection of the guest.

A socket the guest does not read from, or the host does not, is not watched until that changes, so nothing spins, and
each direction costs one wake-up. Bytes are received into the guest's buffers and sent from them: no copy is made here.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .._os.scatter import receive_into, send_from
from ..devices.vsock import Connection, Vsock
from ..spec.virtio_vsock import Shutdown
from .reactor import Reactor

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CLOSE_TIMEOUT_S: Final = 8.0
"""How long a guest may take to answer that it is done with a connection; Linux gives its peers as long."""


class Link:
    """What the two halves of a socket pair share: whether the stream broke rather than ended."""

    __slots__ = ("broken",)

    def __init__(self) -> None:
        self.broken = False


class VsockStream(socket.socket):
    """A caller's half of a connection: a socket that can tell a broken stream from one that has ended.

    A pair of local sockets knows no reset, so reading past the last byte of a connection that the guest broke off, or
    that ended with the machine, raises ConnectionResetError here instead of returning the empty string.
    """

    link: Link

    @classmethod
    def wrap(cls, half: socket.socket, link: Link) -> VsockStream:
        """Take over ``half``, which is empty afterwards."""
        stream = cls(half.family, half.type, half.proto, fileno=half.detach())
        stream.link = link
        return stream

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        data = super().recv(bufsize, flags)
        if not data and bufsize:
            self._check()
        return data

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        count = super().recv_into(buffer, nbytes, flags)
        if not count and (nbytes or memoryview(buffer).nbytes):
            self._check()
        return count

    def _check(self) -> None:
        if self.link.broken:
            raise ConnectionResetError(errno.ECONNRESET, "the guest, or the end of its machine, broke off the stream")


class Pumps:
    """All pumps of one device, and what they need."""

    def __init__(self, device: Vsock, reactor: Reactor) -> None:
        self.device = device
        self.reactor = reactor
        self.all: set[Pump] = set()

    def on_io_thread(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the I/O thread: now if this is it, or if there is none any more."""
        reactor = self.reactor
        if reactor.in_thread() or not reactor.running:
            function()
        else:
            reactor.call_soon_threadsafe(function)

    def reset_later(self, connection: Connection) -> None:
        """Give the guest some time to answer a shutdown, then end the connection without it."""

        def reset() -> None:
            with self.device.batch():
                connection.reset()

        if not connection.closed:
            self.reactor.call_later(CLOSE_TIMEOUT_S, reset)

    def abort_all(self) -> None:
        """The machine stops. I/O thread, or none any more."""
        for pump in list(self.all):
            pump.abort()


class Pump:
    """An `Endpoint` that is a socket, which it owns. All methods but the endpoint's run on the I/O thread.

    ``on_ready(error)`` hears once whether the guest accepted (None), refused, or did not live to answer.
    """

    __slots__ = (
        "_armed",
        "_end_of_input",
        "_failed",
        "_full",
        "_pumps",
        "closed",
        "connection",
        "link",
        "on_ready",
        "sock",
    )

    def __init__(self, pumps: Pumps, sock: socket.socket) -> None:
        self._pumps = pumps
        self.sock = sock
        self.link = Link()
        self.connection: Connection | None = None
        self.on_ready: Callable[[Exception | None], None] | None = None
        self.closed = False
        self._armed = False
        self._full = False
        self._end_of_input = False
        self._failed = False
        sock.setblocking(False)
        pumps.all.add(self)

    def connect(self, guest_port: int) -> None:
        """Ask the guest for a connection to ``guest_port``. Raises ConfigError, StateError."""
        with self._pumps.device.lock:  # so that no answer comes before we know what it is for
            self.connection = self._pumps.device.connect(guest_port, self)

    def arm(self) -> None:
        """Read from the socket as soon as it has something."""
        if not self._armed and not self.closed:
            self._armed = True
            self._pumps.reactor.add_reader(self.sock.fileno(), self._readable)

    def abort(self) -> None:
        """The machine stops: both ends learn that the stream is broken."""
        self.link.broken = True
        self._report(ConnectionAbortedError(errno.ECONNABORTED, "the machine stopped"))
        self.give_up()

    def give_up(self) -> None:
        """Reset the connection and close the socket. Any thread."""
        connection = self.connection
        if connection is not None:
            with self._pumps.device.batch():
                connection.reset()
        self._pumps.on_io_thread(self.close)

    def close(self) -> None:
        """Let go of the socket. Idempotent."""
        if not self.closed:
            self.closed = True
            self._pumps.all.discard(self)
            self._pumps.reactor.remove(self.sock.fileno())
            self.sock.close()

    # For the device.

    def on_connected(self) -> None:
        self._report(None)
        self.arm()

    def on_data(self, views: list[memoryview]) -> int:
        if self._full:
            return 0
        total = 0
        for view in views:
            total += len(view)
        try:
            taken = send_from(self.sock, views)
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError:
            # The reader is gone. The guest learns it from the RST, as it would from a peer on a network.
            self.give_up()
            return 0
        if taken < total:
            self._full = True
            self._pumps.reactor.add_writer(self.sock.fileno(), self._writable)
        return taken

    def on_writable(self) -> None:
        self._move()

    def on_shutdown(self, flags: int) -> None:
        try:
            if flags & Shutdown.SEND:
                self.sock.shutdown(socket.SHUT_WR)
            if flags & Shutdown.RECEIVE:
                self._disarm()
                self.sock.shutdown(socket.SHUT_RD)
                self._watch_hangup()
        except OSError:
            self.give_up()

    def on_closed(self, reset: bool) -> None:
        self.link.broken = reset
        self._report(ConnectionRefusedError(errno.ECONNREFUSED, "the guest refused the connection"))
        self._pumps.on_io_thread(self.close)

    # For the reactor.

    def _readable(self) -> None:
        with self._pumps.device.batch():
            self._move()

    def _writable(self) -> None:
        with self._pumps.device.batch():
            connection = self.connection
            if connection is None or self.closed:
                return
            self._full = False
            connection.resume()
            if not self._full and not self.closed:
                self._pumps.reactor.remove_writer(self.sock.fileno())

    def _hung_up(self) -> None:
        connection = self.connection
        if connection is not None:
            with self._pumps.device.batch():
                connection.shutdown(Shutdown.BOTH)
                self._pumps.reset_later(connection)
        self.close()

    def _move(self) -> None:
        connection = self.connection
        if connection is None or self.closed or self._end_of_input:
            return
        more = connection.fill(self._read)
        if self._failed:
            self.give_up()
        elif self._end_of_input:
            self._disarm()
            connection.shutdown(Shutdown.SEND)
            self._watch_hangup()
        elif more:
            self.arm()
        else:
            self._disarm()  # until on_writable: a socket nobody may read from would wake us for ever

    def _read(self, views: list[memoryview]) -> int:
        try:
            count = receive_into(self.sock, views)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._failed = True
            return 0
        if not count:
            self._end_of_input = True
        return count

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._pumps.reactor.remove_reader(self.sock.fileno())

    def _watch_hangup(self) -> None:
        if not self.closed:
            self._pumps.reactor.add_hangup(self.sock.fileno(), self._hung_up)

    def _report(self, error: Exception | None) -> None:
        ready, self.on_ready = self.on_ready, None
        if ready is not None:
            ready(error)

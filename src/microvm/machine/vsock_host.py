"""The host's end of a guest's sockets: Python streams, and optionally Unix sockets on a path."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections import deque
from typing import Final

from ..devices.vsock import FIRST_HOST_PORT, Connection, Endpoint, Vsock
from ..errors import ConfigError, StateError
from .reactor import Reactor
from .vsock_path import UnixDoor
from .vsock_pump import Pump, Pumps, VsockStream

MAX_BACKLOG: Final = 1024
"""Connections that wait in a listener; the guest can fill it, and each costs two descriptors."""


class VsockListener:
    """A port of the host on which the guest can connect. Made by `VsockHost.listen`; any thread."""

    def __init__(self, host: VsockHost, port: int, backlog: int) -> None:
        self._host = host
        self.port = port
        self._backlog = backlog
        self._ready: deque[VsockStream] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> VsockListener:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def accept(self, timeout_s: float | None = None) -> VsockStream:
        """The next connection the guest made, oldest first; the caller owns it.

        Raises TimeoutError, or ConnectionAbortedError once the listener is closed or the machine has stopped.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._ready:
                if self._closed:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "the listener is closed")
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError(f"no connection to port {self.port} within {timeout_s} s")
                self._changed.wait(left)
            return self._ready.popleft()

    def close(self) -> None:
        """Refuse from now on, and close the connections nobody accepted. Idempotent."""
        self._host.unlisten(self)
        with self._changed:
            self._closed = True
            left, self._ready = self._ready, deque()
            self._changed.notify_all()
        for stream in left:
            stream.close()

    def offer(self, pumps: Pumps) -> Pump | None:
        """The machine's half of a new connection, or None if too many wait already. With the device's lock held."""
        with self._changed:
            if self._closed or len(self._ready) >= self._backlog:
                return None
            try:
                ours, theirs = socket.socketpair()
            except OSError:
                return None  # out of descriptors: refused, like any other lack of room
            pump = Pump(pumps, ours)
            self._ready.append(VsockStream.wrap(theirs, pump.link))
            self._changed.notify()
        return pump


class VsockHost:
    """Connects the guest's sockets with the host's. One for a device.

    ``path`` names the Unix socket to serve, or None. `start` opens it, `close` removes it and ends every connection;
    call `close` before the reactor stops. Everything else works from any thread while the machine runs.
    """

    def __init__(self, device: Vsock, reactor: Reactor, path: str | os.PathLike[str] | None = None) -> None:
        self._pumps = Pumps(device, reactor)
        self._reactor = reactor
        self._path = None if path is None else os.fspath(path)
        self._listeners: dict[int, VsockListener] = {}
        self._lock = threading.Lock()
        self._door: UnixDoor | None = None
        self._closed = False
        device.accept = self._accept

    def start(self) -> None:
        """Open the path, if there is one. Raises ConfigError if it is in use, HostError without Unix sockets."""
        if self._path is not None and self._door is None:
            self._door = UnixDoor(self._pumps, self._path)

    def connect(self, port: int, timeout_s: float | None = None) -> VsockStream:
        """A stream connected to ``port`` of the guest; the caller owns it.

        Waits for the guest's driver if it is not up yet. Raises ConnectionRefusedError, TimeoutError,
        ConnectionAbortedError if the machine stops meanwhile, ConfigError for a port that cannot be, StateError if the
        machine does not run or too many connections are open.
        """
        decided = threading.Event()
        outcome: list[Exception | None] = []
        ours, theirs = socket.socketpair()

        def ready(error: Exception | None) -> None:
            outcome.append(error)
            decided.set()

        def begin() -> Pump:
            if self._closed:
                raise StateError("the machine is not running")
            pump = Pump(self._pumps, ours)
            pump.on_ready = ready
            try:
                pump.connect(port)
            except BaseException:
                pump.close()
                raise
            return pump

        try:
            pump = self._reactor.call_and_wait(begin)
        except BaseException:
            ours.close()
            theirs.close()
            raise
        stream = VsockStream.wrap(theirs, pump.link)
        try:
            if not decided.wait(timeout_s):
                raise TimeoutError(f"the guest did not answer on port {port} within {timeout_s} s")
            error = outcome[0]
            if error is not None:
                raise error
        except BaseException:
            self._pumps.on_io_thread(pump.give_up)
            stream.close()
            raise
        return stream

    def listen(self, port: int, backlog: int = 128) -> VsockListener:
        """Accept the guest's connections to ``port`` of the host; at most ``backlog`` wait, more are refused.

        Takes precedence over ``PATH_<port>``. Raises ConfigError, or StateError if the port is listened on already.
        """
        if not 0 <= port < FIRST_HOST_PORT:
            raise ConfigError("vsock port", port, f"a number from 0 to {FIRST_HOST_PORT - 1}")
        if not 0 < backlog <= MAX_BACKLOG:
            raise ConfigError("backlog", backlog, f"a number from 1 to {MAX_BACKLOG}")
        with self._lock:
            if self._closed:
                raise StateError("the machine is not running")
            if port in self._listeners:
                raise StateError(f"port {port} is listened on already")
            listener = self._listeners[port] = VsockListener(self, port, backlog)
        return listener

    def unlisten(self, listener: VsockListener) -> None:
        """For `VsockListener.close`."""
        with self._lock:
            if self._listeners.get(listener.port) is listener:
                del self._listeners[listener.port]

    def close(self) -> None:
        """The machine stops: end every connection, wake everybody who waits, remove the path. Idempotent."""
        with self._lock:
            self._closed = True
            listeners = list(self._listeners.values())
        for listener in listeners:
            listener.close()
        try:
            self._reactor.call_and_wait(self._end)
        except StateError:
            self._end()  # the reactor has stopped, or never started: nobody else touches the sockets

    def forked(self) -> None:
        """In a forked child with its I/O thread suspended: streams are the parent's, the guest's ends are reset."""
        self._lock = threading.Lock()
        self._listeners.clear()
        self._door = None
        for pump in list(self._pumps.all):
            pump.give_up()

    def _end(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            door.close()
        self._pumps.abort_all()

    def _accept(self, connection: Connection) -> Endpoint | None:
        pump: Pump | None = None
        listener = self._listeners.get(connection.host_port)
        if listener is not None:
            pump = listener.offer(self._pumps)
        elif self._door is not None:
            sock = self._door.connect_out(connection.host_port)
            if sock is not None:
                pump = Pump(self._pumps, sock)
        if pump is not None:
            pump.connection = connection
            pump.arm()
        return pump

"""A wake-up that a selector can wait for and that C code or a hypervisor can set."""

from __future__ import annotations

import os
import socket
import sys


class Event:
    """A sticky flag with a file descriptor that is readable while it is set.

    On Linux an eventfd, so a hypervisor (ioeventfd, irqfd) or the C shim can set it without Python; elsewhere a
    socket pair, which is what selectors can wait for on every system. Any thread may set or clear it.
    """

    __slots__ = ("_closed", "_reader", "_writer", "fd")

    def __init__(self) -> None:
        self._reader: socket.socket | None = None
        self._writer: socket.socket | None = None
        self._closed = False
        if sys.platform == "linux":
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        else:
            self._reader, self._writer = socket.socketpair()
            self._reader.setblocking(False)
            self._writer.setblocking(False)
            self.fd = self._reader.fileno()

    def fileno(self) -> int:
        """The descriptor to wait on for reading."""
        return self.fd

    def set(self) -> None:
        """Make the descriptor readable. Does nothing once closed."""
        if self._closed:
            return
        try:
            if sys.platform == "linux":
                os.eventfd_write(self.fd, 1)
            else:
                assert self._writer is not None
                self._writer.send(b"\1")
        except BlockingIOError:
            pass  # already set as often as it can be

    def clear(self) -> bool:
        """Take the flag back. Returns whether it was set."""
        try:
            if sys.platform == "linux":
                os.eventfd_read(self.fd)
                return True
            assert self._reader is not None
            return bool(self._reader.recv(4096))
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Free the descriptor. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if sys.platform == "linux":
            os.close(self.fd)
        else:
            assert self._reader is not None
            assert self._writer is not None
            self._reader.close()
            self._writer.close()

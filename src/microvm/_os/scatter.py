"""Scatter and gather on a stream socket, where the host has it and where it does not (Windows)."""

from __future__ import annotations

import socket
import sys
from typing import Final

MAX_VIEWS: Final = 1024  # IOV_MAX of every system we know; more in one call is EMSGSIZE or EINVAL

if sys.platform != "win32":

    def receive_into(sock: socket.socket, views: list[memoryview]) -> int:
        """Fill ``views`` in order from a stream socket. Returns the bytes received, 0 at the end of the stream.

        Raises BlockingIOError if nothing is there, OSError as ``recvmsg`` does.
        """
        if len(views) == 1:
            return sock.recv_into(views[0])
        return sock.recvmsg_into(views[:MAX_VIEWS])[0]

    def send_from(sock: socket.socket, views: list[memoryview]) -> int:
        """Send ``views`` in order. Returns how many bytes the socket took.

        Raises BlockingIOError if it takes none now, OSError as ``sendmsg`` does.
        """
        if len(views) == 1:
            return sock.send(views[0])
        return sock.sendmsg(views[:MAX_VIEWS])

else:

    def receive_into(sock: socket.socket, views: list[memoryview]) -> int:
        """Fill ``views`` in order from a stream socket. Returns the bytes received, 0 at the end of the stream.

        Raises BlockingIOError if nothing is there, OSError as ``recv`` does.
        """
        total = 0
        for view in views:
            try:
                count = sock.recv_into(view)
            except BlockingIOError:
                if total:
                    break
                raise
            total += count
            if count < len(view):
                break
        return total

    def send_from(sock: socket.socket, views: list[memoryview]) -> int:
        """Send ``views`` in order. Returns how many bytes the socket took.

        Raises BlockingIOError if it takes none now, OSError as ``send`` does.
        """
        total = 0
        for view in views:
            try:
                count = sock.send(view)
            except BlockingIOError:
                if total:
                    break
                raise
            total += count
            if count < len(view):
                break
        return total

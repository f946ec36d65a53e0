"""Messages between a worker and whoever owns it: JSON in packets of a Unix socket, descriptors alongside."""

from __future__ import annotations

import array
import errno
import json
import os
import socket
import sys
from typing import Any, Final

from .. import errors
from ..errors import BackendUnavailable, ConfigError, HostError, InternalError, MicroVMError
from ..hypervisor import limits

MAX_MESSAGE: Final = 64 << 10
MAX_FDS: Final = 64
Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends that keep messages apart."""
    if sys.platform == "win32":
        raise errors.StateError("workers need Unix sockets")
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, fds: list[int] | None = None) -> None:
    """Send one message. Raises OSError."""
    data = json.dumps(message, separators=(",", ":")).encode()
    if sys.platform == "win32":
        raise OSError("workers need Unix sockets")
    if fds:
        socket.send_fds(sock, [data], fds)
    else:
        sock.send(data)


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """The next message and the descriptors that came with it. Raises EOFError at the end, OSError."""
    if sys.platform != "linux":
        raise EOFError
    data, control, flags, _ = sock.recvmsg(
        MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
    )
    fds = array.array("i")
    for level, kind, payload in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    try:
        if not data:
            raise EOFError
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise OSError(0, "a message was too long")
        message = json.loads(data)
        if not isinstance(message, dict):
            raise OSError(0, "a message was no object")
    except ValueError:
        close_all(list(fds))
        raise OSError(0, "a message could not be read") from None
    except BaseException:
        close_all(list(fds))
        raise
    return message, list(fds)


def close_all(fds: list[int]) -> None:
    """Close descriptors nobody wants."""
    for fd in fds:
        os.close(fd)


def pack_error(error: BaseException) -> Message:
    """An error as part of a message."""
    if isinstance(error, ConfigError):
        return {"kind": "ConfigError", "arguments": [error.field, str(error.value), error.allowed]}
    if isinstance(error, HostError):
        kind = "BackendUnavailable" if isinstance(error, BackendUnavailable) else "HostError"
        return {"kind": kind, "arguments": [error.call, error.code, error.message, error.hint]}
    if isinstance(error, MicroVMError):
        return {"kind": type(error).__name__, "arguments": [str(error)]}
    if isinstance(error, MemoryError | OSError):
        code = errno.ENOMEM if isinstance(error, MemoryError) else error.errno or 0
        withheld = limits.withheld("", code)
        if withheld is not None:
            return pack_error(withheld)
    if isinstance(error, TimeoutError):
        return {"kind": "TimeoutError", "arguments": [str(error)]}
    if isinstance(error, ConnectionError):
        return {"kind": "ConnectionAbortedError", "arguments": [str(error)]}
    return {"kind": "InternalError", "arguments": [f"{type(error).__name__}: {error}"]}


_KINDS: Final = {
    name: getattr(errors, name)
    for name in (
        "ConfigError",
        "HostError",
        "BackendUnavailable",
        "StateError",
        "SnapshotError",
        "ExecError",
        "BootError",
    )
} | {"TimeoutError": TimeoutError, "ConnectionAbortedError": ConnectionAbortedError}


def unpack_error(packed: Message) -> Exception:
    """The error to raise for a packed one."""
    kind = _KINDS.get(str(packed.get("kind")), InternalError)
    arguments = packed.get("arguments")
    error: Exception = kind(*arguments) if isinstance(arguments, list) else InternalError("a worker failed")
    return error

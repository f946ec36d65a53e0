"""The resident zygote of the command line, and ``microvm run`` inside a worker of it.

    python -m microvm.cli.resident CONFIG_FD SOCKET_FD PATH

`fast.py` connects, sends its arguments, environment and standard streams, and waits. The worker forked for it has
every module loaded and a warm guest in memory: it takes the streams for its own and runs the command as if it had been
started from the shell. Signals come as messages, the exit code goes back as one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Final

from ..agent.protocol import Ready
from ..machine.machine import MicroVM
from ..workers import wire, zygote
from . import dispatch, run

if TYPE_CHECKING:
    from ..api import Sandbox

HELLO_TIMEOUT_S: Final = 5.0
_STREAMS: Final = 3


class _Client:
    """Who is at the other end of the socket."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control

    def listen(self) -> None:
        """On a thread: pass signals on; end with the client."""
        try:
            while True:
                message, fds = wire.receive(self.control)
                wire.close_all(fds)
                os.kill(os.getpid(), int(message["signal"]))
        except (EOFError, OSError, KeyError, ValueError):
            os._exit(1)


def serve(control: socket.socket, vm: MicroVM, ready: Ready) -> None:
    """In a new worker: be ``microvm run`` for the client. Does not return."""
    code = 1
    try:
        control.settimeout(HELLO_TIMEOUT_S)
        message, fds = wire.receive(control)
        control.settimeout(None)
        if len(fds) != _STREAMS:
            os._exit(1)
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        sys.stdout = os.fdopen(os.dup(1), "w")
        sys.stderr = os.fdopen(os.dup(2), "w")
        os.environ.clear()
        os.environ.update(message["environment"])
        with contextlib.suppress(OSError):
            os.chdir(message["directory"])
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_Client(control).listen, daemon=True).start()
        run.given = (vm, ready)
        code = dispatch.main(message["arguments"])
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        wire.send(control, {"exit": code})
    except SystemExit as leaving:
        with contextlib.suppress(OSError):
            wire.send(control, {"exit": leaving.code if isinstance(leaving.code, int) else 1})
    except (EOFError, OSError):
        pass
    finally:
        os._exit(code)


def preload() -> None:
    """Import what a worker will need, once for all of them."""
    import importlib

    for name in ("api", "agent.client", "agent.process", "cli.options", "cli.terminal", "workers.template"):
        importlib.import_module(f"microvm.{name}")
    dispatch.preload("run")


def remember(sandbox: Sandbox, arguments: list[str]) -> None:
    """Write down which socket serves these options, and on what that depends, for `fast.py`."""
    from ..workers import client, template
    from . import fast

    options, _ = fast.split(arguments)
    if options is None:
        return
    config = template.decide(sandbox.config)
    name = template.key(config)
    lines = [repr(options), str(client.runtime_directory() / f"{name}.sock")]
    for path in fast.dependencies([str(config.kernel), *(str(disk.path) for disk in config.disks)]):
        lines.append(f"{fast.stamp(path)} {path}")
    target = fast.note_path(options)
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        temporary = f"{target}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
        os.replace(temporary, target)


if __name__ == "__main__":
    preload()
    sys.exit(zygote.main(sys.argv[1:], serve))

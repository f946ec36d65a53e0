"""``microvm run`` by way of a resident zygote, without loading what a virtual machine needs.

A note in the cache says which socket serves a set of options, and which files that depends on. If there is none, or
anything is in doubt, `attempt` returns None and the ordinary way is taken. Imported first of all: keep it light.
"""

from __future__ import annotations

import _socket
import os
import signal
import sys

VALUED = ("--image", "--kernel", "--memory", "--cpus", "--backend")
COMMAND_VALUED = ("--env", "--workdir", "--user", "--timeout")
FLAGS = ("-i", "--interactive", "-t", "--tty")
FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH")


def split(arguments: list[str]) -> tuple[tuple[str, ...] | None, bool]:
    """The options that say which machine, in order, and whether there is a command. None: not for this module."""
    machine: list[str] = []
    at = 1
    while at < len(arguments):
        word = arguments[at]
        name, equals, value = word.partition("=")
        if word == "--":
            at += 1
            break
        if not word.startswith("-"):
            break
        if name in VALUED or name in COMMAND_VALUED:
            if not equals:
                at += 1
                if at == len(arguments):
                    return None, False
                value = arguments[at]
            if name in VALUED:
                machine += [name, value]
        elif word not in FLAGS:
            return None, False
        at += 1
    return tuple(machine), at < len(arguments)


def cache_root() -> str:
    """As `images.cache.root`, which would load more."""
    if chosen := os.environ.get("MICROVM_CACHE"):
        return chosen
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if base := os.environ.get(variable):
            return os.path.join(base, "microvm")
    return os.path.expanduser("~/.cache/microvm")


def note_path(options: tuple[str, ...]) -> str:
    """Where the note for these options is. Its first line says for which options it is, so any hash will do."""
    import zlib

    return os.path.join(cache_root(), "fast", f"{zlib.crc32(repr(options).encode()):08x}")


def stamp(path: str) -> str:
    """Changes when the file does."""
    try:
        status = os.stat(path)
    except OSError:
        return "0-0"
    return f"{status.st_mtime_ns}-{status.st_size if not os.path.isdir(path) else 0}"


def dependencies(files: list[str]) -> list[str]:
    """Files that decide which template serves a set of options."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    root = cache_root()
    return [
        *files,
        os.path.join(root, "kernels"),
        os.path.join(root, "images"),
        os.path.join(package, "_version.py"),
        os.path.join(package, "agent", "guest", "agent-x86_64"),
        os.path.join(package, "hypervisor", "soft", "_shim.so"),
    ]


def attempt(arguments: list[str]) -> int | None:
    """Have a resident zygote run the command; its exit code, or None if none is up for it."""
    if sys.platform != "linux" or os.environ.get("MICROVM_NO_RESIDENT") or os.environ.get("MICROVM_DEBUG") == "1":
        return None
    options, command = split(arguments)
    if options is None or not command:
        return None
    for fd in range(3):  # before anything is opened, which would take the number of a closed one
        try:
            os.fstat(fd)
        except OSError:
            return None  # the ordinary way knows what to do
    path = _noted_socket(options)
    if path is None:
        return None
    try:
        sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        sock.connect(path)
    except OSError:
        return None
    try:
        return _session(sock, arguments)
    finally:
        sock.close()


def _noted_socket(options: tuple[str, ...]) -> str | None:
    try:
        with open(note_path(options), encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    if len(lines) < 2 or lines[0] != repr(options):
        return None
    for line in lines[2:]:
        wanted, _, path = line.partition(" ")
        if stamp(path) != wanted:
            return None
    return lines[1]


def _session(sock: _socket.socket, arguments: list[str]) -> int | None:
    import json

    if sys.platform != "linux":
        return None

    hello = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    data = json.dumps(hello).encode("utf-8", "surrogateescape")
    if len(data) > 60000:
        return None
    streams = b"".join(fd.to_bytes(4, sys.byteorder) for fd in range(3))

    def forward(number: int, _frame: object) -> None:
        try:
            sock.send(b'{"signal":%d}' % number)
        except OSError:
            pass

    numbers = [getattr(signal, name) for name in FORWARDED]
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        sock.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, streams)])
        answer = sock.recv(65536)
    except OSError:
        answer = b""
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not answer:
        from .dispatch import complain

        complain("the sandbox's process ended unexpectedly")
        return 125
    return int(json.loads(answer)["exit"])

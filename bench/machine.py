"""A virtual machine of either kind as a child process that prints the guest's serial line, watched line by line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TRIPS = 1000
STREAM_BYTES = 32 << 20  # as in guest/io.c
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Setup:
    """What to boot. ``tasks`` is the guest program's `bench=`; ``stream`` and ``console`` add those devices."""

    kernel: Path
    initrd: Path
    tasks: str = ""
    disk: Path | None = None
    read_only: bool = False
    stream: Path | None = None
    console: bool = False
    memory_mib: int = 256


@dataclass
class Result:
    """One "R" line: nanoseconds by the guest's clock, seconds by the host's between "B" and "R", and the amount."""

    name: str
    value: int
    amount: int
    host_s: float


class Child:
    """A running VM process. ``started`` is the host time just before it was created."""

    def __init__(self, argv: Sequence[str | os.PathLike[str]], timeout_s: float = 120.0) -> None:
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        self._watchdog = threading.Timer(timeout_s, self._kill)
        self._watchdog.start()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        self._kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)

    def watch(self, until: str = "D") -> tuple[float, list[Result]]:
        """Read up to the line ``until``. Returns seconds from the start to "M", and the results."""
        assert self.process.stdout is not None
        booted, began, results, seen = 0.0, 0.0, [], []
        for raw in self.process.stdout:
            now = time.perf_counter()
            line = raw.decode(errors="replace").strip()
            seen.append(line)
            word, *rest = line.split()
            if word == "M" and not booted:
                booted = now - self.started
            elif word == "B":
                began = now
            elif word == "R":
                results.append(Result(rest[0], int(rest[1]), int(rest[2]) if len(rest) > 2 else 0, now - began))
            elif word == "E":
                raise RuntimeError(f"the guest failed: {line}")
            if line == until or (word == "R" and rest[0] == until):
                return booted, results
        raise RuntimeError("the VM ended early:\n" + "\n".join(seen[-15:]))

    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mib(self, ram_mib: int) -> tuple[float, float, float]:
        """Resident MiB: of guest RAM, of all else, and of all else that no other process shares (private).

        Guest RAM is the mappings that together make up its size: the largest ones.
        """
        mappings: list[list[int]] = []  # size, rss, private
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Size":
                mappings.append([int(value.split()[0]), 0, 0])
            elif key == "Rss":
                mappings[-1][1] = int(value.split()[0])
            elif key in ("Private_Clean", "Private_Dirty"):
                mappings[-1][2] += int(value.split()[0])
        mappings.sort(key=lambda m: abs(m[0] - (ram_mib << 10)))
        ram, rest = mappings[0], mappings[1:]
        return ram[1] / 1024, sum(m[1] for m in rest) / 1024, sum(m[2] for m in rest) / 1024


def serve_stream(peer: socket.socket) -> None:
    """The host's part of guest/io.c's run_stream."""
    for _ in range(TRIPS):
        peer.sendall(peer.recv(1))
    left = STREAM_BYTES
    while left:
        left -= len(peer.recv(min(left, 256 << 10)))
    peer.sendall(b"!")
    peer.recv(1)
    block = bytes(256 << 10)
    for _ in range(STREAM_BYTES // len(block)):
        peer.sendall(block)
    peer.recv(1)  # open until the guest has read it all: a serial port drops what is left when its host goes

"""Long runs that look for what is left behind: processes, descriptors, threads, files, memory.

``MICROVM_SOAK_COMMANDS`` and ``MICROVM_SOAK_SANDBOXES`` set how many; the figures are printed (``pytest -s``).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from microvm import ExecError, Sandbox

from .conftest import BACKEND

pytestmark = [pytest.mark.boots, pytest.mark.soak, pytest.mark.timeout(900)]

COMMANDS = int(os.environ.get("MICROVM_SOAK_COMMANDS", "500"))
SANDBOXES = int(os.environ.get("MICROVM_SOAK_SANDBOXES", "100"))
SLACK_KIB = 20 << 10  # over a whole run, however long: malloc's arenas differ by as much from one look to the next


def descendants() -> list[int]:
    """Processes below this one, zygotes and workers."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
    found: list[int] = []
    family = {os.getpid()}
    while family:
        family = {pid for pid, parent in parents.items() if parent in family}
        found += family
    return found


class Holdings(NamedTuple):
    """What this process and those below it have."""

    processes: int
    descriptors: int
    threads: int
    files: int
    mappings_kib: int
    resident_kib: int

    @classmethod
    def now(cls) -> Holdings:
        ctypes.CDLL(None).malloc_trim(0)
        pids = [os.getpid(), *descendants()]
        descriptors = threads = mappings = resident = 0
        for pid in pids:
            with contextlib.suppress(FileNotFoundError):
                descriptors += len(os.listdir(f"/proc/{pid}/fd"))
                threads += len(os.listdir(f"/proc/{pid}/task"))
                with open(f"/proc/{pid}/statm") as file:
                    words = [int(word) * resource.getpagesize() >> 10 for word in file.read().split()]
                mappings += words[0]
                resident += words[1]
        files = len(os.listdir(tempfile.gettempdir()))
        return cls(len(pids), descriptors, threads, files, mappings, resident)

    @classmethod
    def settled(cls, like: Holdings) -> Holdings:
        """Like `now`, giving a worker that was told to end the time to do so."""
        deadline = time.monotonic() + 5
        while (found := cls.now()).processes > like.processes and time.monotonic() < deadline:
            time.sleep(0.05)
        return found


def check(before: Holdings, after: Holdings) -> None:
    assert after[:4] == before[:4], (before, after)
    assert after.mappings_kib - before.mappings_kib < 8 * SLACK_KIB, (before, after)
    assert after.resident_kib - before.resident_kib < SLACK_KIB, (before, after)


@pytest.fixture(
    params=[{"isolated": True}, {"isolated": False, "cold": True}], ids=["in a process of its own", "in this process"]
)
def small(request: pytest.FixtureRequest) -> Callable[..., Sandbox]:
    """Sandboxes that start quickly: the base image where there is one."""
    from microvm.errors import ConfigError
    from microvm.images import images

    kernel = request.getfixturevalue("any_kernel")
    try:
        image: Any = images.resolve("base")
    except ConfigError:
        image = request.getfixturevalue("image")

    def make(**settings: Any) -> Sandbox:
        settings = {**request.param, **settings}
        return Sandbox(image.path, kernel=kernel.name, backend=BACKEND, memory_mib=64, **settings)

    return make


@pytest.fixture(autouse=True)
def no_collector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may wait for the garbage collector to be freed: a host can be busy elsewhere for long."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_commands_in_one_sandbox_leave_nothing(
    small: Callable[..., Sandbox], capfd: pytest.CaptureFixture[str]
) -> None:
    with small() as sandbox:

        def guest() -> tuple[int, int]:
            """Processes in the guest, and what the kernel there holds for sockets and the like, in KiB."""
            found = sandbox.run("ls -d /proc/[0-9]* | wc -l; grep SUnreclaim /proc/meminfo | tr -dc 0-9").stdout.split()
            return int(found[0]), int(found[1])

        def work(number: int) -> None:
            assert sandbox.run(["echo", str(number)]).stdout == b"%d\n" % number
            if number % 10 == 0:
                assert sandbox.run("cat", input=bytes(100_000)).stdout == bytes(100_000)
                with pytest.raises(ExecError, match="cannot run"):
                    sandbox.run(["/no/such/program"])
                with sandbox.start("sleep 100 & sleep 100") as process:
                    assert process.poll() is None
                sandbox.files.write("/tmp/file", b"x" * 10_000)
                assert len(sandbox.files.read("/tmp/file")) == 10_000

        for number in range(60):
            work(number)
        before, inside = Holdings.now(), guest()
        begin = time.monotonic()
        for number in range(COMMANDS):
            work(number)
        seconds = time.monotonic() - begin
        deadline = time.monotonic() + 5
        while guest()[0] > inside[0] and time.monotonic() < deadline:
            time.sleep(0.1)
        after, left = Holdings.settled(before), guest()
        with capfd.disabled():
            print(f"\n{COMMANDS} commands in {seconds:.1f} s; guest (processes, KiB): {inside} {left}")
            print(f"  before {before}\n  after  {after}")
        # RAM that the guest touches for the first time is not a leak of ours.
        check(before, after._replace(resident_kib=min(after.resident_kib, before.resident_kib + SLACK_KIB - 1)))
        assert after.resident_kib - before.resident_kib < 48 << 10
        assert left[0] <= inside[0]
        assert left[1] - inside[1] < 2048


def test_sandboxes_one_after_another_leave_nothing(
    small: Callable[..., Sandbox], capfd: pytest.CaptureFixture[str]
) -> None:
    def one(number: int) -> None:
        with small(cpus=1 + number % 2) as sandbox:
            assert sandbox.run("echo x").stdout == b"x\n"

    for number in range(10):
        one(number)
    gc.collect()
    time.sleep(1)  # for the last worker to be gone
    before, begin = Holdings.now(), time.monotonic()
    for number in range(SANDBOXES):
        one(number)
    seconds, after = time.monotonic() - begin, Holdings.settled(before)
    gc.collect()
    collected = Holdings.settled(before)
    with capfd.disabled():
        print(
            f"\n{SANDBOXES} sandboxes in {seconds:.1f} s\n  before {before}\n  after  {after}\n  collected {collected}"
        )
    check(before, collected)
    assert after.resident_kib - before.resident_kib < SANDBOXES * 512 + SLACK_KIB  # what waits for the collector

"""A Linux guest in which somebody is root, or not even that, and wants out: `hostile/linux.c`.

After each attack the process of the host is as it was, another machine in it still answers, and the attacked one has
either ended in a way that can be told or goes on.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm import DiskConfig, ExecError, ExecTimeout, MicroVMError, Sandbox

from .conftest import BACKEND, missing

pytestmark = [pytest.mark.boots, pytest.mark.timeout(120)]

ATTACK = "/tmp/attack"
GUEST_MIB = 64
ROUND_MS = 600


def resident_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20


def children() -> set[str]:
    found: set[str] = set()
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            found.update(file.read().split())
    return found


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        return missing("musl-gcc", "no musl compiler for the hostile program")
    program = tmp_path_factory.mktemp("attack") / "attack"
    source = Path(__file__).with_name("hostile") / "linux.c"
    subprocess.run([compiler, "-static", "-O2", "-Wall", "-Wextra", str(source), "-o", str(program)], check=True)
    return program.read_bytes()


@pytest.fixture(scope="module")
def tuned(kernel: Callable[[str], Any]) -> Any:
    """The kernel with /dev/mem and /dev/port."""
    return kernel("tuned")


@pytest.fixture(scope="module")
def neighbour(tuned: Any, image: Any) -> Iterator[Sandbox]:
    with Sandbox(image.path, kernel=tuned.name, backend=BACKEND, isolated=False, cold=True) as sandbox:
        yield sandbox


class Victim:
    """The machine that is attacked, and what its attacker's program says."""

    def __init__(self, sandbox: Sandbox, attack: bytes) -> None:
        self.sandbox = sandbox
        self._attack = attack

    def boot(self) -> None:
        self.sandbox.boot()
        self.sandbox.files.write(ATTACK, self._attack, mode=0o755)

    def suffer(self, act: str, ms: int = ROUND_MS, seed: int = 0, user: str | None = None) -> str:
        """Run the attack. Returns how it went: "done", or the sentence of an error, never more than that."""
        try:
            words = [ATTACK, act, str(ms), str(seed)]
            result = self.sandbox.run(words, timeout=ms / 1000 + 3, max_output=4 << 20, user=user)
        except MicroVMError as error:
            return str(error)
        assert b"/dev/" not in result.stderr, result.stderr  # what it needs is there
        return "done" if result.returncode == 0 else f"ended with {result.returncode}"

    def alive(self) -> bool:
        try:
            return self.sandbox.run("echo alive", timeout=2).stdout == b"alive\n"
        except ExecError:
            return False


@pytest.fixture
def victim(
    request: pytest.FixtureRequest, tuned: Any, image: Any, attack: bytes, neighbour: Sandbox, scratch_disk: Path
) -> Iterator[Victim]:
    """A machine with everything in it. Checks afterwards that the host has kept nothing of it."""
    cpus = getattr(request, "param", 1)
    temporary = set(os.listdir(tempfile.gettempdir()))
    before, processes = resident_mib(), children()
    request.getfixturevalue("nothing_left")
    sandbox = Sandbox(
        image.path,
        kernel=tuned.name,
        backend=BACKEND,
        memory_mib=GUEST_MIB,
        cpus=cpus,
        disks=[DiskConfig(scratch_disk)],
        isolated=False,  # in one process with its neighbour and with these tests
    )
    found = Victim(sandbox, attack)
    try:
        found.boot()
        yield found
        assert resident_mib() - before < GUEST_MIB + 120
        assert neighbour.run("echo fine", timeout=20).stdout == b"fine\n"
    finally:
        begin = time.monotonic()
        sandbox.close()
        assert time.monotonic() - begin < 3
    assert scratch_disk.stat().st_size == 16 << 20
    assert children() == processes
    assert {name for name in os.listdir(tempfile.gettempdir()) if name not in temporary and "microvm" in name} == set()


ENDS = ("connection to the guest was lost", "the guest ended: ", "did not end within", "did not answer")


@pytest.mark.parametrize("victim", [1, 2], indirect=True, ids=["1 vCPU", "2 vCPUs"])
@pytest.mark.parametrize("act", ["devices", "pages", "holes", "ports", "lapic", "ioapic"])
def test_garbage_to_hardware_ends_this_guest_at_most(victim: Victim, neighbour: Sandbox, act: str) -> None:
    outcome = victim.suffer(act, seed=victim.sandbox.vm.config.cpus)
    assert outcome == "done" or any(end in outcome for end in ENDS), outcome
    assert neighbour.run("echo fine", timeout=20).stdout == b"fine\n"
    if act in ("holes", "ports"):
        assert victim.alive()
    victim.sandbox.vm.wait(0)  # no error of ours in what ended it, if it has ended


@pytest.mark.parametrize("act", ["serial", "killall", "init", "memory"])
def test_guest_survives_what_is_its_own_affair(victim: Victim, act: str) -> None:
    outcome = victim.suffer(act)
    assert outcome in ("done", "ended with -9"), outcome
    assert victim.alive()


def test_output_without_end_is_cut_off_and_the_guest_lives(victim: Victim) -> None:
    assert "more than the 4194304 bytes allowed" in victim.suffer("stdout")
    assert victim.alive()


def test_fork_bomb_ends_with_its_time(victim: Victim, neighbour: Sandbox) -> None:
    with pytest.raises(ExecTimeout):
        victim.sandbox.run([ATTACK, "forks"], timeout=1.5)
    assert neighbour.run("echo fine", timeout=20).stdout == b"fine\n"
    assert victim.alive()


def test_connections_without_end_are_refused_and_forgotten(victim: Victim) -> None:
    vm = victim.sandbox.vm
    with vm.vsock.listen(9999, backlog=16):
        assert victim.suffer("connections") == "done"
        assert len(os.listdir("/proc/self/fd")) < 1000
    assert victim.alive()


def test_bytes_nobody_reads_are_held_back_in_the_guest(victim: Victim) -> None:
    before = resident_mib()
    streams: list[socket.socket] = []
    with victim.sandbox.vm.vsock.listen(9999, backlog=64) as listener:
        process = victim.sandbox.start([ATTACK, "bytes", "1500"])
        try:
            for _ in range(64):
                streams.append(listener.accept(10))
            assert process.wait(20) == 0
            assert resident_mib() - before < 110
            assert process.stdout is not None
            assert b"sent 0" not in process.stdout.read()
        finally:
            process.close()
            for stream in streams:
                stream.close()
    assert victim.alive()


def test_unprivileged_program_cannot_abort_the_process(victim: Victim, neighbour: Sandbox) -> None:
    """On the software CPU this instruction ends the guest; on hardware it is an invalid one."""
    outcome = victim.suffer("untranslatable", user="nobody")
    expected = "crashed (the software CPU met an instruction" if victim.sandbox.backend == "soft" else "ended with -4"
    assert expected in outcome
    assert neighbour.run("echo fine", timeout=20).stdout == b"fine\n"


def test_worker_of_an_attacked_guest_ends_with_it(tuned: Any, image: Any, attack: bytes, nothing_left: None) -> None:
    with Sandbox(image.path, kernel=tuned.name, backend=BACKEND, memory_mib=GUEST_MIB, cold=True) as sandbox:
        processes = children()
        victim = Victim(sandbox, attack)
        sandbox.files.write(ATTACK, attack, mode=0o755)
        outcome = victim.suffer("lapic")
        assert outcome == "done" or any(end in outcome for end in ENDS), outcome
    deadline = time.monotonic() + 5
    while children() >= processes and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children()) < len(processes)

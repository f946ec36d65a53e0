"""Sandboxes in processes of their own: copies, crashes, and what is left when somebody dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from microvm import Sandbox
from microvm.errors import ConfigError, ExecError, StateError, WorkerError

pytestmark = [pytest.mark.boots, pytest.mark.timeout(120)]


def pid_of(sandbox: Sandbox) -> int:
    pid = sandbox._machine.pid  # type: ignore[union-attr]
    assert isinstance(pid, int)
    return pid


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_sandboxes_are_processes_apart(guests: str) -> None:
    with Sandbox(guests, memory_mib=128) as one, Sandbox(guests, memory_mib=128) as two:
        assert len({os.getpid(), pid_of(one), pid_of(two)}) == 3
        one.run("echo one > /tmp/file")
        assert two.run("cat /tmp/file").returncode != 0
        ids = [
            box.run("cat /etc/machine-id; head -c 16 /dev/urandom | md5sum").stdout_text.split() for box in (one, two)
        ]
        assert ids[0][0] != ids[1][0]
        assert ids[0][1] != ids[1][1]
        assert abs(one.info().clock_ns - time.time_ns()) < 500_000_000
        with pytest.raises(StateError, match="another process"):
            _ = one.vm


def test_closed_sandbox_is_gone(guests: str) -> None:
    with Sandbox(guests, memory_mib=128) as sandbox:
        pid = pid_of(sandbox)
    assert gone(pid)


def test_crash_of_a_worker_is_an_error_here_and_touches_no_other(guests: str) -> None:
    with Sandbox(guests, memory_mib=128) as one, Sandbox(guests, memory_mib=128) as two:
        os.kill(pid_of(one), signal.SIGABRT)
        with pytest.raises(WorkerError):
            one.run(["true"])
        assert two.run(["true"]).returncode == 0
        with pytest.raises(ExecError):
            one.run(["true"])
    with Sandbox(guests, memory_mib=128) as three:
        assert three.run(["true"]).returncode == 0


def test_crash_during_a_command_is_an_error_here(sandbox: Sandbox) -> None:
    with sandbox.start(["sleep", "60"]) as process:
        os.kill(pid_of(sandbox), signal.SIGSEGV)
        with pytest.raises(ExecError):
            process.wait(10)
    with pytest.raises(WorkerError):
        sandbox.run(["true"])


def test_zygote_that_died_is_replaced(guests: str) -> None:
    from microvm.workers import client

    with Sandbox(guests, memory_mib=128):
        pass
    for zygote in client._zygotes.values():
        zygote._process.kill()
        zygote._process.wait()
    with Sandbox(guests, memory_mib=128) as sandbox:
        assert sandbox.run(["true"]).returncode == 0


def test_guest_that_ends_says_how(sandbox: Sandbox) -> None:
    outcome = sandbox.shutdown()
    assert outcome is not None
    assert outcome.kind in ("powered off", "reset")


def test_fork_copies_memory_files_and_processes(sandbox: Sandbox) -> None:
    sandbox.run("echo before > /tmp/file")
    children = sandbox.fork(3)
    assert all(isinstance(child, Sandbox) for child in children)
    boxes = [child for child in children if isinstance(child, Sandbox)]
    try:
        for number, box in enumerate(boxes):
            assert box.run("cat /tmp/file").stdout == b"before\n"
            box.run(f"echo {number} > /tmp/file")
        sandbox.run("echo parent > /tmp/file")
        assert [box.run("cat /tmp/file").stdout for box in boxes] == [b"0\n", b"1\n", b"2\n"]
        everybody = [sandbox, *boxes]
        for command in ("cat /etc/machine-id", "cat /proc/sys/kernel/random/uuid", "head -c 16 /dev/urandom | md5sum"):
            assert len({box.run(command).stdout for box in everybody}) == 4, command
        grandchildren = boxes[0].fork(1)
        assert isinstance(grandchildren[0], Sandbox)
        sandbox.close()
        boxes[0].close()
        with grandchildren[0] as grandchild:
            assert grandchild.run("cat /tmp/file").stdout == b"0\n"
    finally:
        for box in boxes:
            box.close()


def test_commands_of_the_parent_go_on_through_a_fork(sandbox: Sandbox) -> None:
    process = sandbox.start("for i in 1 2 3 4 5 6; do echo $i; sleep 0.1; done")
    time.sleep(0.15)
    (child,) = sandbox.fork()
    assert isinstance(child, Sandbox)
    with child:
        assert child.run(["true"]).returncode == 0
    assert process.communicate().stdout.split() == [b"1", b"2", b"3", b"4", b"5", b"6"]


def test_what_cannot_be_copied_says_so(guests: str, sandbox: Sandbox) -> None:
    for count in (0, 65):
        with pytest.raises(ConfigError):
            sandbox.fork(count)
    with (
        Sandbox(guests, isolated=False, memory_mib=128) as local,
        pytest.raises(StateError, match="process of its own"),
    ):
        local.fork()


def test_frozen_clock_stays(guests: str) -> None:
    with Sandbox(guests, memory_mib=128) as warm:
        now = warm.info().clock_ns
    with Sandbox(guests, memory_mib=128, frozen_clock=True) as sandbox:
        assert sandbox.info().clock_ns < now


def test_cold_sandbox_boots_in_a_worker_too(guests: str) -> None:
    with Sandbox(guests, memory_mib=128, cold=True) as sandbox:
        assert pid_of(sandbox) != os.getpid()
        assert sandbox.run("echo hello").stdout == b"hello\n"
        assert sandbox.info().uptime_s < 30


def _descendants() -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "microvm.workers.zygote" in line]


def test_nothing_is_left_after_sigkill_of_the_owner(guests: str) -> None:
    program = (
        "import os, sys, time; from microvm import Sandbox\n"
        f"box = Sandbox({guests!r}, memory_mib=128); box.boot()\n"
        "kids = box.fork(2)\n"
        "from microvm.workers import client\n"
        "pids = [z._process.pid for z in client._zygotes.values()] + [b._machine.pid for b in (box, *kids)]\n"
        "print(*pids, flush=True); time.sleep(100)"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 4
        assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    finally:
        owner.kill()
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    assert [pid for pid in pids if not gone(pid)] == []


def test_failed_template_is_told(guests: str) -> None:
    from microvm.errors import MicroVMError

    with pytest.raises(MicroVMError), Sandbox(guests, memory_mib=128, cmdline="init=/nowhere rdinit=/nowhere"):
        pass


def test_stale_template_is_made_anew(guests: str) -> None:
    from microvm.workers import client, template

    config = template.decide(Sandbox(guests, memory_mib=128, cmdline="stale=1").config)
    path = template.path_of(template.key(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"from another age")
    try:
        with Sandbox(guests, memory_mib=128, cmdline="stale=1") as sandbox:
            assert sandbox.run(["true"]).returncode == 0
        assert path.stat().st_size > 1 << 20
    finally:
        zygote = client._zygotes.pop(template.key(config), None)
        if zygote is not None:
            zygote.close()
        template.remove(path)

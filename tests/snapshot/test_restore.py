"""A machine that was saved goes on where it stood, as another one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm import MicroVM, Sandbox
from microvm.errors import SnapshotError, StateError

pytestmark = [pytest.mark.boots, pytest.mark.timeout(120)]
Agent = Callable[[MicroVM], Any]


def shell(client: Any, command: str) -> str:
    return str(client.run(["/bin/sh", "-c", command], timeout=30, check=True).stdout_text).strip()


def test_saved_machine_goes_on_and_so_does_its_copy(local: Sandbox, snapshot: Path, agent: Agent) -> None:
    assert local.run("cat /tmp/file").stdout == b"kept\n"
    with MicroVM.restore(snapshot) as vm:
        assert vm.state == "built"
        client = agent(vm)
        assert shell(client, "cat /tmp/file") == "kept"
        shell(client, "echo changed > /tmp/file")
    assert local.run("cat /tmp/file").stdout == b"kept\n"
    with MicroVM.restore(snapshot) as vm:
        assert shell(agent(vm), "cat /tmp/file") == "kept"


COUNTER = "i=0; while true; do i=$((i+1)); echo $i > /tmp/c.new; mv /tmp/c.new /tmp/c; sleep 0.01; done"


def test_running_processes_go_on(local: Sandbox, tmp_path: Path, agent: Agent) -> None:
    local._agent().run(["/bin/sh", "-c", f"({COUNTER}) > /dev/null 2>&1 < /dev/null &"], leave_running=True)
    local.run("sleep 0.1")
    local.snapshot(tmp_path / "s")
    at = int(local.run("cat /tmp/c").stdout)
    with MicroVM.restore(tmp_path / "s") as vm:
        client = agent(vm)
        first = int(shell(client, "cat /tmp/c"))
        shell(client, "sleep 0.2")
        assert 3 < first < int(shell(client, "cat /tmp/c"))
    local.run("sleep 0.1")
    assert int(local.run("cat /tmp/c").stdout) > at


def test_copies_differ_and_know_the_time(snapshot: Path, agent: Agent) -> None:
    seen = []
    for _ in range(2):
        with MicroVM.restore(snapshot) as vm:
            client = agent(vm)
            drift = abs(client.info().clock_ns - time.time_ns()) / 1e9
            assert drift < 0.5
            seen.append(shell(client, "cat /etc/machine-id; hostname; head -c 16 /dev/urandom | md5sum").split("\n"))
            assert "reseeded due to virtual machine fork" in shell(client, "dmesg")
    for mine, other in zip(*seen, strict=True):
        assert mine != other


def test_difference_holds_what_was_written(snapshot: Path, tmp_path: Path, agent: Agent) -> None:
    with MicroVM.restore(snapshot) as vm:
        shell(agent(vm), "echo more > /tmp/more")
        vm.snapshot(tmp_path / "d1.mvs", difference=True)
    with MicroVM.restore(tmp_path / "d1.mvs") as vm:
        client = agent(vm)
        assert shell(client, "cat /tmp/file /tmp/more") == "kept\nmore"
        shell(client, "head -c 3000000 /dev/urandom > /tmp/big; md5sum < /tmp/big > /tmp/sum")
        vm.snapshot(tmp_path / "d2.mvs", difference=True)
        vm.snapshot(tmp_path / "whole.mvs")
    blocks = {name: os.stat(tmp_path / name).st_blocks * 512 for name in ("full.mvs", "d1.mvs", "d2.mvs", "whole.mvs")}
    assert blocks["d1.mvs"] < blocks["full.mvs"] / 3
    assert 3_000_000 < blocks["d2.mvs"] < blocks["whole.mvs"] / 2
    for name in ("d2.mvs", "whole.mvs"):
        with MicroVM.restore(tmp_path / name, verify=True) as vm:
            client = agent(vm)
            assert shell(client, "cat /tmp/file /tmp/more; md5sum < /tmp/big | cmp - /tmp/sum && echo same") == (
                "kept\nmore\nsame"
            )


def test_memory_given_back_stays_zero(snapshot: Path, tmp_path: Path, agent: Agent) -> None:
    with MicroVM.restore(snapshot) as vm:
        client = agent(vm)
        shell(client, "head -c 20000000 /dev/urandom > /tmp/big; md5sum < /tmp/big > /tmp/sum")
        vm.set_balloon(32)
        deadline = time.monotonic() + 20
        while vm._machine.balloon is not None and vm._machine.balloon.actual < 32 * 256:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        vm.snapshot(tmp_path / "d.mvs", difference=True)
    with MicroVM.restore(tmp_path / "d.mvs") as vm:
        client = agent(vm)
        vm.set_balloon(0)
        assert shell(client, "md5sum < /tmp/big | cmp - /tmp/sum && echo same") == "same"
        shell(client, "head -c 30000000 /dev/zero > /tmp/zeroes; rm /tmp/zeroes")


def test_paused_machine_stays_paused(local: Sandbox, tmp_path: Path) -> None:
    local.vm.pause()
    local.vm.snapshot(tmp_path / "s")
    assert local.vm.state == "paused"
    local.vm.resume()
    assert local.run(["true"]).returncode == 0


def test_two_vcpus_are_saved(guests: str, tmp_path: Path, agent: Agent) -> None:
    with Sandbox(guests, cold=True, isolated=False, memory_mib=128, cpus=2) as sandbox:
        sandbox.snapshot(tmp_path / "s")
    with MicroVM.restore(tmp_path / "s") as vm:
        assert shell(agent(vm), "grep -c processor /proc/cpuinfo") == "2"


def test_ended_machine_cannot_be_saved(local: Sandbox, tmp_path: Path) -> None:
    local.vm.stop()
    with pytest.raises(StateError):
        local.vm.snapshot(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_machine_with_a_writable_disk_is_not_saved(guests: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk.img"
    with open(disk, "wb") as file:
        file.truncate(1 << 20)
    with Sandbox(guests, isolated=False, memory_mib=128, disks=[disk]) as sandbox:
        with pytest.raises(StateError, match="writable disks"):
            sandbox.snapshot(tmp_path / "s")
        assert sandbox.run(["true"]).returncode == 0


def test_other_backend_build_and_disks_are_refused(
    snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microvm.hypervisor.soft import SoftHypervisor, library
    from microvm.machine import snapshots

    class Other(SoftHypervisor):
        name = "other"

    with pytest.raises(SnapshotError, match="saved on the soft backend, not other"):
        MicroVM.restore(snapshot, hypervisor=Other())
    monkeypatch.setattr(library, "build_id", lambda: "newer")
    with pytest.raises(SnapshotError, match="another build"):
        MicroVM.restore(snapshot)
    monkeypatch.undo()
    monkeypatch.setattr(snapshots, "_digest", lambda path: "0")
    real = os.stat

    def older(path: Any, *arguments: Any, **options: Any) -> Any:
        found = real(path, *arguments, **options)
        if str(path).endswith(".erofs"):
            return os.stat_result([*found[:8], found.st_mtime + 5, found.st_ctime])
        return found

    monkeypatch.setattr(snapshots.os, "stat", older)
    with pytest.raises(SnapshotError, match="as it was, and it has changed"):
        MicroVM.restore(snapshot)


def test_restored_in_another_process(snapshot: Path) -> None:
    program = (
        "import sys; from microvm import MicroVM; from microvm.agent.client import AgentClient\n"
        "with MicroVM.restore(sys.argv[1]) as vm:\n"
        "    vm.start(); c = AgentClient(lambda: vm.vsock.connect(1024, 30)); c.renew()\n"
        "    print(c.run(['cat', '/tmp/file']).stdout_text)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(snapshot)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "kept\n\n", done.stderr


def test_nothing_is_left_of_a_restore_that_fails(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microvm.machine import snapshots

    before = len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> None:
        raise SnapshotError("no")

    monkeypatch.setattr(snapshots, "apply", fail)
    for _ in range(3):
        with pytest.raises(SnapshotError):
            MicroVM.restore(snapshot)
    assert len(os.listdir("/proc/self/fd")) <= before + 1

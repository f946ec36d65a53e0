"""Guests that do their worst: the host process stays up and bounded, and other machines do not notice."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm import BootError, DiskConfig, ExecError, InternalError, MachineConfig, MicroVM, Outcome, Sandbox

from .conftest import BACKEND, missing
from .hostile import build

pytestmark = [pytest.mark.boots, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kernel = build(tmp_path_factory.mktemp("hostile"))
    return kernel if kernel is not None else missing("gcc", "no compiler for the hostile guest")


@pytest.fixture
def make(hostile: Path, scratch_disk: Path) -> Iterator[Callable[..., MicroVM]]:
    machines: list[MicroVM] = []

    def start(act: str, **settings: Any) -> MicroVM:
        settings.setdefault("disks", [DiskConfig(scratch_disk)])
        vm = MicroVM(MachineConfig(hostile, cmdline=f"act={act}", memory_mib=64, backend=BACKEND, **settings))
        machines.append(vm)
        vm.start()
        return vm

    yield start
    for vm in machines:
        vm.close()


def rss_mib() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20


def finish(vm: MicroVM, timeout_s: float = 120) -> Outcome:
    outcome = vm.wait(timeout_s)
    assert outcome is not None, f"still running: {vm.serial.tail(200)!r}, {vm.stats()}"
    return outcome


def test_polite_guest_ends_as_it_asks(make: Callable[..., MicroVM], nothing_left: None) -> None:
    vm = make("none")
    assert finish(vm).kind == "powered off"
    assert vm.serial.tail() == b"hello\ndone\n"
    vm.close()


@pytest.mark.parametrize("act", ["registers", "rings", "vsock"])
def test_garbage_to_devices_harms_nobody(make: Callable[..., MicroVM], act: str, scratch_disk: Path) -> None:
    before = rss_mib()
    vm = make(act)
    assert finish(vm).kind == "powered off"
    assert vm.serial.tail().endswith(b"done\n")
    assert rss_mib() - before < 150
    assert scratch_disk.stat().st_size == 16 << 20


def test_broken_rings_make_each_device_ask_for_a_reset(make: Callable[..., MicroVM]) -> None:
    vm = make("rings")
    finish(vm)
    failures = {name: count for name, count in vm.stats().items() if name.endswith("_failures")}
    assert len(failures) == 5
    assert all(failures.values()), failures


def test_triple_fault_is_a_reset(make: Callable[..., MicroVM]) -> None:
    for act in ("fault", "tss"):
        outcome = finish(make(act))
        assert outcome.kind == "reset"
        assert outcome.detail == "triple fault"


def test_bug_in_a_device_ends_its_machine_only(make: Callable[..., MicroVM], hostile: Path, nothing_left: None) -> None:
    other = make("loop")
    config = MachineConfig(hostile, cmdline="act=serial", memory_mib=64, backend=BACKEND)
    with MicroVM(config) as vm:

        def bug(data: bytes) -> None:
            raise ZeroDivisionError("a device's mistake")

        vm._machine.uart.output = bug
        vm.start()
        with pytest.raises(InternalError, match="a device's mistake"):
            vm.wait(30)
        assert vm.state == "ended"
    assert other.state == "running"
    other.close()


def test_halt_with_interrupts_off_is_the_end(make: Callable[..., MicroVM]) -> None:
    assert finish(make("halt")).kind == "halted"


def test_endless_loop_is_stopped_from_outside(make: Callable[..., MicroVM]) -> None:
    vm = make("loop", cpus=2)
    assert vm.wait(0.3) is None
    vm.pause()
    vm.resume()
    begin = time.monotonic()
    outcome = vm.stop("enough")
    assert str(outcome) == "stopped (enough)"
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize(("act", "line"), [("serial", "serial"), ("console", "console")])
def test_console_flood_is_bounded(make: Callable[..., MicroVM], act: str, line: str) -> None:
    vm = make(act)
    console = getattr(vm, line)
    deadline = time.monotonic() + 60
    while console.dropped < 2 << 20:
        assert time.monotonic() < deadline, console.dropped
        time.sleep(0.05)
    before = rss_mib()
    while console.dropped < 4 << 20:
        assert time.monotonic() < deadline, console.dropped
        time.sleep(0.05)
    assert rss_mib() - before < 20
    assert len(console.tail()) <= 256 << 10
    vm.stop()


def test_neighbours_do_not_notice(make: Callable[..., MicroVM], any_kernel: Any, image: Any) -> None:
    with Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND) as sandbox:
        for act in ("rings", "fault", "halt", "registers"):
            finish(make(act))
            assert sandbox.run("echo fine").stdout == b"fine\n"
        flood = make("serial")
        assert sandbox.run("echo fine").stdout == b"fine\n"
        flood.close()
        assert sandbox.run("echo fine").stdout == b"fine\n"


def test_panicking_guest_is_an_outcome_with_its_last_words(any_kernel: Any, image: Any, nothing_left: None) -> None:
    with Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND) as sandbox:
        with pytest.raises(ExecError, match=r"the guest ended: .*reset"):
            sandbox.run("echo c >/proc/sysrq-trigger; sleep 60", timeout=60)
        with pytest.raises(ExecError):
            sandbox.run("true")


def test_process_one_cannot_be_killed_from_inside(any_kernel: Any, image: Any) -> None:
    with Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND) as sandbox:
        sandbox.run("kill -9 1; kill -TERM 1; kill -SEGV 1")
        assert sandbox.run("echo alive").stdout == b"alive\n"


def test_fork_bomb_leaves_the_host_alone(any_kernel: Any, image: Any) -> None:
    before = rss_mib()
    with Sandbox(image.path, kernel=any_kernel.name, memory_mib=128, backend=BACKEND) as sandbox:
        bomb = sandbox.start("bomb() { bomb | bomb & }; bomb; sleep 100")
        time.sleep(2)
        assert rss_mib() - before < 600
        bomb.close()


def test_guest_without_root_says_why_it_did_not_come_up(any_kernel: Any, image: Any, nothing_left: None) -> None:
    sandbox = Sandbox(image.path, kernel=any_kernel.name, backend=BACKEND, cmdline="microvm.root=/dev/nothing")
    with pytest.raises(BootError):
        sandbox.boot()
    assert sandbox.closed


def test_guest_that_hangs_is_given_up_in_time(hostile: Path, image: Any, nothing_left: None) -> None:
    sandbox = Sandbox(image.path, kernel=hostile, backend=BACKEND, cmdline="act=loop", boot_timeout=2)
    begin = time.monotonic()
    with pytest.raises(BootError, match="not ready within 2 s"):
        sandbox.boot()
    assert time.monotonic() - begin < 10


def test_guest_that_ends_at_once_says_how(hostile: Path, image: Any, nothing_left: None) -> None:
    with pytest.raises(BootError, match=r"powered off; its console said: hello \| done"):
        Sandbox(image.path, kernel=hostile, backend=BACKEND).boot()

"""A whole machine with guests made of Python: life, end, teardown."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm.boot import layout
from microvm.errors import BootError, ConfigError, InternalError, StateError
from microvm.hypervisor.base import StopReason, VcpuStop
from microvm.machine.config import DiskConfig, MachineConfig
from microvm.machine.machine import MicroVM
from microvm.machine.outcome import End
from microvm.testing.hypervisor import FakeHypervisor, FakeVcpu, Guest, tiny_kernel, wait_forever

POWER_OFF = 0x20 | 5 << 2


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel())
    return path


@pytest.fixture
def make(kernel: Path) -> Iterator[Callable[..., MicroVM]]:
    made: list[MicroVM] = []

    def build(guest: Guest = wait_forever, doorbells: bool = False, **settings: object) -> MicroVM:
        settings.setdefault("vsock_cid", None)
        config = MachineConfig(kernel, memory_mib=64, **settings)  # type: ignore[arg-type]
        vm = MicroVM(config, hypervisor=FakeHypervisor(guest, doorbells))
        made.append(vm)
        return vm

    yield build
    for vm in made:
        vm.close()


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def power_off(vcpu: FakeVcpu) -> VcpuStop:
    vcpu.bus.pio_write(layout.SLEEP_CONTROL_PORT, 1, POWER_OFF)
    vcpu.idle()
    raise AssertionError("unreachable")


def test_power_off_is_an_outcome(make: Callable[..., MicroVM]) -> None:
    vm = make(power_off)
    vm.start()
    outcome = vm.wait(5)
    assert outcome is not None
    assert outcome.kind == End.POWERED_OFF
    assert vm.state == "ended"


@pytest.mark.parametrize(("port", "value"), [(layout.RESET_PORT, layout.RESET_VALUE), (layout.I8042_PORT, 0xFE)])
def test_reset_is_an_outcome(make: Callable[..., MicroVM], port: int, value: int) -> None:
    def reset(vcpu: FakeVcpu) -> VcpuStop:
        vcpu.bus.pio_write(port, 1, value)
        return wait_forever(vcpu)

    vm = make(reset)
    vm.start()
    outcome = vm.wait(5)
    assert outcome is not None
    assert outcome.kind == End.RESET


def test_crash_says_what_happened(make: Callable[..., MicroVM]) -> None:
    vm = make(lambda vcpu: VcpuStop(StopReason.CRASHED, "an instruction nobody knows"))
    vm.start()
    assert str(vm.wait(5)) == "crashed (an instruction nobody knows)"


def test_bug_on_a_vcpu_thread_is_raised_by_wait(make: Callable[..., MicroVM]) -> None:
    def bug(vcpu: FakeVcpu) -> VcpuStop:
        raise ZeroDivisionError("oops")

    other = make()
    other.start()
    vm = make(bug)
    vm.start()
    with pytest.raises(InternalError, match="oops"):
        vm.wait(5)
    assert other.state == "running"


def test_bug_on_the_io_thread_is_raised_by_wait(make: Callable[..., MicroVM]) -> None:
    vm = make()
    vm.start()
    vm._machine.reactor.call_soon_threadsafe(lambda: [][0])
    with pytest.raises(InternalError, match="IndexError"):
        vm.wait(5)


def test_serial_output_is_read_and_input_arrives(make: Callable[..., MicroVM]) -> None:
    def echo(vcpu: FakeVcpu) -> VcpuStop:
        bus, port = vcpu.bus, layout.SERIAL_PORT
        bus.pio_write(port + 4, 1, 0x0B)
        bus.pio_write(port + 2, 1, 0x01)
        while not bus.pio_read(port + 5, 1) & 1:
            if vcpu._kicked.is_set():
                vcpu.idle()
            time.sleep(0.001)
        bus.pio_write(port, 1, bus.pio_read(port, 1))
        return power_off(vcpu)

    vm = make(echo)
    vm.start()
    assert vm.serial.write(b"!", timeout_s=5) == 1
    assert vm.serial.read_until(b"!", 5) == b"!"
    assert str(vm.wait(5)) == "powered off"


def test_paused_machine_stands_still_and_so_does_its_time(make: Callable[..., MicroVM]) -> None:
    ticks: list[int] = []

    def count(vcpu: FakeVcpu) -> VcpuStop:
        while not vcpu._kicked.is_set():
            ticks.append(1)
            time.sleep(0.0005)
        vcpu.idle()
        raise AssertionError("unreachable")

    vm = make(count, cpus=2)
    vm.start()
    for _ in range(3):
        vm.pause()
        assert vm.state == "paused"
        before, at = len(ticks), vm._machine.partition.time()
        time.sleep(0.02)
        assert len(ticks) == before
        assert vm._machine.partition.time() == at
        vm.resume()
        assert vm.state == "running"
        deadline = time.monotonic() + 5
        while len(ticks) == before:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def test_calls_at_the_wrong_moment_are_refused(make: Callable[..., MicroVM]) -> None:
    vm = make(vsock_cid=None, console=False, balloon=False)
    for call in (vm.pause, vm.resume, vm.wait):
        with pytest.raises(StateError):
            call()
    for missing in ("vsock", "console"):
        with pytest.raises(StateError, match="built without"):
            getattr(vm, missing)
    with pytest.raises(StateError, match="built without a balloon"):
        vm.set_balloon(1)
    assert vm.stop() is None
    vm.start()
    with pytest.raises(StateError):
        vm.start()
    with pytest.raises(StateError):
        vm.resume()
    vm.pause()
    with pytest.raises(StateError):
        vm.pause()
    vm.close()
    for call in (vm.start, vm.pause, vm.resume):
        with pytest.raises(StateError, match="closed"):
            call()


def test_paused_machine_can_be_stopped_and_closed(make: Callable[..., MicroVM]) -> None:
    vm = make()
    vm.start()
    vm.pause()
    assert str(vm.stop("enough")) == "stopped (enough)"
    vm.close()
    assert vm.state == "closed"


def test_balloon_target_is_bounded(make: Callable[..., MicroVM]) -> None:
    vm = make()
    vm.set_balloon(64)
    vm.set_balloon(0)
    for target in (-1, 65):
        with pytest.raises(ConfigError, match="0 to 64"):
            vm.set_balloon(target)


def test_closed_machine_leaves_no_thread_and_no_descriptor(make: Callable[..., MicroVM], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    before = descriptors(), threading.active_count()
    for state in ("built", "running", "paused", "ended"):
        for doorbells in (False, True):
            vm = make(doorbells=doorbells, disks=[DiskConfig(disk)], cpus=2)
            if state != "built":
                vm.start()
            if state == "paused":
                vm.pause()
            if state == "ended":
                vm.stop()
            partition = vm._machine.partition
            vm.close()
            vm.close()
            assert partition.closed  # type: ignore[attr-defined]
            assert (descriptors(), threading.active_count()) == before


def test_built_machine_has_no_thread_and_no_descriptor(make: Callable[..., MicroVM]) -> None:
    before = descriptors(), threading.active_count()
    make(doorbells=True)
    assert (descriptors(), threading.active_count()) == before


def test_memory_goes_with_the_machine(make: Callable[..., MicroVM]) -> None:
    vm = make()
    mapping = weakref.ref(vm._machine.memory._mapping)  # type: ignore[arg-type]
    vm.start()
    vm.close()
    assert mapping() is None or mapping().closed  # type: ignore[union-attr]


@pytest.mark.parametrize("step", ["create_vcpu", "map"])
def test_failure_while_building_leaves_nothing(
    kernel: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    before = descriptors(), threading.active_count()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(f"microvm.testing.hypervisor.FakePartition.{step}", fail)
    hypervisor = FakeHypervisor()
    with pytest.raises(OSError, match="no memory"):
        MicroVM(MachineConfig(kernel, memory_mib=64, vsock_cid=None, disks=[DiskConfig(disk)]), hypervisor=hypervisor)
    assert hypervisor.partition is not None
    assert hypervisor.partition.closed
    assert (descriptors(), threading.active_count()) == before


def test_failure_while_starting_leaves_nothing(make: Callable[..., MicroVM], monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors(), threading.active_count()
    vm = make(doorbells=True)

    def fail(*args: object) -> bool:
        raise OSError(24, "too many open files")

    monkeypatch.setattr("microvm.testing.hypervisor.FakePartition.doorbell", fail)
    with pytest.raises(OSError, match="too many open files"):
        vm.start()
    assert vm.state == "closed"
    assert (descriptors(), threading.active_count()) == before


def test_bad_kernel_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"not a kernel " * 1000)
    with pytest.raises(BootError, match=r"notes\.txt: "):
        MicroVM(MachineConfig(path, memory_mib=64, vsock_cid=None), hypervisor=FakeHypervisor())


def test_initrd_larger_than_memory_is_refused(kernel: Path, tmp_path: Path) -> None:
    initrd = tmp_path / "initrd"
    with open(initrd, "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(BootError, match="does not fit"):
        MicroVM(MachineConfig(kernel, memory_mib=64, vsock_cid=None, initrds=[initrd]), hypervisor=FakeHypervisor())


def test_disk_that_changed_its_size_since_it_was_checked_is_refused(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(700))
    monkeypatch.setattr(MachineConfig, "check_files", lambda self: None)
    before = descriptors()
    with pytest.raises(ConfigError, match="multiple of 512"):
        MicroVM(
            MachineConfig(kernel, memory_mib=64, vsock_cid=None, disks=[DiskConfig(disk)]), hypervisor=FakeHypervisor()
        )
    assert descriptors() == before


def test_doorbell_reaches_the_device_without_the_bus(make: Callable[..., MicroVM]) -> None:
    vm = make(doorbells=True)
    served: list[int] = []
    slot = vm._machine.slots[0]
    slot.transport._process = served.append
    vm.start()
    partition = vm._machine.partition
    partition.doorbells[slot.place.gpa + 0x50, 1].set()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while served != [1]:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_fork_of_a_built_machine_runs_in_the_child(make: Callable[..., MicroVM]) -> None:
    vm = make(power_off)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            vm.start()
            code = 0 if str(vm.wait(5)) == "powered off" else 2
            vm.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    vm.start()
    assert str(vm.wait(5)) == "powered off"


def test_stats_count(make: Callable[..., MicroVM]) -> None:
    vm = make(power_off)
    vm.start()
    vm.wait(5)
    stats = vm.stats()
    assert stats["vcpu0_exits"] >= 1
    assert all(isinstance(value, int) for value in stats.values())

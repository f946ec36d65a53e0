"""Running, holding and ending vCPU threads, with processors made of Python."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from microvm.bus import Bus
from microvm.errors import GuestMemoryError, InternalError
from microvm.hypervisor.base import STOP_HALTED, STOP_KICKED, TRIPLE_FAULT, Registers, StopReason, VcpuStop
from microvm.machine.outcome import End, Outcome
from microvm.machine.vcpus import VcpuThreads


class FakeVcpu:
    """Sits in `run` until kicked, or does what ``script`` says."""

    def __init__(self, index: int, script: Callable[[], VcpuStop] | None = None) -> None:
        self.index = index
        self.script = script
        self.kicked = threading.Event()
        self.inside = False
        self.runs = 0

    def run(self, bus: Bus) -> VcpuStop:
        self.inside = True
        self.runs += 1
        try:
            if self.script is not None:
                return self.script()
            self.kicked.wait()
            self.kicked.clear()
            return STOP_KICKED
        finally:
            self.inside = False

    def kick(self) -> None:
        self.kicked.set()


@pytest.fixture
def made() -> Iterator[list[VcpuThreads]]:
    threads: list[VcpuThreads] = []
    yield threads
    for one in threads:
        one.end(Outcome(End.STOPPED))
        one.join()


def make(made: list[VcpuThreads], *vcpus: FakeVcpu, ended: Callable[[], None] = lambda: None) -> VcpuThreads:
    threads = VcpuThreads(vcpus, Bus(), ended)  # type: ignore[arg-type]
    made.append(threads)
    return threads


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_end_brings_every_vcpu_out(made: list[VcpuThreads]) -> None:
    vcpus = FakeVcpu(0), FakeVcpu(1)
    threads = make(made, *vcpus)
    threads.start()
    assert not threads.wait(0.01)
    threads.end(Outcome(End.STOPPED))
    assert threads.wait(5)
    assert threads.outcome == Outcome(End.STOPPED)
    threads.join()
    assert not any(vcpu.inside for vcpu in vcpus)


def test_held_vcpus_are_outside_and_go_on_after_release(made: list[VcpuThreads]) -> None:
    vcpus = FakeVcpu(0), FakeVcpu(1)
    threads = make(made, *vcpus)
    threads.start()
    for _ in range(50):
        threads.hold()
        assert not any(vcpu.inside for vcpu in vcpus)
        threads.release()
    eventually(lambda: all(vcpu.inside for vcpu in vcpus))


def test_held_machine_can_be_ended(made: list[VcpuThreads]) -> None:
    threads = make(made, FakeVcpu(0))
    threads.start()
    threads.hold()
    threads.end(Outcome(End.STOPPED))
    assert threads.wait(5)


def test_first_outcome_counts(made: list[VcpuThreads]) -> None:
    threads = make(made, FakeVcpu(0))
    threads.start()
    threads.end(Outcome(End.POWERED_OFF))
    threads.end(Outcome(End.STOPPED))
    threads.wait(5)
    assert threads.outcome == Outcome(End.POWERED_OFF)


@pytest.mark.parametrize(
    ("stop", "outcome"),
    [
        (VcpuStop(StopReason.POWERED_OFF), Outcome(End.POWERED_OFF)),
        (VcpuStop(StopReason.CRASHED, TRIPLE_FAULT, Registers()), Outcome(End.RESET, TRIPLE_FAULT)),
        (VcpuStop(StopReason.CRASHED, "no such instruction"), Outcome(End.CRASHED, "no such instruction")),
        (STOP_HALTED, Outcome(End.HALTED, "every vCPU stands still with interrupts off")),
    ],
)
def test_stop_reason_becomes_the_outcome(made: list[VcpuThreads], stop: VcpuStop, outcome: Outcome) -> None:
    threads = make(made, FakeVcpu(0, lambda: stop))
    threads.start()
    assert threads.wait(5)
    assert threads.outcome == outcome
    assert threads.error is None


def test_one_halted_vcpu_does_not_end_the_machine(made: list[VcpuThreads]) -> None:
    halted, running = FakeVcpu(0, lambda: STOP_HALTED), FakeVcpu(1)
    threads = make(made, halted, running)
    threads.start()
    eventually(lambda: halted.runs == 1)
    assert not threads.wait(0.02)
    assert halted.runs == 1
    threads.hold()
    threads.release()


def test_guest_error_from_a_handler_is_a_crash(made: list[VcpuThreads]) -> None:
    def fault() -> VcpuStop:
        raise GuestMemoryError("guest address 0x1 is outside guest memory")

    threads = make(made, FakeVcpu(0, fault), FakeVcpu(1))
    threads.start()
    assert threads.wait(5)
    assert threads.outcome == Outcome(End.CRASHED, "guest address 0x1 is outside guest memory")
    assert threads.error is None


def test_bug_in_a_handler_ends_the_machine_with_an_internal_error(made: list[VcpuThreads]) -> None:
    def bug() -> VcpuStop:
        raise KeyError("oops")

    threads = make(made, FakeVcpu(0, bug), FakeVcpu(1))
    threads.start()
    assert threads.wait(5)
    assert isinstance(threads.error, InternalError)
    assert isinstance(threads.error.__cause__, KeyError)


def test_ended_is_called_once_after_the_last_vcpu(made: list[VcpuThreads]) -> None:
    calls: list[bool] = []
    vcpus = [FakeVcpu(index) for index in range(4)]
    threads = make(made, *vcpus, ended=lambda: calls.append(any(vcpu.inside for vcpu in vcpus)))
    threads.start()
    threads.end(Outcome(End.STOPPED))
    threads.wait(5)
    assert calls == [False]


def test_bug_in_ended_does_not_keep_waiters_waiting(made: list[VcpuThreads]) -> None:
    def bug() -> None:
        raise ValueError("oops")

    threads = make(made, FakeVcpu(0), ended=bug)
    threads.start()
    threads.end(Outcome(End.STOPPED))
    assert threads.wait(5)
    assert isinstance(threads.error, InternalError)


def test_handler_on_a_vcpu_thread_can_end_the_machine(made: list[VcpuThreads]) -> None:
    vcpu = FakeVcpu(0)
    threads = make(made, vcpu)

    def power_off() -> VcpuStop:
        threads.end(Outcome(End.POWERED_OFF))
        vcpu.kicked.wait()
        return STOP_KICKED

    vcpu.script = power_off
    threads.start()
    assert threads.wait(5)
    assert threads.outcome == Outcome(End.POWERED_OFF)


def test_no_more_host_threads_leaves_none_running(made: list[VcpuThreads], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    real = threading.Thread.start

    def start(self: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    threads = make(made, FakeVcpu(0), FakeVcpu(1))
    with pytest.raises(RuntimeError):
        threads.start()
    assert not started[0].is_alive()

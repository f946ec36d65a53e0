"""The I/O thread. The one unit test file with threads: they are what is tested."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from microvm.errors import StateError
from microvm.machine.reactor import Reactor

WAIT_S = 10.0


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


class Errors(list[Exception]):
    def __init__(self) -> None:
        super().__init__()
        self.seen = threading.Event()

    def __call__(self, error: Exception) -> None:
        self.append(error)
        self.seen.set()


@pytest.fixture
def errors() -> Errors:
    return Errors()


@pytest.fixture
def reactor(errors: Errors) -> Iterator[Reactor]:
    reactor = Reactor(errors)
    reactor.start()
    yield reactor
    reactor.stop()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    yield ours, theirs
    ours.close()
    theirs.close()


def test_nothing_exists_before_start_and_nothing_is_left_after_stop(errors: Errors) -> None:
    threads, files = threading.active_count(), descriptors()
    reactor = Reactor(errors)
    reactor.call_later(1000, lambda: None)
    reactor.call_soon_threadsafe(lambda: None)
    assert (threading.active_count(), descriptors()) == (threads, files)
    reactor.start()
    assert threading.active_count() == threads + 1
    reactor.stop()
    reactor.stop()
    assert (threading.active_count(), descriptors()) == (threads, files)
    with pytest.raises(StateError):
        reactor.start()


def test_stop_without_start_is_allowed(errors: Errors) -> None:
    reactor = Reactor(errors)
    reactor.stop()
    with pytest.raises(StateError):
        reactor.call_and_wait(lambda: None)


def test_calls_posted_before_start_run_in_order(errors: Errors) -> None:
    reactor = Reactor(errors)
    order: list[int] = []
    for number in range(3):
        reactor.call_soon_threadsafe(lambda number=number: order.append(number))  # type: ignore[misc]
    reactor.start()
    assert reactor.call_and_wait(lambda: list(order)) == [0, 1, 2]
    reactor.stop()


def test_call_and_wait_returns_the_result_and_raises_the_error(reactor: Reactor, errors: Errors) -> None:
    assert reactor.call_and_wait(lambda: reactor.call_and_wait(reactor.in_thread))
    with pytest.raises(ZeroDivisionError):
        reactor.call_and_wait(lambda: 1 // 0)
    assert not errors


def test_reader_is_called_for_data_until_removed(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    got: list[bytes] = []
    seen = threading.Event()

    def read() -> None:
        got.append(ours.recv(100))
        seen.set()

    reactor.add_reader(ours.fileno(), read)
    theirs.send(b"one")
    assert seen.wait(WAIT_S)
    reactor.remove_reader(ours.fileno())
    reactor.call_and_wait(lambda: None)
    theirs.send(b"two")
    reactor.call_and_wait(lambda: None)
    time.sleep(0.02)
    assert got == [b"one"]


def test_writer_is_called_when_there_is_room(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    while True:
        try:
            ours.send(bytes(65536))
        except BlockingIOError:
            break
    seen = threading.Event()

    def write() -> None:
        reactor.remove_writer(ours.fileno())
        seen.set()

    reactor.add_writer(ours.fileno(), write)
    assert not seen.wait(0.02)
    theirs.recv(1 << 20)
    assert seen.wait(WAIT_S)


def test_hangup_is_told_once_and_does_not_spin(reactor: Reactor, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    calls: list[None] = []
    seen = threading.Event()

    def hangup() -> None:
        calls.append(None)
        seen.set()

    reactor.add_hangup(ours.fileno(), hangup)
    theirs.shutdown(socket.SHUT_WR)
    assert not seen.wait(0.02)
    theirs.close()
    assert seen.wait(WAIT_S)
    before = reactor.call_and_wait(time.thread_time)
    time.sleep(0.1)
    assert reactor.call_and_wait(time.thread_time) - before < 0.02
    assert len(calls) == 1
    reactor.remove(ours.fileno())


def test_removing_a_neighbour_in_a_callback_keeps_it_from_being_called(reactor: Reactor) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []

    def read(which: int) -> None:
        called.append(which)
        for ours, _ in pairs:
            reactor.remove(ours.fileno())

    def arm() -> None:
        for which, (ours, theirs) in enumerate(pairs):
            reactor.add_reader(ours.fileno(), lambda which=which: read(which))  # type: ignore[misc]
            theirs.send(b"x")

    reactor.call_and_wait(arm)
    reactor.call_and_wait(lambda: None)
    reactor.call_and_wait(lambda: None)
    assert len(called) == 1
    for ours, theirs in pairs:
        ours.close()
        theirs.close()


def test_timers_fire_in_order_of_time_and_not_when_cancelled(reactor: Reactor) -> None:
    order: list[str] = []
    done = threading.Event()
    reactor.call_later(0.03, lambda: (order.append("late"), done.set()))  # type: ignore[arg-type, func-returns-value]
    reactor.call_later(0.01, lambda: order.append("early"))
    reactor.call_later(0.02, lambda: order.append("never")).cancel()
    assert done.wait(WAIT_S)
    assert order == ["early", "late"]


def test_errors_of_callbacks_reach_on_error_and_the_reactor_goes_on(
    reactor: Reactor, errors: Errors, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    reactor.call_soon_threadsafe(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    reactor.call_later(0, lambda: [][0])  # type: ignore[arg-type]

    def read() -> None:
        raise KeyError("reader")

    reactor.add_reader(ours.fileno(), read)
    theirs.send(b"x")  # stays unread: a reader that is not dropped after its error would be called for ever
    deadline = time.monotonic() + WAIT_S
    while len(errors) < 3 and time.monotonic() < deadline:
        errors.seen.wait(0.01)
    before = reactor.call_and_wait(time.thread_time)
    time.sleep(0.1)
    assert reactor.call_and_wait(time.thread_time) - before < 0.02
    assert {type(error) for error in errors} == {ZeroDivisionError, IndexError, KeyError}
    assert len(errors) == 3


def test_a_callback_that_posts_itself_does_not_starve_descriptors(
    reactor: Reactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    seen = threading.Event()

    def again() -> None:
        if not seen.is_set():
            reactor.call_soon_threadsafe(again)

    reactor.add_reader(ours.fileno(), lambda: (ours.recv(1), seen.set()))  # type: ignore[arg-type, func-returns-value]
    reactor.call_soon_threadsafe(again)
    theirs.send(b"x")
    assert seen.wait(WAIT_S)


def test_stop_from_a_callback_ends_the_thread(errors: Errors) -> None:
    reactor = Reactor(errors)
    reactor.start()
    reactor.call_soon_threadsafe(reactor.stop)
    reactor.stop()
    assert not reactor.running
    reactor.call_soon_threadsafe(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert not errors


def test_a_caller_waiting_when_the_reactor_stops_is_told(errors: Errors) -> None:
    reactor = Reactor(errors)
    reactor.start()
    outcome: list[object] = []

    def caller() -> None:
        try:
            outcome.append(reactor.call_and_wait(lambda: "served"))
        except StateError as error:
            outcome.append(error)

    entered = threading.Event()

    def stop_once_somebody_waits() -> None:
        entered.set()
        while not reactor._calls:
            time.sleep(0.001)
        reactor.stop()

    reactor.call_soon_threadsafe(stop_once_somebody_waits)
    assert entered.wait(WAIT_S)
    thread = threading.Thread(target=caller, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    reactor.stop()
    assert [type(result) for result in outcome] == [StateError]


def test_posting_from_many_threads_loses_nothing(reactor: Reactor) -> None:
    count = 2000
    served: list[int] = []

    def post() -> None:
        for number in range(count):
            reactor.call_soon_threadsafe(lambda number=number: served.append(number))  # type: ignore[misc]

    threads = [threading.Thread(target=post) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reactor.call_and_wait(lambda: None)
    assert len(served) == 3 * count

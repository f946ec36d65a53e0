from __future__ import annotations

import logging
from typing import Any

import pytest

from microvm.errors import InternalError, SnapshotError, VirtqueueError
from microvm.spec.virtio import Feature, InterruptBit, MmioReg, Status
from microvm.testing import FakeDriver
from microvm.virtio import Chain, QueueSpec, VirtioDevice
from microvm.virtio.device import MAX_POPS, ROUND_CHAINS


class Echo(VirtioDevice):
    """Answers a request with itself; keeps those that begin with K; misbehaves on B (guest) and X (us)."""

    device_id = 63
    queues = (QueueSpec("requests", 256), QueueSpec("events", 16))
    device_features = 1 << 5
    config = b"config!"

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []
        self.waiting: list[bytes] = []
        self.activations = 0
        self.served = 0

    def on_requests(self, chain: Chain) -> int | None:
        self.served += 1
        data = chain.read_all(4096)
        if data.startswith(b"B"):
            raise VirtqueueError("bad request")
        if data.startswith(b"X"):
            raise ZeroDivisionError("ours")
        if data.startswith(b"K"):
            self.kept.append(chain)
            return None
        return chain.write(data)

    def fill_events(self) -> None:
        while self.waiting and (chain := self.pop(1)) is not None:
            self.complete(chain, chain.write(self.waiting.pop(0)))

    def announce(self, *events: bytes) -> None:
        with self.batch():
            self.waiting.extend(events)
            self.fill_events()

    def on_activate(self) -> None:
        self.activations += 1

    def on_reset(self) -> None:
        self.kept.clear()

    def save_state(self) -> dict[str, Any]:
        return {"waiting": list(self.waiting)}

    def restore_state(self, state: dict[str, Any]) -> None:
        self.waiting = state["waiting"]


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(Echo()).start()


@pytest.fixture
def deferred() -> FakeDriver:
    return FakeDriver(Echo(), deferred=True).start()


def echo(driver: FakeDriver) -> Echo:
    assert isinstance(driver.device, Echo)
    return driver.device


def test_a_request_is_answered(driver: FakeDriver) -> None:
    assert driver.request("requests", b"hello", 16) == b"hello"
    assert driver.take_interrupts() == InterruptBit.USED_BUFFER
    assert driver.irq.pulses == 1


def test_a_batch_raises_one_interrupt(deferred: FakeDriver) -> None:
    for _ in range(20):
        deferred.add("requests", b"hello", 16)
    deferred.notify("requests")
    deferred.run()
    assert len(deferred.collect("requests")) == 20
    assert deferred.irq.pulses == 1


def test_a_driver_that_wants_no_interrupts_gets_none(driver: FakeDriver) -> None:
    driver.suppress_interrupts("requests")
    driver.request("requests", b"hello", 16)
    assert driver.irq.pulses == 0


def test_a_full_queue_takes_turns(deferred: FakeDriver) -> None:
    for _ in range(ROUND_CHAINS + 1):
        deferred.add("requests", b"x", 1)
    deferred.notify("requests")
    deferred.mmio.process(deferred.notified.pop())
    assert len(deferred.collect("requests")) == ROUND_CHAINS
    assert deferred.notified == [0]  # it asked for another turn by itself
    deferred.run()
    assert len(deferred.collect("requests")) == 1


def test_a_driver_that_refills_its_queue_cannot_hold_a_vcpu() -> None:
    driver = FakeDriver(Echo())

    class Refill(Echo):
        def on_requests(self, chain: Chain) -> int | None:
            if self.served < 1000:
                driver.add("requests", b"again", 8)
            return super().on_requests(chain)

    device = Refill()
    driver = FakeDriver(device).start()
    driver.add("requests", b"first", 8)
    driver.notify("requests")
    assert device.served == 1
    assert driver.wants_notify("requests")


def test_notifications_are_off_while_a_queue_waits_for_its_turn(deferred: FakeDriver) -> None:
    for _ in range(ROUND_CHAINS + 1):
        deferred.add("requests", b"x", 1)
    deferred.notify("requests")
    deferred.run(rounds=1)
    assert not deferred.wants_notify("requests")
    deferred.run()
    assert deferred.wants_notify("requests")


def test_a_kept_chain_completes_later_with_its_own_interrupt(driver: FakeDriver) -> None:
    driver.add("requests", b"Keep", 8)
    driver.notify("requests")
    assert driver.irq.pulses == 0
    chain = echo(driver).kept.pop()
    chain.write(b"late")
    driver.device.complete(chain, 4)
    assert [used.data for used in driver.collect("requests")] == [b"late"]
    assert driver.irq.pulses == 1


def test_a_kept_chain_from_before_a_reset_is_dropped(driver: FakeDriver) -> None:
    driver.add("requests", b"Keep", 8)
    driver.notify("requests")
    chain = echo(driver).kept.pop()
    driver.start()
    driver.device.complete(chain, 0)
    assert driver.collect("requests") == []
    assert driver.irq.pulses == 0


def test_events_reach_waiting_buffers_in_one_batch(driver: FakeDriver) -> None:
    for _ in range(3):
        driver.add("events", writable=8)
    echo(driver).announce(b"one", b"two", b"three")
    assert [used.data for used in driver.collect("events")] == [b"one", b"two", b"three"]
    assert driver.irq.pulses == 1


def test_events_wait_for_buffers(driver: FakeDriver) -> None:
    echo(driver).announce(b"one")
    assert driver.wants_notify("events")
    driver.add("events", writable=8)
    driver.notify("events")
    assert [used.data for used in driver.collect("events")] == [b"one"]


def test_a_driver_that_offers_useless_buffers_cannot_hold_the_thread(deferred: FakeDriver) -> None:
    class Picky(Echo):
        def fill_events(self) -> None:
            while (chain := self.pop(1)) is not None:
                self.served += 1
                self.complete(chain)
                deferred.collect("events")
                deferred.add("events", writable=1)

    deferred.move_to(Picky())
    deferred.run()
    deferred.add("events", writable=1)
    deferred.mmio.process(1)
    assert echo(deferred).served == MAX_POPS
    assert deferred.notified == [1]


def test_what_was_offered_before_driver_ok_is_served_then(driver: FakeDriver) -> None:
    driver.negotiate()
    driver.set_queue("requests")
    driver.add("requests", b"early", 8)
    driver.notify("requests")
    assert driver.collect("requests") == []
    driver.write(MmioReg.STATUS, driver.status | Status.DRIVER_OK)
    assert [used.data for used in driver.collect("requests")] == [b"early"]


def test_new_buffers_need_no_notification_while_nothing_waits(driver: FakeDriver) -> None:
    driver.add("events", writable=8)
    driver.notify("events")
    assert not driver.wants_notify("events")
    echo(driver).announce(b"one", b"two")
    assert driver.wants_notify("events")


def test_a_guest_error_needs_a_reset_and_is_logged_once(driver: FakeDriver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            driver.start()
            driver.take_interrupts()
            driver.add("requests", b"Bad")
            driver.notify("requests")
            assert driver.needs_reset
            assert driver.take_interrupts() == InterruptBit.CONFIG_CHANGE
    assert len(caplog.records) == 1
    assert driver.device.failures == 3


def test_a_broken_device_is_inert_until_reset(driver: FakeDriver) -> None:
    driver.add("requests", b"Bad")
    driver.notify("requests")
    driver.add("requests", b"hello", 8)
    driver.notify("requests")
    driver.mmio.process(0)
    echo(driver).announce(b"event")
    assert driver.collect("requests") == []
    driver.start()
    assert not driver.needs_reset
    assert driver.request("requests", b"hello", 8) == b"hello"


def test_a_broken_ring_found_from_the_host_side_is_contained(driver: FakeDriver) -> None:
    driver.offer("events", 9999)
    echo(driver).announce(b"event")
    assert driver.needs_reset


def test_any_other_exception_is_our_bug(driver: FakeDriver) -> None:
    driver.add("requests", b"X")
    with pytest.raises(InternalError, match="echo: ZeroDivisionError: ours"):
        driver.notify("requests")


def test_a_device_needs_one_method_for_each_queue() -> None:
    class Nothing(VirtioDevice):
        device_id = 63
        queues = (QueueSpec("requests", 16),)

    with pytest.raises(InternalError, match="on_requests"):
        Nothing()


def test_features_are_agreed(driver: FakeDriver) -> None:
    assert driver.offered() == Feature.VERSION_1 | Feature.INDIRECT_DESC | 1 << 5
    driver.start(1 << 5)
    assert driver.device.features == Feature.VERSION_1 | 1 << 5
    driver.reset()
    assert driver.device.features == 0


def test_indirect_tables_need_the_feature(driver: FakeDriver) -> None:
    driver.add("requests", b"hello", 8, indirect=True)
    driver.notify("requests")
    assert [used.data for used in driver.collect("requests")] == [b"hello"]
    driver.start(0)
    driver.add("requests", b"hello", 8, indirect=True)
    driver.notify("requests")
    assert driver.needs_reset


def test_a_configuration_change_is_announced_to_a_running_driver() -> None:
    driver = FakeDriver(Echo())
    driver.device.config_changed()
    assert driver.irq.pulses == 0
    driver.start()
    driver.device.config_changed()
    assert driver.take_interrupts() == InterruptBit.CONFIG_CHANGE


def test_a_restored_device_goes_on_where_it_was(driver: FakeDriver) -> None:
    driver.request("requests", b"before", 8)
    driver.add("requests", b"Keep", 8)
    driver.notify("requests")
    echo(driver).announce(b"event")
    old = driver.device
    driver.move_to(Echo())
    assert driver.device is not old
    assert len(echo(driver).kept) == 1  # what was in flight arrived again
    driver.device.complete(echo(driver).kept.pop(), 0)
    assert len(driver.collect("requests")) == 1
    driver.add("events", writable=8)
    driver.notify("events")
    assert [used.data for used in driver.collect("events")] == [b"event"]
    assert driver.request("requests", b"after", 8) == b"after"


def test_a_broken_device_stays_broken_over_a_restore(driver: FakeDriver) -> None:
    driver.add("requests", b"Bad")
    driver.notify("requests")
    driver.move_to(Echo())
    assert driver.needs_reset
    assert not driver.device.running
    assert echo(driver).served == 0


def test_the_state_of_another_device_is_refused(driver: FakeDriver) -> None:
    class Other(Echo):
        device_id = 62

    with pytest.raises(SnapshotError, match="not a other"):
        driver.move_to(Other())


def test_a_state_with_features_that_are_not_offered_is_refused(driver: FakeDriver) -> None:
    class Plain(Echo):
        device_features = 0

    with pytest.raises(SnapshotError, match="features"):
        driver.move_to(Plain())


def test_activation_happens_once(driver: FakeDriver) -> None:
    driver.write(MmioReg.STATUS, driver.status | Status.DRIVER_OK)
    assert echo(driver).activations == 1

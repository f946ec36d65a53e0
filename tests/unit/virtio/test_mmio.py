"""The register file. [virtio-v1.2] 4.2."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from microvm.errors import InternalError, SnapshotError
from microvm.irq import NullIrq
from microvm.memory import GuestMemory
from microvm.spec.virtio import Feature, InterruptBit, MmioReg, Status
from microvm.testing import FakeDriver
from microvm.virtio import Chain, QueueSpec, VirtioDevice, VirtioMmio

ACK, DRIVER, OK, FEATURES, NEEDS_RESET, FAILED = (
    Status.ACKNOWLEDGE,
    Status.DRIVER,
    Status.DRIVER_OK,
    Status.FEATURES_OK,
    Status.DEVICE_NEEDS_RESET,
    Status.FAILED,
)
AGREED = ACK | DRIVER | FEATURES


class Device(VirtioDevice):
    device_id = 63
    queues = (QueueSpec("requests", 64), QueueSpec("others", 128))
    device_features = 0b1011 | 1 << 40
    config = bytes(range(1, 13))

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[int, bytes]] = []

    def on_requests(self, chain: Chain) -> int:
        return chain.write(b"done")

    def on_others(self, chain: Chain) -> int:
        return 0

    def write_config(self, offset: int, data: bytes) -> None:
        self.written.append((offset, data))


@pytest.fixture
def driver() -> FakeDriver:
    return FakeDriver(Device())


def device(driver: FakeDriver) -> Device:
    assert isinstance(driver.device, Device)
    return driver.device


def test_identity(driver: FakeDriver) -> None:
    assert [driver.read(offset) for offset in (0, 4, 8)] == [0x74726976, 2, 63]


def test_features_are_read_by_word_and_end_after_two(driver: FakeDriver) -> None:
    words = []
    for selector in (0, 1, 2, 0xFFFF_FFFF):
        driver.write(MmioReg.DEVICE_FEATURES_SEL, selector)
        words.append(driver.read(MmioReg.DEVICE_FEATURES))
    assert words == [0b1011 | Feature.INDIRECT_DESC, 1 | 1 << 8, 0, 0]


def test_ring_reset_and_event_indices_are_not_offered() -> None:
    class Plain(Device):
        device_features = 0

    offered = FakeDriver(Plain()).offered()
    assert offered == Feature.VERSION_1 | Feature.INDIRECT_DESC


def test_features_that_were_not_offered_are_not_accepted(driver: FakeDriver) -> None:
    assert driver.negotiate(1 << 20) == ACK | DRIVER


def test_a_driver_without_version_1_is_not_accepted(driver: FakeDriver) -> None:
    for step in (0, ACK, ACK | DRIVER, AGREED):
        driver.write(MmioReg.STATUS, step)
    assert driver.status == ACK | DRIVER


def test_feature_words_beyond_64_bits_are_refused(driver: FakeDriver) -> None:
    driver.write(MmioReg.STATUS, ACK)
    driver.write(MmioReg.STATUS, ACK | DRIVER)
    driver.write(MmioReg.DRIVER_FEATURES_SEL, 2)
    driver.write(MmioReg.DRIVER_FEATURES, 0xFFFF_FFFF)
    assert driver.device.driver_features == 0


@pytest.mark.parametrize("status", [0, ACK, AGREED])
def test_features_are_refused_outside_negotiation(driver: FakeDriver, status: int) -> None:
    if status == AGREED:
        driver.negotiate()
    else:
        driver.write(MmioReg.STATUS, status)
    before = driver.device.driver_features
    driver.write(MmioReg.DRIVER_FEATURES_SEL, 0)
    driver.write(MmioReg.DRIVER_FEATURES, 1)
    assert driver.device.driver_features == before


@pytest.mark.parametrize("value", [DRIVER, FEATURES, OK, ACK | FEATURES, ACK | OK, ACK | DRIVER | OK])
def test_status_steps_out_of_order_are_refused(driver: FakeDriver, value: int) -> None:
    driver.write(MmioReg.STATUS, value)
    assert driver.status == 0


def test_status_bits_are_not_taken_back(driver: FakeDriver) -> None:
    driver.start()
    for value in (ACK, AGREED, OK, 0x40, 0xFFFF_FF00 | ACK):
        driver.write(MmioReg.STATUS, value)
        assert driver.status == AGREED | OK
    assert driver.device.running


def test_a_driver_cannot_set_needs_reset(driver: FakeDriver) -> None:
    driver.write(MmioReg.STATUS, ACK | NEEDS_RESET)
    assert driver.status == ACK


def test_a_driver_that_gave_up_gets_nothing_more(driver: FakeDriver) -> None:
    driver.start()
    driver.write(MmioReg.STATUS, driver.status | FAILED)
    driver.add("requests", writable=8)
    driver.notify("requests")
    assert driver.collect("requests") == []
    assert driver.status & FAILED
    driver.start()
    assert driver.request("requests", writable=8) == b"done"


def test_reset_clears_everything(driver: FakeDriver) -> None:
    driver.start()
    driver.request("requests", writable=8)
    driver.write(MmioReg.STATUS, 0)
    assert driver.status == 0
    assert driver.read(MmioReg.INTERRUPT_STATUS) == 0
    driver.write(MmioReg.QUEUE_SEL, 0)
    assert driver.read(MmioReg.QUEUE_READY) == 0
    assert driver.device.vqs[0].desc_gpa == 0


def test_queue_registers_beyond_the_last_queue_read_as_zero(driver: FakeDriver) -> None:
    driver.negotiate()
    sizes = []
    for selector in (0, 1, 2, 0xFFFF_FFFF):
        driver.write(MmioReg.QUEUE_SEL, selector)
        sizes.append(driver.read(MmioReg.QUEUE_NUM_MAX))
        if selector > 1:
            driver.write(MmioReg.QUEUE_NUM, 8)
            driver.write(MmioReg.QUEUE_READY, 1)
            assert driver.read(MmioReg.QUEUE_READY) == 0
    assert sizes == [64, 128, 0, 0]


QUEUE_REGISTERS = [
    MmioReg.QUEUE_NUM,
    MmioReg.QUEUE_DESC_LOW,
    MmioReg.QUEUE_DESC_HIGH,
    MmioReg.QUEUE_DRIVER_LOW,
    MmioReg.QUEUE_DRIVER_HIGH,
    MmioReg.QUEUE_DEVICE_LOW,
    MmioReg.QUEUE_DEVICE_HIGH,
]


@pytest.mark.parametrize("register", QUEUE_REGISTERS)
def test_a_live_queue_cannot_be_moved(driver: FakeDriver, register: int) -> None:
    driver.negotiate()
    driver.set_queue(0)
    before = driver.device.vqs[0].save()
    driver.write(register, 32)
    assert driver.device.vqs[0].save() == before


@pytest.mark.parametrize("register", QUEUE_REGISTERS)
def test_queues_cannot_be_configured_after_driver_ok(driver: FakeDriver, register: int) -> None:
    driver.negotiate()
    driver.set_queue(0)
    driver.write(MmioReg.STATUS, AGREED | OK)
    driver.write(MmioReg.QUEUE_SEL, 1)
    before = driver.device.vqs[1].save()
    driver.write(register, 32)
    driver.set_queue(1)
    assert driver.device.vqs[1].save() == before


@pytest.mark.parametrize("register", QUEUE_REGISTERS)
def test_queues_cannot_be_configured_before_features_are_agreed(driver: FakeDriver, register: int) -> None:
    for step in (ACK, ACK | DRIVER):
        driver.write(MmioReg.STATUS, step)
    before = driver.device.vqs[0].save()
    driver.write(register, 32)
    assert driver.device.vqs[0].save() == before


def test_a_stopped_queue_stays_stopped_until_reset(driver: FakeDriver) -> None:
    driver.start()
    driver.write(MmioReg.QUEUE_SEL, 0)
    driver.write(MmioReg.QUEUE_READY, 0)
    assert driver.read(MmioReg.QUEUE_READY) == 0
    driver.set_queue(0)
    assert driver.read(MmioReg.QUEUE_READY) == 0
    driver.add("requests", writable=8)
    driver.notify("requests")
    assert driver.collect("requests") == []


def test_a_queue_with_a_ring_outside_memory_needs_a_reset(driver: FakeDriver) -> None:
    driver.negotiate()
    driver.write(MmioReg.QUEUE_SEL, 0)
    driver.write(MmioReg.QUEUE_NUM, 64)
    driver.write(MmioReg.QUEUE_DESC_HIGH, 0xFFFF_FFFF)
    driver.write(MmioReg.QUEUE_READY, 1)
    assert driver.needs_reset
    assert driver.read(MmioReg.QUEUE_READY) == 0
    driver.write(MmioReg.STATUS, AGREED | OK)
    assert not driver.device.running
    assert driver.irq.pulses == 0  # no driver is up to hear of it


def test_interrupts_are_acknowledged_bit_by_bit(driver: FakeDriver) -> None:
    driver.start()
    driver.request("requests", writable=8)
    driver.device.config_changed()
    assert driver.read(MmioReg.INTERRUPT_STATUS) == 3
    driver.write(MmioReg.INTERRUPT_ACK, InterruptBit.USED_BUFFER | 0xFFFF_FFF0)
    assert driver.read(MmioReg.INTERRUPT_STATUS) == InterruptBit.CONFIG_CHANGE


def test_every_interrupt_is_an_edge(driver: FakeDriver) -> None:
    driver.start()
    for _ in range(3):
        driver.request("requests", writable=8)  # never acknowledged
    assert driver.irq.pulses == 3


@pytest.mark.parametrize("value", [2, 3, 0xFFFF, 0xFFFF_FFFF])
def test_notifying_a_queue_that_is_not_there_does_nothing(driver: FakeDriver, value: int) -> None:
    driver.start()
    driver.write(MmioReg.QUEUE_NOTIFY, value)
    assert not driver.needs_reset


def test_a_notification_goes_to_the_notifier_without_the_device_lock() -> None:
    driver = FakeDriver(Device(), deferred=True).start()
    done = threading.Event()
    with driver.device.lock:  # the I/O thread is in the middle of a long request

        def vcpu() -> None:
            driver.notify("others")
            driver.take_interrupts()
            done.set()

        thread = threading.Thread(target=vcpu)
        thread.start()
        assert done.wait(5)
    thread.join()
    assert driver.notified == [1]


def test_a_flood_of_notifications_waits_as_one() -> None:
    driver = FakeDriver(Device(), deferred=True).start()
    for _ in range(1000):
        driver.notify("requests")
    driver.notify("others")
    assert driver.notified == [0, 1]
    driver.run()
    driver.notify("requests")
    assert driver.notified == [0]


def test_notifications_before_driver_ok_are_dropped() -> None:
    driver = FakeDriver(Device(), deferred=True)
    driver.negotiate()
    driver.notify("requests")
    assert driver.notified == []


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 1, 1),
        (0, 2, 0x0201),
        (0, 4, 0x04030201),
        (0, 8, 0x0807060504030201),
        (10, 4, 0x0C0B),
        (12, 4, 0),
        (0xEF8, 8, 0),
    ],
)
def test_configuration_is_read_in_every_size(driver: FakeDriver, offset: int, size: int, value: int) -> None:
    assert driver.config(offset, size) == value


def test_configuration_is_written_by_a_driver_only(driver: FakeDriver) -> None:
    driver.write(MmioReg.CONFIG + 4, 0x1234, 2)
    driver.start()
    driver.write(MmioReg.CONFIG + 4, 0xFF_5678, 2)
    assert device(driver).written == [(4, b"\x78\x56")]


def test_the_configuration_generation_steps(driver: FakeDriver) -> None:
    before = driver.read(MmioReg.CONFIG_GENERATION)
    driver.device.config_changed()
    assert driver.read(MmioReg.CONFIG_GENERATION) == before + 1


def test_there_is_no_shared_memory(driver: FakeDriver) -> None:
    driver.write(MmioReg.SHM_SEL, 0)
    registers = (MmioReg.SHM_LEN_LOW, MmioReg.SHM_LEN_HIGH, MmioReg.SHM_BASE_LOW, MmioReg.SHM_BASE_HIGH)
    assert [driver.read(register) for register in registers] == [0xFFFF_FFFF] * 4


@pytest.mark.parametrize("size", [1, 2, 8])
def test_control_registers_take_four_bytes_only(driver: FakeDriver, size: int) -> None:
    assert driver.read(MmioReg.MAGIC, size) == 0
    driver.write(MmioReg.STATUS, ACK, size)
    assert driver.status == 0
    driver.start()
    driver.add("requests", writable=8)
    driver.write(MmioReg.QUEUE_NOTIFY, 0, size)
    assert driver.collect("requests") == []


def test_our_bugs_come_out_of_register_accesses_as_internal_errors() -> None:
    class Buggy(Device):
        def read_config(self, offset: int, size: int) -> bytes:
            raise IndexError("oops")

        def write_config(self, offset: int, data: bytes) -> None:
            raise IndexError("oops")

    driver = FakeDriver(Buggy()).start()
    with pytest.raises(InternalError):
        driver.config(0)
    with pytest.raises(InternalError):
        driver.write(MmioReg.CONFIG, 0)
    assert driver.status == AGREED | OK  # and the lock is free again
    assert driver.device.lock.acquire(blocking=False)


def test_a_device_is_attached_once(driver: FakeDriver) -> None:
    with pytest.raises(InternalError, match="twice"):
        VirtioMmio(driver.device, GuestMemory.allocate(1 << 20), NullIrq())


def test_selectors_and_pending_interrupts_survive_a_restore(driver: FakeDriver) -> None:
    driver.start()
    driver.request("requests", writable=8)
    driver.write(MmioReg.QUEUE_SEL, 1)
    driver.write(MmioReg.DEVICE_FEATURES_SEL, 1)
    pulses = driver.irq.pulses
    driver.move_to(Device())
    assert driver.irq.pulses == pulses + 1
    assert driver.read(MmioReg.QUEUE_NUM_MAX) == 128
    assert driver.read(MmioReg.DEVICE_FEATURES) == 1 | 1 << 8
    assert driver.take_interrupts() == InterruptBit.USED_BUFFER


def test_a_saved_ring_outside_memory_is_refused(driver: FakeDriver) -> None:
    driver.start()
    state = driver.mmio.save()
    queues = (dataclasses.replace(state.device.queues[0], used_gpa=1 << 40), state.device.queues[1])
    bad = dataclasses.replace(state, device=dataclasses.replace(state.device, queues=queues))
    other = VirtioMmio(Device(), driver.memory, NullIrq())
    with pytest.raises(SnapshotError, match="outside guest memory"):
        other.restore(bad)

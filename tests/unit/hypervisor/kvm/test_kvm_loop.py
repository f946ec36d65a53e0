"""The run loop on a page that nobody runs: the first access of a kind goes through the bus, the next ones do not."""

from __future__ import annotations

import errno
import mmap
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest

from microvm.bus import Bus
from microvm.hypervisor.base import StopReason
from microvm.hypervisor.kvm import abi, api
from microvm.hypervisor.kvm import vcpu as vcpu_module
from microvm.hypervisor.kvm.vcpu import KvmVcpu

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="KVM is Linux")

DATA = 4096
WINDOW = 0xD000_0000


class FakeApi:
    def map_run(self, fd: int, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size)

    def close(self, fd: int) -> None:
        pass


class Device:
    """Answers every read with more bits than were asked for."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def pio_read(self, offset: int, size: int) -> int:
        self.log.append(("in", offset, size, 0))
        return 0x1_8877_6655_0000_0000 | len(self.log) * 0x0101_0101

    def pio_write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("out", offset, size, value))

    def mmio_read(self, offset: int, size: int) -> int:
        self.log.append(("read", offset, size, 0))
        return 1 << 70 | len(self.log) * 0x0101_0101_0101_0101

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("write", offset, size, value))


class Rig:
    """A vCPU whose KVM_RUN is a list of functions that fill the page; at the end of the list it is kicked."""

    def __init__(self) -> None:
        self.vcpu = KvmVcpu(cast(api.Api, FakeApi()), cast(Any, None), 0, -1, 3 * 4096)
        self.page = self.vcpu._u8
        self.steps: list[Callable[[], None]] = []
        self.vcpu._run = self._next

    def _next(self, fd: int, request: int) -> None:
        if not self.steps:
            self.vcpu.kick()
            raise OSError(errno.EINTR, "interrupted")
        self.steps.pop(0)()

    def run(self, bus: Bus, *steps: Callable[[], None]) -> None:
        self.steps = list(steps)
        assert self.vcpu._loop(bus).reason == StopReason.KICKED

    def pio(self, write: bool, port: int, size: int, count: int = 1, data: bytes = b"") -> Callable[[], None]:
        def fill() -> None:
            run = abi.kvm_run.from_buffer(self.vcpu._page)
            run.exit_reason = abi.KVM_EXIT_IO
            io = run.io
            io.direction, io.size, io.port, io.count, io.data_offset = write, size, port, count, DATA
            self.page[DATA : DATA + len(data)] = data

        return fill

    def mmio(self, write: bool, gpa: int, size: int, data: bytes = b"") -> Callable[[], None]:
        def fill() -> None:
            self.page[:] = b"\xcc" * len(self.page)  # whatever an earlier exit left in the union
            run = abi.kvm_run.from_buffer(self.vcpu._page)
            run.immediate_exit = 0
            run.exit_reason = abi.KVM_EXIT_MMIO
            run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = gpa, size, write
            for index, byte in enumerate(data):
                run.mmio.data[index] = byte

        return fill


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def bus(device: Device) -> Bus:
    bus = Bus()
    bus.map_pio(0x100, 8, device)
    bus.map_mmio(WINDOW, 0x2000, device)
    return bus


@pytest.mark.parametrize("size", [1, 2, 4])
def test_repeated_port_writes_carry_their_own_values(rig: Rig, bus: Bus, device: Device, size: int) -> None:
    first, second = b"\x11\x22\x33\x44"[:size], b"\x55\x66\x77\x88"[:size]
    rig.run(bus, rig.pio(True, 0x102, size, data=first), *[rig.pio(True, 0x102, size, data=second)] * 2)
    values = [int.from_bytes(value, "little") for value in (first, second, second)]
    assert device.log == [("out", 2, size, value) for value in values]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_repeated_port_reads_are_cut_to_their_size(rig: Rig, bus: Bus, device: Device, size: int) -> None:
    for number in (1, 2, 3):
        rig.page[DATA : DATA + 8] = b"\xee" * 8
        rig.run(bus, rig.pio(False, 0x104, size))
        assert bytes(rig.page[DATA : DATA + 8]) == bytes([number]) * size + b"\xee" * (8 - size)


def test_a_string_after_single_accesses_takes_every_element(rig: Rig, bus: Bus, device: Device) -> None:
    rig.run(bus, rig.pio(True, 0x100, 1, data=b"a"), rig.pio(True, 0x100, 1, count=3, data=b"bcd"))
    assert bytes(value for *_, value in device.log) == b"abcd"


def test_only_ports_that_answer_are_remembered(rig: Rig, bus: Bus) -> None:
    rig.run(bus, *[rig.pio(True, port, 1, count) for port in range(0x200, 0x300) for count in (1, 5)])
    rig.run(bus, *[rig.pio(True, 0x100, 1, count) for count in range(1, 50)])
    assert len(rig.vcpu._ports) == 1
    assert bus.unclaimed == 256 * 6


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_repeated_mmio_of_every_size_reaches_the_device(rig: Rig, bus: Bus, device: Device, size: int) -> None:
    data = bytes(range(1, size + 1))
    rig.run(bus, *[rig.mmio(True, WINDOW + 0x1008, size, data)] * 3)
    assert device.log == [("write", 0x1008, size, int.from_bytes(data, "little"))] * 3
    rig.run(bus, *[rig.mmio(False, WINDOW + 0x10, size)] * 2)
    at = abi.kvm_run.u.offset + 8
    assert bytes(rig.page[at : at + size]) == b"\x05" * size


def test_another_bus_is_asked_itself(rig: Rig, bus: Bus, device: Device) -> None:
    rig.run(bus, rig.pio(True, 0x100, 1), rig.mmio(True, WINDOW, 4))
    other, answering = Bus(), Device()
    other.map_pio(0x100, 1, answering)
    other.map_mmio(WINDOW, 0x1000, answering)
    rig.run(other, rig.pio(True, 0x100, 1), rig.mmio(True, WINDOW, 4))
    assert (len(device.log), len(answering.log)) == (2, 2)


def test_where_ioctl_retries_on_eintr_the_call_goes_through_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    assert api.kvm_run() is api.kvm_run_by_ctypes
    assert vcpu_module.kvm_run is api.kvm_run


def test_the_ctypes_call_raises_what_the_system_says() -> None:
    with pytest.raises(OSError) as caught:
        api.kvm_run_by_ctypes(-1, abi.KVM_RUN)
    assert caught.value.errno == errno.EBADF

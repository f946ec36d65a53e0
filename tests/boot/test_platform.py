"""The loaders, the ACPI tables and the platform's devices under real kernels, without the machine around them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm import boot
from microvm.boot import layout
from microvm.bus import Bus
from microvm.devices.ioapic import IoApic
from microvm.devices.power import Power
from microvm.devices.rtc import Rtc
from microvm.devices.serial import Serial
from microvm.hypervisor import select
from microvm.hypervisor.base import PartitionConfig, StopReason
from microvm.memory import GuestMemory

pytestmark = [pytest.mark.boots, pytest.mark.timeout(240)]
# No reboot= here: what the kernel picks by itself must work.
CMDLINE = "console=ttyS0 panic=-1 cryptomgr.notests"


class Platform:
    """The smallest machine: what this package's boot and platform devices are, and a partition."""

    def __init__(self, backend: str, cpus: int, mib: int) -> None:
        self.memory = GuestMemory.allocate(mib << 20)
        self.partition = select.load(backend).create_partition(PartitionConfig(vcpus=cpus))
        for region in self.memory:
            self.partition.map(region.gpa, region)
        self.output = bytearray()
        self.ended: list[str] = []
        self.bus = Bus()
        ioapic = IoApic(self.partition)
        self.serial = Serial(self.output.extend, ioapic.line(layout.SERIAL_GSI), self._latch)
        self.bus.map_mmio(layout.IOAPIC, 0x1000, ioapic)
        self.bus.on_eoi(ioapic.on_eoi)
        self.bus.map_pio(layout.SERIAL_PORT, 8, self.serial)
        self.bus.map_pio(layout.CMOS_PORT, 2, Rtc())
        power = Power(lambda: self._end("off"), lambda: self._end("reset"))
        self.bus.map_pio(layout.SLEEP_CONTROL_PORT, 3, power)
        self.vcpus = [self.partition.create_vcpu(index) for index in range(cpus)]

    def _latch(self, offset: int, value: int) -> None:
        self.partition.latch_pio(layout.SERIAL_PORT + offset, value)

    def _end(self, why: str) -> None:
        self.ended.append(why)
        for vcpu in self.vcpus:
            vcpu.kick()

    def run(self, state: boot.BootState, timeout_s: float) -> list[str]:
        """Run until the guest ends, and give the console's lines."""
        self.vcpus[0].set_registers(state.registers)
        timer = threading.Timer(timeout_s, self._end, ["timeout"])
        timer.start()
        threads = [threading.Thread(target=self._run_vcpu, args=[vcpu]) for vcpu in self.vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        timer.cancel()
        timer.join()
        self.partition.close()
        self.memory.close()
        return self.output.decode("latin-1").splitlines()

    def _run_vcpu(self, vcpu: Any) -> None:
        while not self.ended:
            stop = vcpu.run(self.bus)
            if stop.reason != StopReason.KICKED:
                self._end(f"{stop.reason}: {stop.detail}")


def bzimage_of(kernel: Any) -> Path:
    path = Path(kernel.path).with_name("bzImage")
    if not path.exists():
        pytest.skip("this kernel is not in the cache as a bzImage")
    return path


@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("kind", ["tuned", "cloud", "generic"])
def test_kernel_finds_the_platform_and_restarts_by_itself(
    kernel: Callable[[str], Any], backend: str, kind: str, cpus: int
) -> None:
    path = bzimage_of(kernel(kind))
    platform = Platform(backend, cpus, 256)
    with path.open("rb") as file:
        state = boot.load(platform.memory, file, (), CMDLINE, cpus, [boot.virtio_slot(0)])
    text = "\n".join(platform.run(state, 120))
    assert platform.ended == ["reset"], text[-2000:]
    assert "Unable to mount root fs" in text
    assert "GSI 0-23" in text
    assert "ACPI: PM: (supports S0 S5)" in text or kind == "tuned"
    assert "is a 16550A" in text
    assert "ACPI Error" not in text
    assert "ACPI BIOS" not in text
    assert f"node, {cpus} CPU" in text
    assert state.protocol in ("pvh", "bzimage")


def test_bzimage_unpacks_itself_and_finds_memory_above_4_gib(kernel: Callable[[str], Any], backend: str) -> None:
    path = bzimage_of(kernel("cloud"))
    platform = Platform(backend, 1, 5 << 10)
    with path.open("rb") as file:
        state = boot.load(platform.memory, file, (), CMDLINE, unpack=False)
    text = "\n".join(platform.run(state, 180))
    assert platform.ended == ["reset"], text[-2000:]
    assert "[mem 0x0000000100000000-0x000000017fffffff] usable" in text
    assert "[mem 0x0000000000100000-0x00000000bfffffff] usable" in text

"""Putting a machine together: memory, kernel, platform devices, virtio devices, vCPUs; and taking it apart.

`build` returns a machine that has no thread and no descriptor of its own beside its disk files, so that it can be
forked; `Machine.start` adds I/O threads and doorbells. Everything that is acquired goes onto one exit stack the moment
it exists, so a failure half-way leaves nothing behind and `close` is the same code.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from .._os.event import Event
from ..boot import VirtioSlot, acpi, layout, virtio_slot
from ..bus import Bus
from ..devices.i8042 import I8042
from ..devices.ioapic import IoApic
from ..devices.power import Power, PowerButton
from ..devices.rtc import Rtc
from ..devices.serial import Serial
from ..errors import ConfigError, GuestError, InternalError
from ..hypervisor.base import Hypervisor, PartitionConfig, Vcpu
from ..memory import GuestMemory
from ..spec.virtio import MmioReg
from ..virtio import VirtioDevice, VirtioMmio
from . import wiring
from .config import MachineConfig
from .console import Console
from .outcome import End, Outcome
from .reactor import Reactor

if TYPE_CHECKING:
    from ..devices.balloon import Balloon
    from .snapshots import Origin, Restored
    from .vsock_host import VsockHost

EndMachine = Callable[[Outcome, InternalError | None], None]
"""Ends the machine from any thread, device callbacks included."""

_NOTIFY_SIZE: Final = 4
_PAGES_PER_MIB: Final = 256


class Slot:
    """A virtio device in its place: transport, address, and the I/O thread that serves it."""

    def __init__(self, transport: VirtioMmio, place: VirtioSlot, reactor: Reactor) -> None:
        self.transport = transport
        self.place = place
        self.reactor = reactor

    @property
    def device(self) -> VirtioDevice:
        return self.transport.device

    @property
    def queue_count(self) -> int:
        return len(self.device.queues)


class Machine:
    """The assembled parts. `MicroVM` owns one; nobody else reaches into it but snapshots and tests."""

    def __init__(
        self,
        config: MachineConfig,
        hypervisor: Hypervisor,
        end: EndMachine,
        devices: Sequence[VirtioDevice] = (),
        restored: Restored | None = None,
    ) -> None:
        self.config = config
        self._extra_devices = devices
        self.hypervisor = hypervisor
        self.serial = Console()
        self.console: Console | None = None
        self.vsock: VsockHost | None = None
        self.balloon: Balloon | None = None
        self.slots: list[Slot] = []
        self.vcpus: list[Vcpu] = []
        self.bus = Bus()
        self._end = end
        self.origin: Origin | None = None
        self._bells: dict[tuple[int, int], Event] = {}
        self._resources = contextlib.ExitStack()
        try:
            self._build(restored)
        except BaseException:
            self._resources.close()
            raise

    def _build(self, restored: Restored | None) -> None:
        config, resources = self.config, self._resources
        self.memory: GuestMemory
        if restored is None:
            config.check_files()
            self.memory = wiring.allocate_memory(config.memory_mib)
        else:
            restored.check(self.hypervisor)
            self.memory = GuestMemory.from_mapping(restored.snapshot.map(), of_file=True)
            self.origin = restored.origin()
        resources.callback(self.memory.close)
        self.partition = self.hypervisor.create_partition(PartitionConfig(vcpus=config.cpus))
        resources.callback(self.partition.close)
        for region in self.memory:
            self.partition.map(region.gpa, region)
        if self.partition.caps.host_writes:
            self.memory.observe(self.partition.host_wrote)
        self._add_platform()
        self.reactor = Reactor(self._io_failed)
        self._add_virtio()
        for index in range(config.cpus):
            self.vcpus.append(self.partition.create_vcpu(index))
        if restored is None:
            boot = wiring.load_kernel(config, self.memory, [slot.place for slot in self.slots])
            self.memory.write(layout.GENERATION_ID, os.urandom(acpi.GENERATION_ID_SIZE))
            self.vcpus[0].set_registers(boot.registers)
        else:
            from . import snapshots

            snapshots.apply(self, restored)
            self.renew()

    def _add_platform(self) -> None:
        bus, partition = self.bus, self.partition
        self.ioapic = IoApic(partition)
        bus.map_mmio(layout.IOAPIC, 0x1000, self.ioapic)
        bus.on_eoi(self.ioapic.on_eoi)
        self.uart = Serial(
            self.serial.feed,
            self.ioapic.line(layout.SERIAL_GSI),
            latch=(lambda offset, value: partition.latch_pio(layout.SERIAL_PORT + offset, value))
            if partition.caps.pio_latch
            else None,
            on_room=self.serial.room,
        )
        self.serial.connect(self.uart.feed)
        bus.map_pio(layout.SERIAL_PORT, 8, self.uart)
        self.rtc = Rtc()
        bus.map_pio(layout.CMOS_PORT, 2, self.rtc)
        reset = partial(self._end, Outcome(End.RESET), None)
        self.power = Power(partial(self._end, Outcome(End.POWERED_OFF), None), reset, layout.RESET_VALUE)
        bus.map_pio(layout.SLEEP_CONTROL_PORT, 3, self.power)
        bus.map_pio(layout.I8042_PORT, 1, I8042(reset))
        self._generation = self.ioapic.line(acpi.GENERATION_GSI)
        self.power_button = PowerButton(self.ioapic.line(layout.GED_GSI))

    def _add_virtio(self) -> None:
        config = self.config
        if config.console:
            from ..devices.console import Console as ConsoleDevice

            self.console = Console()
            device = ConsoleDevice(self.console.feed, on_room=self.console.room)
            self.console.connect(device.feed, device.resize)
            self._attach(device, self.reactor)
        if config.rng:
            from ..devices.rng import Rng

            self._attach(Rng(), self.reactor)
        if config.balloon:
            from ..devices.balloon import Balloon

            self.balloon = Balloon()
            self._attach(self.balloon, self.reactor)
        if config.vsock_cid is not None:
            self._add_vsock(config.vsock_cid)
        for index, disk in enumerate(config.disks):
            from ..devices.block import Block

            raw = wiring.open_disk(disk)
            self._resources.callback(raw.close)
            # Each disk has a thread: a host that takes its time over an fsync must not hold up sockets and console.
            reactor = Reactor(self._io_failed, name=f"microvm-disk{index}")
            self._attach(Block(raw, read_only=disk.read_only, serial=f"microvm-disk{index}".encode()), reactor)
        for extra in self._extra_devices:
            self._attach(extra, self.reactor)

    def _add_vsock(self, cid: int) -> None:
        from ..devices.vsock import Vsock
        from .vsock_host import VsockHost

        device = Vsock(cid)
        self.vsock = VsockHost(device, self.reactor, self.config.vsock_path)
        self._attach(device, self.reactor)

    def _attach(self, device: VirtioDevice, reactor: Reactor) -> Slot:
        if len(self.slots) == layout.VIRTIO_SLOTS:
            raise ConfigError("devices", "", f"a machine has room for {layout.VIRTIO_SLOTS} virtio devices")
        place = virtio_slot(len(self.slots))
        calls: list[Callable[[], None]] = []

        def notify(index: int) -> None:
            reactor.call_soon_threadsafe(calls[index])

        transport = VirtioMmio(device, self.memory, self.ioapic.line(place.gsi), notify)
        calls += [partial(transport.process, index) for index in range(len(device.queues))]
        self.bus.map_mmio(place.gpa, place.size, transport)
        slot = Slot(transport, place, reactor)
        self.slots.append(slot)
        self._resources.callback(_let_go, device)
        return slot

    @property
    def reactors(self) -> list[Reactor]:
        """Every I/O thread, once."""
        found = [self.reactor]
        for slot in self.slots:
            if slot.reactor not in found:
                found.append(slot.reactor)
        return found

    def start(self) -> None:
        """Start the I/O threads and connect the doorbells. On failure the caller closes the machine."""
        for reactor in self.reactors:
            self._resources.callback(reactor.stop)
            reactor.start()
        if self.vsock is not None:
            self._resources.callback(self.vsock.close)  # before the reactors stop
            self.vsock.start()
        self._resources.callback(self._close_bells)
        self._connect_doorbells()

    def renew(self) -> None:
        """Tell the guest that it is a copy: a new generation id, on which Linux reseeds its random numbers at once."""
        self.memory.write(layout.GENERATION_ID, os.urandom(acpi.GENERATION_ID_SIZE))
        self._generation.pulse()

    def suspend(self) -> None:
        """End the I/O threads and keep everything else, so that the process may fork; then `resume`."""
        for reactor in self.reactors:
            reactor.suspend()

    def resume(self) -> None:
        """New I/O threads after `suspend`."""
        for reactor in self.reactors:
            reactor.resume()

    def forked(self) -> None:
        """In the child, between `suspend` and `resume`: what is shared with the parent is let go, and made anew."""
        if self.vsock is not None:
            self.vsock.forked()
        for reactor in self.reactors:
            reactor.forget_all()
        self._close_bells()
        self._connect_doorbells()
        self.renew()

    def _close_bells(self) -> None:
        for event in self._bells.values():
            event.close()
        self._bells.clear()

    def _connect_doorbells(self) -> None:
        if self.partition.caps.doorbells:
            for slot in self.slots:
                for index in range(slot.queue_count):
                    self._connect_doorbell(slot, index)

    def _connect_doorbell(self, slot: Slot, index: int) -> None:
        event = self._bells[slot.place.gsi, index] = Event()
        if not self.partition.doorbell(slot.place.gpa + MmioReg.QUEUE_NOTIFY, _NOTIFY_SIZE, index, event):
            return
        transport = slot.transport

        def rung() -> None:
            event.clear()
            transport.notifications += 1
            transport.process(index)

        slot.reactor.add_reader(event.fd, rung)

    def quiesce(self) -> None:
        """No vCPU runs any more: deliver what the guest had handed over, then end what hosts wait for."""
        for slot in self.slots:
            with contextlib.suppress(Exception):  # the machine has ended, and why is known already
                slot.reactor.call_and_wait(partial(_drain, slot.transport))
        if self.vsock is not None:
            self.vsock.close()
        self.serial.close()
        if self.console is not None:
            self.console.close()

    def close(self) -> None:
        """Free everything, newest first: I/O threads, vCPUs, devices, memory. No vCPU runs any more."""
        self.serial.close()
        if self.console is not None:
            self.console.close()
        self._resources.close()

    def set_balloon(self, target_mib: int) -> None:
        """See `MicroVM.set_balloon`."""
        assert self.balloon is not None
        self.balloon.target_pages = target_mib * _PAGES_PER_MIB

    def stats(self) -> dict[str, int]:
        """See `MicroVM.stats`."""
        found = {"unclaimed": self.bus.unclaimed, "serial_dropped": self.serial.dropped}
        for number, vcpu in enumerate(self.vcpus):
            exits = getattr(vcpu, "exits", None)
            if isinstance(exits, int):
                found[f"vcpu{number}_exits"] = exits
        for number, slot in enumerate(self.slots):
            device = slot.device
            prefix = f"virtio{number}_{device.name}"
            found[f"{prefix}_notifications"] = slot.transport.notifications
            found[f"{prefix}_interrupts"] = device.interrupts
            found[f"{prefix}_failures"] = device.failures
        return found

    def _io_failed(self, error: Exception) -> None:
        """An I/O thread's callback raised: this machine ends, and `MicroVM.wait` raises it."""
        if isinstance(error, GuestError):
            self._end(Outcome(End.CRASHED, str(error)), None)
            return
        if not isinstance(error, InternalError):
            cause = error
            error = InternalError(f"{type(cause).__name__}: {cause}")
            error.__cause__ = cause
        self._end(Outcome(End.CRASHED, "internal error"), error)


def _let_go(device: VirtioDevice) -> None:
    """Drop what the device holds of guest memory, so that closing the memory frees it at once."""
    with device.lock:
        device.reset()


def _drain(transport: VirtioMmio) -> None:
    for queue in transport.device.vqs:
        if queue.ready:
            transport.process(queue.index)


def build(
    config: MachineConfig,
    hypervisor: Hypervisor | None,
    end: EndMachine,
    devices: Sequence[VirtioDevice] = (),
    restored: Restored | None = None,
) -> Machine:
    """Assemble a machine, from a snapshot if one is given; on any error nothing is left of it.

    Raises ConfigError, BootError, BackendUnavailable, HostError, SnapshotError.
    """
    if hypervisor is None:
        from ..hypervisor.select import choose

        if restored is None:
            config.check_files()  # before the backends are probed: a wrong file name is answered at once
        hypervisor = choose(config.backend)
    return Machine(config, hypervisor, end, devices, restored)

"""The MMIO transport, version 2. [virtio-v1.2] 4.2.

A page of registers in front of a device. vCPU threads access it while the I/O thread serves queues; the device's lock
is held for all but two things that must not wait behind a disk: the notification, which only calls the notifier,
and the interrupt status, which has a small lock of its own.

Control registers take aligned 32-bit accesses only; anything else reads as zero and writes nothing. What is written
at the wrong moment (features after FEATURES_OK, queue addresses of a live queue or after DRIVER_OK) is refused in
silence, as hardware does: a queue whose ring moved under us after it was checked would be a hole.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..errors import GuestError, SnapshotError
from ..irq import IrqLine
from ..memory import GuestMemory
from ..spec.virtio import MMIO_MAGIC, MMIO_VENDOR, MMIO_VERSION, Feature, MmioReg, Status
from .device import DeviceState, VirtioDevice
from .queue import Queue

_ALL_ONES: Final = 0xFFFF_FFFF
_CONFIGURABLE: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK

_ADDRESSES: Final = {
    MmioReg.QUEUE_DESC_LOW: ("desc_gpa", 0),
    MmioReg.QUEUE_DESC_HIGH: ("desc_gpa", 32),
    MmioReg.QUEUE_DRIVER_LOW: ("avail_gpa", 0),
    MmioReg.QUEUE_DRIVER_HIGH: ("avail_gpa", 32),
    MmioReg.QUEUE_DEVICE_LOW: ("used_gpa", 0),
    MmioReg.QUEUE_DEVICE_HIGH: ("used_gpa", 32),
}


@dataclass(frozen=True, slots=True)
class MmioState:
    """A transport and its device in a snapshot."""

    device: DeviceState
    interrupt_status: int
    device_features_sel: int
    driver_features_sel: int
    queue_sel: int


class VirtioMmio:
    """The register file in front of ``device``; an MmioDevice of `MMIO_SIZE` bytes.

    ``irq`` is pulsed for every interrupt. ``notifier(index)``, called on the vCPU thread without a lock, hands a queue
    to the I/O thread, which calls `process`, and is not called again for that queue until then; without one, the vCPU
    that notifies serves the queue itself.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        irq: IrqLine,
        notifier: Callable[[int], None] | None = None,
    ) -> None:
        self.device = device
        self.notifications = 0
        self._irq = irq
        self._notifier = notifier
        self._interrupt_lock = threading.Lock()
        self._interrupt_status = 0
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._queue_sel = 0
        self._queue_count = len(device.queues)
        self._process = device.process
        self._waiting = [False] * self._queue_count
        self._serve = self.process if notifier is None else self._notify
        device.attach(memory, self._interrupt, None if notifier is None else self._notify)
        self._reads: dict[int, Callable[[], int]] = {
            MmioReg.MAGIC: lambda: MMIO_MAGIC,
            MmioReg.VERSION: lambda: MMIO_VERSION,
            MmioReg.DEVICE_ID: lambda: device.device_id,
            MmioReg.VENDOR_ID: lambda: MMIO_VENDOR,
            MmioReg.DEVICE_FEATURES: self._read_features,
            MmioReg.QUEUE_NUM_MAX: self._read_queue_num_max,
            MmioReg.QUEUE_READY: self._read_queue_ready,
            MmioReg.STATUS: lambda: device.status,
            MmioReg.SHM_LEN_LOW: lambda: _ALL_ONES,
            MmioReg.SHM_LEN_HIGH: lambda: _ALL_ONES,
            MmioReg.SHM_BASE_LOW: lambda: _ALL_ONES,
            MmioReg.SHM_BASE_HIGH: lambda: _ALL_ONES,
            MmioReg.CONFIG_GENERATION: lambda: device.config_generation,
        }
        self._writes: dict[int, Callable[[int], None]] = {
            MmioReg.DEVICE_FEATURES_SEL: self._write_device_features_sel,
            MmioReg.DRIVER_FEATURES: self._write_features,
            MmioReg.DRIVER_FEATURES_SEL: self._write_driver_features_sel,
            MmioReg.QUEUE_SEL: self._write_queue_sel,
            MmioReg.QUEUE_NUM: self._write_queue_num,
            MmioReg.QUEUE_READY: self._write_queue_ready,
            MmioReg.STATUS: self._write_status,
        }

    def process(self, index: int) -> None:
        """Serve queue ``index``: what the I/O thread calls for a notification. Raises InternalError for our bugs."""
        self._waiting[index] = False  # before the ring is looked at: a notification from here on counts anew
        self._process(index)

    def _notify(self, index: int) -> None:
        # A driver that notifies in a loop must not fill the I/O thread's list of things to do.
        if not self._waiting[index]:
            self._waiting[index] = True
            assert self._notifier is not None
            self._notifier(index)

    def mmio_read(self, offset: int, size: int) -> int:
        """A register or configuration access of the driver. vCPU thread. Raises InternalError only."""
        if offset == MmioReg.INTERRUPT_STATUS and size == 4:
            return self._interrupt_status
        device = self.device
        with device.batch():
            if offset >= MmioReg.CONFIG:
                data = device.read_config(offset - MmioReg.CONFIG, size)[:size]
                return int.from_bytes(data, "little")
            if size != 4:
                return 0
            read = self._reads.get(offset)
            return 0 if read is None else read()
        return 0

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """A register or configuration access of the driver. vCPU thread. Raises InternalError only."""
        if offset == MmioReg.QUEUE_NOTIFY and size == 4:
            self.notifications += 1
            if value < self._queue_count and self.device.running:
                self._serve(value)
            return
        if offset == MmioReg.INTERRUPT_ACK and size == 4:
            with self._interrupt_lock:
                self._interrupt_status &= ~value
            return
        device = self.device
        with device.batch():
            if offset >= MmioReg.CONFIG:
                if device.status & Status.DRIVER:
                    mask = (1 << 8 * size) - 1
                    device.write_config(offset - MmioReg.CONFIG, (value & mask).to_bytes(size, "little"))
                return
            if size != 4:
                return
            value &= _ALL_ONES
            write = self._writes.get(offset)
            if write is not None:
                write(value)
            elif offset in _ADDRESSES:
                self._write_address(offset, value)

    def resume(self) -> None:
        """After `restore`, with everything else in place: serve what was in flight or had been notified.

        Calls the notifier for every ready queue, or serves them here.
        """
        for queue in self.device.vqs:
            if queue.ready:
                self._serve(queue.index)
        if self._interrupt_status:
            self._irq.pulse()  # the edge may have been lost with the old interrupt controller; a spare one is harmless

    def save(self) -> MmioState:
        """The state to restore from, while the guest stands still."""
        with self.device.lock:
            return MmioState(
                device=self.device.save(),
                interrupt_status=self._interrupt_status,
                device_features_sel=self._device_features_sel,
                driver_features_sel=self._driver_features_sel,
                queue_sel=self._queue_sel,
            )

    def restore(self, state: MmioState) -> None:
        """Take up a saved state; then call `resume`. Raises SnapshotError."""
        try:
            self.device.restore(state.device)
        except GuestError as error:
            raise SnapshotError(f"{self.device.name}: {error}") from error
        self._interrupt_status = state.interrupt_status & 3
        self._device_features_sel = state.device_features_sel
        self._driver_features_sel = state.driver_features_sel
        self._queue_sel = state.queue_sel

    def _interrupt(self, bits: int) -> None:
        with self._interrupt_lock:
            self._interrupt_status |= bits
        # Always, even if the bit was set: the driver may have read the status just before we set it.
        self._irq.pulse()

    def _queue(self) -> Queue | None:
        return self.device.vqs[self._queue_sel] if self._queue_sel < self._queue_count else None

    def _read_features(self) -> int:
        return (self.device.offered_features >> (32 * self._device_features_sel)) & _ALL_ONES

    def _read_queue_num_max(self) -> int:
        queue = self._queue()
        return 0 if queue is None else queue.max_size

    def _read_queue_ready(self) -> int:
        queue = self._queue()
        return 0 if queue is None else int(queue.ready)

    def _write_device_features_sel(self, value: int) -> None:
        self._device_features_sel = value

    def _write_driver_features_sel(self, value: int) -> None:
        self._driver_features_sel = value

    def _write_queue_sel(self, value: int) -> None:
        self._queue_sel = value

    def _write_features(self, value: int) -> None:
        device = self.device
        selector = self._driver_features_sel
        if selector > 1 or not device.status & Status.DRIVER or device.status & Status.FEATURES_OK:
            return
        shift = 32 * selector
        device.driver_features = device.driver_features & ~(_ALL_ONES << shift) | value << shift

    def _configurable(self) -> Queue | None:
        """The selected queue if the driver may set it up now: agreed on features, not yet DRIVER_OK, not ready."""
        queue = self._queue()
        if queue is None or queue.ready or self.device.status != _CONFIGURABLE:
            return None
        return queue

    def _write_queue_num(self, value: int) -> None:
        queue = self._configurable()
        if queue is not None:
            queue.size = value

    def _write_address(self, offset: int, value: int) -> None:
        queue = self._configurable()
        if queue is not None:
            name, shift = _ADDRESSES[offset]
            setattr(queue, name, getattr(queue, name) & ~(_ALL_ONES << shift) | value << shift)

    def _write_queue_ready(self, value: int) -> None:
        if value == 0:
            queue = self._queue()
            if queue is not None and queue.ready:
                queue.disable()
            return
        queue = self._configurable()
        if queue is not None and value == 1:
            queue.indirect = bool(self.device.features & Feature.INDIRECT_DESC)
            queue.enable()

    def _write_status(self, value: int) -> None:
        if value == 0:
            with self._interrupt_lock:
                self._interrupt_status = 0
            self._queue_sel = 0
        self.device.set_status(value)

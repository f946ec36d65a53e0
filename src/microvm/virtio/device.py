"""The base class of every virtio device.

A device declares what it is, which queues it has and what it offers, and writes one method per queue. This is a whole
one, an entropy source:

    class Rng(VirtioDevice):
        device_id = DeviceId.ENTROPY
        queues = (QueueSpec("requests", 64),)

        def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
            super().__init__()
            self._source = source

        def on_requests(self, chain: Chain) -> int:
            return chain.write(self._source(min(chain.writable_bytes, 4096)))

and this is its test:

    driver = FakeDriver(Rng(lambda size: b"7" * size))
    driver.start()
    assert driver.request("requests", writable=16) == b"7" * 16

**Queues the driver drives** have ``on_<name>(chain)``: it returns the number of bytes written from the start of the
writable part, or None, keeps the chain, and calls `complete` later, from any thread.

**Queues the host drives** (whatever delivers input) have ``fill_<name>()``: it is called when the driver has added
buffers, and takes them with `pop` and gives them back with `complete` while there is something to deliver. When
something arrives from the host, the device does the same in a method of its own, inside ``with self.batch():``.

The base owns status, feature negotiation, ring walking, the interrupt decision (one for each drained batch), limits
(a round serves at most `ROUND_CHAINS` requests and then queues up again behind its neighbours), reset, save and
restore, and errors: a GuestError puts the device into DEVICE_NEEDS_RESET, inert until the driver resets it, and the
VM lives; any other exception is our bug and comes out as InternalError.

Locking: one reentrant lock per device, held while a method above runs. Host-side methods of a device take it by
``with self.batch():``, which also delays interrupts to its end and contains GuestErrors.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Final, NamedTuple

from ..errors import GuestError, InternalError, SnapshotError
from ..memory import GuestMemory
from ..spec.virtio import Feature, InterruptBit, Status
from .chain import Chain
from .queue import Queue, QueueState

log = logging.getLogger(__name__)

ROUND_CHAINS: Final = 64
"""Requests served before a queue goes to the back of the I/O thread's line: a driver that keeps its queue full must
not starve the other queues and devices of the machine."""

MAX_POPS: Final = 256
"""Buffers a host-driven queue takes in one batch. A driver that offers useless ones as fast as they come back would
otherwise hold the thread that delivers to it for ever."""

_TRANSPORT_FEATURES: Final = Feature.VERSION_1 | Feature.INDIRECT_DESC
_DRIVER_BITS: Final = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK | Status.FAILED
_STEPS: Final = (Status.ACKNOWLEDGE, Status.DRIVER, Status.FEATURES_OK, Status.DRIVER_OK)


class QueueSpec(NamedTuple):
    """A queue a device has: the name its method carries, and the largest size it takes (a power of two)."""

    name: str
    max_size: int


@dataclass(frozen=True, slots=True)
class DeviceState:
    """A device in a snapshot. ``extra`` is what the device itself adds: plain types only."""

    device_id: int
    status: int
    driver_features: int
    config_generation: int
    queues: tuple[QueueState, ...]
    extra: dict[str, Any] = field(default_factory=dict)


class _Batch:
    """What `VirtioDevice.batch` returns; one per device, reentrant."""

    __slots__ = ("_device",)

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        device = self._device
        device.lock.acquire()
        if not device._depth:
            device._pops = MAX_POPS
        device._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        device = self._device
        try:
            device._depth -= 1
            if error is not None:
                if isinstance(error, GuestError):
                    device.fail(error)
                elif isinstance(error, Exception) and not isinstance(error, InternalError):
                    raise InternalError(f"{device.name}: {type(error).__name__}: {error}") from error
            if not device._depth:
                device._flush()
        finally:
            device.lock.release()
        return isinstance(error, GuestError)


def _no_interrupt(_bits: int) -> None:
    pass


class VirtioDevice:
    """Base of all devices; see the module for how to write one. [virtio-v1.2] 2, 3.

    Class attributes to set: ``device_id``, ``queues``, and if needed ``device_features`` (the transport's are added)
    and ``config``, the configuration space as the driver reads it. Both may be set per instance. Once the device is
    attached, ``memory`` is the guest's.
    """

    device_id: ClassVar[int]
    queues: ClassVar[tuple[QueueSpec, ...]]
    device_features: int = 0
    config: bytes | bytearray = b""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.memory: GuestMemory
        self.status = 0
        self.driver_features = 0
        self.config_generation = 0
        self.vqs: list[Queue] = []
        self.interrupts = 0
        self.failures = 0
        self._running = False
        self._depth = 0
        self._pops = 0
        self._batch = _Batch(self)
        self._interrupt: Callable[[int], None] = _no_interrupt
        self._rearm: Callable[[int], None] | None = None
        self._logged = False
        self._handlers: list[Callable[[Chain], int | None] | None] = []
        self._fillers: list[Callable[[], None] | None] = []
        for spec in self.queues:
            handler = getattr(self, f"on_{spec.name}", None)
            filler = getattr(self, f"fill_{spec.name}", None)
            if (handler is None) == (filler is None):
                raise InternalError(f"{self.name}: queue {spec.name} needs on_{spec.name} or fill_{spec.name}")
            self._handlers.append(handler)
            self._fillers.append(filler)

    # For devices to override.

    def read_config(self, offset: int, size: int) -> bytes:
        """Configuration bytes for the driver; what is short is padded with zeroes. Called with the lock held."""
        return bytes(self.config[offset : offset + size])

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote configuration; ignored unless overridden. Called with the lock held."""

    def on_activate(self) -> None:
        """The driver is up: features are agreed and queues are set. Called with the lock held."""

    def on_reset(self) -> None:
        """Forget the driver: drop what was kept of its chains. Called with the lock held, the queues already reset."""

    def save_state(self) -> dict[str, Any]:
        """What the device must keep beyond queues and status: plain types (int, str, bytes, list, dict, None)."""
        return {}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take up what `save_state` returned; chains in flight arrive again through the handlers.

        Raises SnapshotError. The input is not trusted.
        """

    # For devices to call.

    @property
    def name(self) -> str:
        """For messages: the class's name in lower case."""
        return type(self).__name__.lower()

    @property
    def features(self) -> int:
        """The agreed features; 0 before FEATURES_OK."""
        return self.driver_features if self.status & Status.FEATURES_OK else 0

    @property
    def running(self) -> bool:
        """Whether the driver is up and nothing is broken."""
        return self._running

    def batch(self) -> _Batch:
        """A context for host-side work: takes the lock, raises one interrupt at its end, contains GuestErrors."""
        return self._batch

    def pop(self, index: int) -> Chain | None:
        """The next chain of queue ``index``, or None: then ``fill_<name>`` is called when there are more.

        Inside a batch, which takes at most `MAX_POPS`. Raises VirtqueueError, GuestMemoryError, for `batch` to contain.
        """
        if not self._running:
            return None
        queue = self.vqs[index]
        if self._depth:
            if not self._pops:
                if queue.allow_notify() and self._rearm is not None:
                    self._rearm(index)
                return None
            self._pops -= 1
        chain = queue.pop()
        if chain is None and queue.allow_notify():
            chain = queue.pop()
        return chain

    def complete(self, chain: Chain, written: int = 0) -> None:
        """Give a chain back to the driver with ``written`` bytes. Any thread; a chain from before a reset is dropped.

        The interrupt follows at once, or at the end of the batch that is going on.
        """
        with self.lock:
            chain.queue.push(chain, written)
            if not self._depth:
                self._flush()

    def config_changed(self) -> None:
        """Tell the driver that the configuration space is different. Any thread."""
        with self.lock:
            self.config_generation = (self.config_generation + 1) & 0xFFFF_FFFF
            if self.status & Status.DRIVER_OK:
                self._interrupt(InterruptBit.CONFIG_CHANGE)

    # For the transport.

    @property
    def offered_features(self) -> int:
        """All feature bits the driver may choose from."""
        return self.device_features | _TRANSPORT_FEATURES

    def attach(
        self, memory: GuestMemory, interrupt: Callable[[int], None], rearm: Callable[[int], None] | None
    ) -> None:
        """Connect to a transport. ``interrupt(bits)`` tells the driver, ``rearm(index)`` asks for `process` again.

        Without ``rearm`` a call of `process` serves what is there when it begins, and whatever comes later has its own
        notification.
        """
        if self.vqs:
            raise InternalError(f"{self.name} is attached twice")
        self.memory = memory
        self._interrupt = interrupt
        self._rearm = rearm
        self.vqs = [Queue(memory, index, spec.name, spec.max_size) for index, spec in enumerate(self.queues)]

    def process(self, index: int) -> None:
        """Serve queue ``index``: the I/O thread, or the vCPU that notified. Raises InternalError for our bugs."""
        with self._batch:
            if not self._running:
                return
            queue = self.vqs[index]
            if not queue.ready:
                return
            handler = self._handlers[index]
            if handler is None:
                # Until `pop` comes back empty, there is nothing that more buffers could change.
                queue.suppress_notify()
                filler = self._fillers[index]
                assert filler is not None
                filler()
                return
            rearm = self._rearm
            pop = queue.pop
            push = queue.push
            if rearm is None:
                budget = queue.pending()
            else:
                budget = ROUND_CHAINS
                queue.suppress_notify()
            while budget:
                chain = pop()
                if chain is None:
                    if rearm is None or not queue.allow_notify():
                        return
                    continue
                budget -= 1
                written = handler(chain)
                if written is not None:
                    push(chain, written)
            if rearm is not None:
                rearm(index)

    def set_status(self, value: int) -> None:
        """The driver writes the status register. Steps out of order are refused. With the lock held."""
        if value == 0:
            self.reset()
            return
        status = self.status
        ours = status & Status.DEVICE_NEEDS_RESET
        value &= _DRIVER_BITS
        if (status & ~ours) & ~value:
            return  # only a reset takes bits back. [virtio-v1.2] 2.1.1
        if value & Status.FAILED:
            self.status = status | Status.FAILED
            self._running = False
            return
        if not _in_order(value):
            return
        added = value & ~status
        if added & Status.FEATURES_OK and not self._acceptable():
            value &= ~(Status.FEATURES_OK | Status.DRIVER_OK)
            added &= ~(Status.FEATURES_OK | Status.DRIVER_OK)
        self.status = value | ours
        if added & Status.DRIVER_OK and not ours:
            self._running = True
            self.on_activate()
            # Linux's balloon driver offers and notifies before DRIVER_OK (6.1, init_vqs); those wait until now.
            for queue in self.vqs:
                if queue.pending():
                    (self._rearm or self.process)(queue.index)

    def _acceptable(self) -> bool:
        features = self.driver_features
        return not features & ~self.offered_features and bool(features & Feature.VERSION_1)

    def reset(self) -> None:
        """Back to the state before any driver. With the lock held."""
        self.status = 0
        self.driver_features = 0
        self._running = False
        for queue in self.vqs:
            queue.reset()
        self.on_reset()

    def fail(self, error: GuestError) -> None:
        """The guest broke its side: inert until reset, logged once in the device's life. With the lock held."""
        self.failures += 1
        self._running = False
        if not self.status & Status.DEVICE_NEEDS_RESET:
            self.status |= Status.DEVICE_NEEDS_RESET
            if self.status & Status.DRIVER_OK:
                self._interrupt(InterruptBit.CONFIG_CHANGE)
        if not self._logged:
            # A guest that resets and fails in a loop must not fill the host's log.
            self._logged = True
            log.warning("%s: the driver broke the contract and must reset the device: %s", self.name, error)

    def _flush(self) -> None:
        wanted = False
        for queue in self.vqs:
            if queue.pushed and queue.finish():
                wanted = True
        if wanted and self._running:
            self.interrupts += 1
            self._interrupt(InterruptBit.USED_BUFFER)

    def save(self) -> DeviceState:
        """The state to restore from. Any thread, while the guest stands still."""
        with self.lock:
            return DeviceState(
                device_id=self.device_id,
                status=self.status,
                driver_features=self.driver_features,
                config_generation=self.config_generation,
                queues=tuple(queue.save() for queue in self.vqs),
                extra=self.save_state(),
            )

    def restore(self, state: DeviceState) -> None:
        """Take up a saved state; guest memory is already in place. Serve every queue once afterwards.

        Raises SnapshotError if the state is not one of this device, GuestError if its rings are not in this memory.
        """
        if state.device_id != self.device_id or len(state.queues) != len(self.vqs):
            raise SnapshotError(f"the saved device {state.device_id} is not a {self.name}")
        if state.driver_features & ~self.offered_features:
            raise SnapshotError(f"{self.name}: the saved driver uses features that are not offered here")
        with self.lock:
            self.reset()
            for queue, saved in zip(self.vqs, state.queues, strict=True):
                queue.restore(saved)
            self.driver_features = state.driver_features
            self.config_generation = state.config_generation
            self.restore_state(state.extra)
            self.status = state.status
            broken = Status.DEVICE_NEEDS_RESET | Status.FAILED
            self._running = bool(state.status & Status.DRIVER_OK) and not state.status & broken


def _in_order(value: int) -> bool:
    """Whether no step is there without those before it. [virtio-v1.2] 3.1.1."""
    missing = False
    for step in _STEPS:
        if not value & step:
            missing = True
        elif missing:
            return False
    return True

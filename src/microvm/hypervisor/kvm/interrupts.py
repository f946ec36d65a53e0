"""Interrupts into a partition: messages, and event descriptors that the kernel turns into messages.

The I/O APIC is ours, in userspace; KVM knows only messages. Yet KVM reports the end of a level-triggered interrupt
only for vectors it finds, with the level bit, in its routing table (arch/x86/kvm/irq_comm.c, kvm_scan_ioapic_routes).
So a level message that was not seen before is entered there under a number of its own, which nothing ever raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Final

from ..._os.event import Event
from ...errors import ConfigError
from . import abi
from .api import Api

# KVM scans the first so many routes for level vectors. It keeps the number in eight bits without saying so.
LEVEL_SLOTS: Final = 64  # level messages remembered; more than an I/O APIC has pins
ROUTED_GSIS: Final = 256  # numbers `route` may be given; KVM is told them LEVEL_SLOTS higher
MSI_LEVEL: Final = 1 << 15
_FIXED: Final = 0
_LOWEST_PRIORITY: Final = 1


class Interrupts:
    """The interrupt side of one partition. Thread-safe."""

    def __init__(self, api: Api, vm_fd: int) -> None:
        self._api = api
        self._vm_fd = vm_fd
        self._lock = threading.RLock()
        self._msi = abi.kvm_msi()
        self._events: dict[int, Event] = {}
        self._routes: dict[int, tuple[int, int]] = {}
        self._level: dict[tuple[int, int], int] = {}

    def signal(self, address: int, data: int) -> None:
        """Deliver one message. [SDM] 3A 11.11"""
        if data >> 8 & 7 in (_FIXED, _LOWEST_PRIORITY) and data & 0xFF < 16:
            return
        with self._lock:
            if data & MSI_LEVEL and (address, data) not in self._level:
                self._remember_level(address, data)
            msi = self._msi
            msi.address_lo = address & 0xFFFF_FFFF
            msi.address_hi = address >> 32
            msi.data = data
            # A message that no APIC takes is an error to KVM and nothing on a bus.
            self._api.try_ioctl(self._vm_fd, abi.KVM_SIGNAL_MSI, msi)

    def _remember_level(self, address: int, data: int) -> None:
        while len(self._level) >= LEVEL_SLOTS:
            del self._level[next(iter(self._level))]  # the oldest: a guest that reprograms without end
        used = set(self._level.values())
        slot = next(i for i in range(LEVEL_SLOTS) if i not in used)
        self._level[address, data] = slot
        self._write_routes()

    def route(self, gsi: int, address: int, data: int) -> Event:
        """See `base.Partition.route_irq`. Raises ConfigError, HostError."""
        if not 0 <= gsi < ROUTED_GSIS:
            raise ConfigError("gsi", gsi, f"0 to {ROUTED_GSIS - 1}")
        with self._lock:
            changed = self._routes.get(gsi) != (address, data)
            self._routes[gsi] = (address, data)
            if data & MSI_LEVEL and (address, data) not in self._level:
                self._remember_level(address, data)
            elif changed:
                self._write_routes()
            event = self._events.get(gsi)
            if event is None:
                event = Event()
                try:
                    self._irqfd(event, gsi, 0)
                except BaseException:
                    event.close()
                    raise
                self._events[gsi] = event
            return event

    def _write_routes(self) -> None:
        entries = [(LEVEL_SLOTS + gsi, message) for gsi, message in self._routes.items()]
        entries += [(slot, message) for message, slot in self._level.items()]
        header = abi.kvm_irq_routing(nr=len(entries))
        packed = bytes(header) + b"".join(
            bytes(
                abi.kvm_irq_routing_entry(
                    gsi=gsi,
                    type=abi.KVM_IRQ_ROUTING_MSI,
                    address_lo=address & 0xFFFF_FFFF,
                    address_hi=address >> 32,
                    data=data,
                )
            )
            for gsi, (address, data) in entries
        )
        self._api.ioctl(self._vm_fd, abi.KVM_SET_GSI_ROUTING, ctypes.create_string_buffer(packed, len(packed)))

    def _irqfd(self, event: Event, gsi: int, flags: int) -> None:
        self._api.ioctl(self._vm_fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=event.fd, gsi=LEVEL_SLOTS + gsi, flags=flags))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Deliver nothing inside the block; events set meanwhile are delivered at its end."""
        with self._lock:
            for gsi, event in self._events.items():
                self._irqfd(event, gsi, abi.KVM_IRQFD_FLAG_DEASSIGN)
            try:
                yield
            finally:
                for gsi, event in self._events.items():
                    self._irqfd(event, gsi, 0)

    def close(self) -> None:
        """Close the events. The descriptors of the partition must still be open."""
        with self._lock:
            for gsi, event in self._events.items():
                self._irqfd(event, gsi, abi.KVM_IRQFD_FLAG_DEASSIGN)
                event.close()
            self._events.clear()

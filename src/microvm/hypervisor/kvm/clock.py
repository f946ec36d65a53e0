"""Guest time: the paravirtual clock, the TSC and the APIC timers, and stopping all three together.

KVM never stops time. A pause notes the clock, every TSC and every armed APIC timer and disarms the timers; a resume
turns the TSC back by what went by, sets the clock back and arms the timers again. The TSC goes back through its
offset where KVM has KVM_VCPU_TSC_OFFSET, the same amount on every vCPU, so that they stay in step.

A timer in TSC-deadline mode is an MSR. One in one-shot or periodic mode is part of KVM_SET_LAPIC, which overwrites
pending interrupts as well, so that messages are held off meanwhile (`Interrupts.held`).
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import abi
from .api import Api
from .state import LAPIC_TMCCT, LAPIC_TMICT, get_msrs, set_msrs

if TYPE_CHECKING:
    from .interrupts import Interrupts
    from .vcpu import KvmVcpu


@dataclass(slots=True)
class PausedTime:
    """One vCPU's clocks at the moment of the pause."""

    tsc: int
    deadline: int
    initial_count: int
    current_count: int


class Clock:
    """Guest time of one partition."""

    def __init__(self, api: Api, vm_fd: int, interrupts: Interrupts) -> None:
        self._api = api
        self._vm_fd = vm_fd
        self._interrupts = interrupts
        self._paused: int | None = None

    @property
    def paused(self) -> bool:
        return self._paused is not None

    def now(self) -> int:
        """Nanoseconds of guest time, those the paravirtual clock shows."""
        if self._paused is not None:
            return self._paused
        data = abi.kvm_clock_data()
        self._api.ioctl(self._vm_fd, abi.KVM_GET_CLOCK, data)
        return int(data.clock)

    def set(self, nanoseconds: int) -> None:
        """Move guest time; takes effect on resume while paused."""
        if self._paused is not None:
            self._paused = nanoseconds
        else:
            self._api.ioctl(self._vm_fd, abi.KVM_SET_CLOCK, abi.kvm_clock_data(clock=nanoseconds))

    def pause(self, vcpus: list[KvmVcpu]) -> None:
        if self._paused is not None:
            return
        for vcpu in vcpus:
            vcpu.settle()
        self._paused = self.now()
        for vcpu in vcpus:
            vcpu.paused = self._stop(vcpu)

    def stop_new(self, vcpu: KvmVcpu) -> None:
        """A vCPU was made while time stands still."""
        vcpu.paused = self._stop(vcpu)

    def stop_restored(self, vcpu: KvmVcpu, tsc: int, deadline: int, initial_count: int, current_count: int) -> None:
        """A vCPU was restored while time stands still: its clocks are the saved ones."""
        self._stop(vcpu)
        vcpu.paused = PausedTime(tsc, deadline, initial_count, current_count)

    def resume(self, vcpus: list[KvmVcpu]) -> None:
        if self._paused is None:
            return
        clock, self._paused = self._paused, None
        elapsed: int | None = None
        for vcpu in vcpus:
            assert vcpu.paused is not None
            if elapsed is None:
                elapsed = get_msrs(self._api, vcpu.fd, (abi.MSR_IA32_TSC,))[abi.MSR_IA32_TSC] - vcpu.paused.tsc
            self._turn_back(vcpu, vcpu.paused.tsc, elapsed)
        self.set(clock)
        for vcpu in vcpus:
            self._start(vcpu)
            # Tells the guest that it was stopped, so that its watchdogs forgive; EINVAL if it has no such clock.
            self._api.try_ioctl(vcpu.fd, abi.KVM_KVMCLOCK_CTRL)

    def _turn_back(self, vcpu: KvmVcpu, tsc: int, elapsed: int) -> None:
        offset = ctypes.c_uint64()
        attribute = abi.kvm_device_attr(
            group=abi.KVM_VCPU_TSC_CTRL, attr=abi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(offset)
        )
        if self._api.try_ioctl(vcpu.fd, abi.KVM_GET_DEVICE_ATTR, attribute) == 0:
            offset.value -= elapsed
            if self._api.try_ioctl(vcpu.fd, abi.KVM_SET_DEVICE_ATTR, attribute) == 0:
                return
        set_msrs(self._api, vcpu.fd, {abi.MSR_IA32_TSC: tsc})

    def _stop(self, vcpu: KvmVcpu) -> PausedTime:
        values = get_msrs(self._api, vcpu.fd, (abi.MSR_IA32_TSC,))
        tsc = values[abi.MSR_IA32_TSC]
        try:
            deadline = get_msrs(self._api, vcpu.fd, (abi.MSR_IA32_TSC_DEADLINE,))[abi.MSR_IA32_TSC_DEADLINE]
        except KeyError:
            deadline = 0
        if deadline:
            set_msrs(self._api, vcpu.fd, {abi.MSR_IA32_TSC_DEADLINE: 0})
        lapic = abi.kvm_lapic_state()
        self._api.ioctl(vcpu.fd, abi.KVM_GET_LAPIC, lapic)
        initial: int = struct.unpack_from("<I", lapic, LAPIC_TMICT)[0]
        current: int = struct.unpack_from("<I", lapic, LAPIC_TMCCT)[0]
        if initial:
            self._set_counts(vcpu, 0, 0)
        return PausedTime(tsc, deadline, initial, current)

    def _start(self, vcpu: KvmVcpu) -> None:
        paused, vcpu.paused = vcpu.paused, None
        assert paused is not None
        if paused.initial_count:
            self._set_counts(vcpu, paused.initial_count, paused.current_count)
        if paused.deadline:
            set_msrs(self._api, vcpu.fd, {abi.MSR_IA32_TSC_DEADLINE: paused.deadline})

    def _set_counts(self, vcpu: KvmVcpu, initial: int, current: int) -> None:
        with self._interrupts.held():
            lapic = abi.kvm_lapic_state()
            self._api.ioctl(vcpu.fd, abi.KVM_GET_LAPIC, lapic)
            struct.pack_into("<I", lapic, LAPIC_TMICT, initial)
            struct.pack_into("<I", lapic, LAPIC_TMCCT, current)
            self._api.ioctl(vcpu.fd, abi.KVM_SET_LAPIC, lapic)

"""Opening /dev/kvm, and saying in one sentence what to do when that fails."""

from __future__ import annotations

import errno
import os
import sys
from typing import Final

from ...errors import BackendUnavailable
from . import abi
from .api import Api, host_error

DEVICE: Final = "/dev/kvm"

# What this backend cannot do without, and the Linux version that brought it.
REQUIRED: Final = {
    "KVM_CAP_USER_MEMORY": (abi.KVM_CAP_USER_MEMORY, "2.6.25"),
    "KVM_CAP_EXT_CPUID": (abi.KVM_CAP_EXT_CPUID, "2.6.26"),
    "KVM_CAP_MP_STATE": (abi.KVM_CAP_MP_STATE, "2.6.26"),
    "KVM_CAP_IRQ_ROUTING": (abi.KVM_CAP_IRQ_ROUTING, "2.6.30"),
    "KVM_CAP_VCPU_EVENTS": (abi.KVM_CAP_VCPU_EVENTS, "2.6.33"),
    "KVM_CAP_ADJUST_CLOCK": (abi.KVM_CAP_ADJUST_CLOCK, "2.6.33"),
    "KVM_CAP_DEBUGREGS": (abi.KVM_CAP_DEBUGREGS, "2.6.35"),
    "KVM_CAP_XSAVE": (abi.KVM_CAP_XSAVE, "2.6.36"),
    "KVM_CAP_XCRS": (abi.KVM_CAP_XCRS, "2.6.36"),
    "KVM_CAP_GET_TSC_KHZ": (abi.KVM_CAP_GET_TSC_KHZ, "2.6.39"),
    "KVM_CAP_SIGNAL_MSI": (abi.KVM_CAP_SIGNAL_MSI, "3.5"),
    "KVM_CAP_SPLIT_IRQCHIP": (abi.KVM_CAP_SPLIT_IRQCHIP, "4.5"),
    "KVM_CAP_IMMEDIATE_EXIT": (abi.KVM_CAP_IMMEDIATE_EXIT, "4.12"),
}


def open_kvm(api: Api) -> int:
    """A descriptor of /dev/kvm that has everything we need. Raises BackendUnavailable with a hint."""
    try:
        fd = api.open(DEVICE)
    except OSError as error:
        raise _cannot_open(error.errno or errno.EIO) from None
    try:
        version = api.try_ioctl(fd, abi.KVM_GET_API_VERSION)
        if version < 0:
            hint = f"{DEVICE} is not the KVM device: remove it and load the kvm module"
            raise BackendUnavailable("KVM_GET_API_VERSION", -version, os.strerror(-version).lower(), hint)
        if version != abi.KVM_API_VERSION:
            message = f"interface version {version}, not {abi.KVM_API_VERSION}"
            raise BackendUnavailable("KVM_GET_API_VERSION", errno.ENOSYS, message, "update the kernel")
        for name, (capability, since) in REQUIRED.items():
            if not api.has(fd, capability):
                message = f"this kernel's KVM lacks {name}"
                raise BackendUnavailable("KVM_CHECK_EXTENSION", errno.ENOSYS, message, f"Linux {since} or newer has it")
    except BaseException:
        api.close(fd)
        raise
    return fd


def _cannot_open(code: int) -> BackendUnavailable:
    call = f"open {DEVICE}"
    message = os.strerror(code).lower()
    if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return BackendUnavailable(call, code, message, _absent_hint())
    if code in (errno.EACCES, errno.EPERM):
        return BackendUnavailable(call, code, message, _permission_hint(code))
    error = host_error(call, code)
    return BackendUnavailable(call, code, message, error.hint or "look at the kernel log")


def _absent_hint() -> str:
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return f"this is a container: start it with --device {DEVICE}"
    flags = _cpu_flags()
    if "vmx" in flags or "svm" in flags:
        return f"load the module: modprobe {'kvm_intel' if 'vmx' in flags else 'kvm_amd'}"
    if "hypervisor" in flags:
        return "this is a virtual machine: enable nested virtualization for it on its host"
    return "enable virtualization (VT-x or AMD-V) in the firmware settings"


def _permission_hint(code: int) -> str:
    if code == errno.EPERM:
        return f"a container or a sandbox forbids it: allow the device {DEVICE}"
    if os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} lies on a file system without devices (nodev), or a sandbox forbids it"
    group = "kvm"
    if sys.platform != "win32":
        import grp

        try:
            group = grp.getgrgid(os.stat(DEVICE).st_gid).gr_name
        except (OSError, KeyError):
            pass
    if group == "root":
        return f"run as root, or give {DEVICE} to a group of yours"
    return f"join the group that owns it: sudo usermod -aG {group} $USER, then log in again"


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()

"""System calls on /dev/kvm, with errors as `HostError`.

Everything goes through one `Api` object, so that tests can stand between the backend and the host. `KVM_RUN` alone
does not: see `kvm_run`. Nothing else here uses `fcntl.ioctl`, which refuses integers over 2**31-1 and buffers over
1,024 bytes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import sys
from collections.abc import Callable
from typing import Any

from ...errors import BackendUnavailable, HostError
from .. import limits
from . import abi


@functools.cache
def libc() -> ctypes.CDLL:
    """The C library, opened so that ``ctypes.get_errno`` works."""
    return ctypes.CDLL(None, use_errno=True)


def kvm_run() -> Callable[[int, int], object]:
    """What is called with a vCPU and KVM_RUN to run the guest; releases the GIL, raises OSError.

    ``fcntl.ioctl`` costs half of what a call through ctypes does (0.37 and 0.68 us where this was measured). From
    Python 3.14 on it retries on EINTR, which is how a kick comes back, so ctypes must do there.
    """
    if sys.platform == "linux" and sys.version_info < (3, 14):
        import fcntl

        return fcntl.ioctl
    return kvm_run_by_ctypes


def kvm_run_by_ctypes(fd: int, request: int) -> None:
    """See `kvm_run`."""
    if libc()["ioctl"](ctypes.c_int(fd), ctypes.c_ulong(request), ctypes.c_ulong(0)) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


class Api:
    """The host's calls. All raise `HostError` when the host refuses."""

    def __init__(self) -> None:
        function = libc()["ioctl"]
        function.restype = ctypes.c_int
        self._ioctl = function

    def open(self, path: str) -> int:
        """Open a device file. Raises OSError."""
        return os.open(path, os.O_RDWR)  # Python makes it close-on-exec

    def close(self, fd: int) -> None:
        os.close(fd)

    def map_run(self, fd: int, size: int) -> mmap.mmap:
        """Map a vCPU's ``kvm_run``."""
        if sys.platform != "linux":
            raise AssertionError("KVM is Linux")
        try:
            return mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise host_error("mmap", error.errno or errno.ENOMEM) from None

    def try_ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        """The result, or the negated errno."""
        if not isinstance(argument, int):
            argument = ctypes.byref(argument)
        else:
            argument = ctypes.c_ulong(argument)
        result: int = self._ioctl(ctypes.c_int(fd), ctypes.c_ulong(request), argument)
        return result if result >= 0 else -ctypes.get_errno()

    def ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        """The result; ``argument`` is an integer or a ctypes object passed by reference. Raises HostError."""
        while True:
            result = self.try_ioctl(fd, request, argument)
            if result >= 0:
                return result
            if result != -errno.EINTR:
                raise host_error(call_name(request), -result)

    def has(self, fd: int, capability: int) -> int:
        """What KVM_CHECK_EXTENSION says; 0 is absent."""
        return max(0, self.try_ioctl(fd, abi.KVM_CHECK_EXTENSION, capability))


def call_name(request: int) -> str:
    """The vendor's spelling of an ioctl number."""
    for name, value in vars(abi).items():
        if value == request and name.startswith("KVM_") and request >> 8 & 0xFF == 0xAE:
            return name
    return f"ioctl {request:#x}"


def host_error(call: str, code: int) -> HostError:
    """The error for a refused call, with a hint where somebody can act on it.

    What the host withholds altogether (memory, descriptors, the processor's extensions) is BackendUnavailable: the
    same call would fail for every guest of this size.
    """
    message = os.strerror(code).lower()
    withheld = limits.withheld(call, code)
    if withheld is not None:
        return withheld
    if code == errno.EBUSY and call == "KVM_CREATE_VM":
        hint = "another hypervisor holds the processor's virtualization: stop VirtualBox, VMware or the like"
        return BackendUnavailable(call, code, message, hint)
    return HostError(call, code, message)

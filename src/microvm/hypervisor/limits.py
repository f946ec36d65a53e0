"""What a host withholds by its limits, and which limit it was."""

from __future__ import annotations

import errno
import os
import sys

from ..errors import BackendUnavailable


def withheld(call: str, code: int) -> BackendUnavailable | None:
    """The error for a call refused for want of memory or descriptors; None for any other ``code`` (an errno)."""
    if code == errno.ENOMEM:
        return BackendUnavailable(call, code, os.strerror(code).lower(), memory_hint())
    if code in (errno.EMFILE, errno.ENFILE):
        limit = "the limit on open files (ulimit -n)" if code == errno.EMFILE else "fs.file-max"
        return BackendUnavailable(call, code, os.strerror(code).lower(), f"raise {limit} or close other machines")
    return None


def memory_hint() -> str:
    """Which limit keeps memory from us, as far as can be told."""
    if sys.platform == "linux":
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            return f"raise the address space limit, now {limit >> 20} MiB (ulimit -v), or give the guest less memory"
        group = _cgroup_limit()
        if group is not None:
            return f"raise the memory limit of this control group, now {group >> 20} MiB, or give the guest less memory"
    return "free memory on the host or give the guest less"


def _cgroup_limit() -> int | None:
    """The memory limit of our own control group (version 2), if it has one."""
    try:
        with open("/proc/self/cgroup", encoding="ascii") as file:
            own = next((line[3:].strip() for line in file if line.startswith("0::")), None)
        if own is None:
            return None
        with open(f"/sys/fs/cgroup{own}/memory.max", encoding="ascii") as file:
            text = file.read().strip()
        return None if text == "max" else int(text)
    except (OSError, ValueError):
        return None

"""`SimulatedWhp`: the C functions of WinHvPlatform.dll over the software CPU.

Every function is a C callback made from the very prototype that the backend calls it by (`hypervisor.whp.api`), so each
structure crosses a real C boundary, laid out and aligned as on Windows. The processor behind is the software CPU in its
mode with exits: a vCPU stops before an access, and the caller carries the instruction out, as WHP's callers must.

It is strict: calls out of order, wrong sizes, misaligned register buffers and properties, capabilities or registers
that the chosen version of Windows does not have are refused with the code that Windows returns. `SimulatedWhp.fail`
makes any call fail with any code, `SimulatedWhp.calls` holds what was called.

    whp = SimulatedWhp("win10-19045")
    hypervisor = WhpHypervisor(whp.api())

What it is not: a proof about Windows. It knows the documented interface and what users of it have reported.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ...hypervisor import select
from ...hypervisor.whp import codes
from ...hypervisor.whp.api import PROTOTYPES, Api, replace_default
from .capabilities import capability
from .partition import SimulatedPartition
from .profiles import PROFILES, Profile
from .results import Refused, hand_out

MAX_CALLS: Final = 10_000
_FIRST_HANDLE: Final = 0x1000


@dataclass(frozen=True, slots=True)
class Call:
    """One call: function, arguments as numbers, HRESULT. ``detail`` is a property's or capability's code."""

    name: str
    arguments: tuple[int, ...]
    result: int
    detail: int = 0


class SimulatedWhp:
    """A Windows machine's WHP. ``profile`` names a version of Windows or is a `Profile` of your own. Thread-safe.

    ``present`` False is a machine with the feature switched off.
    """

    def __init__(self, profile: str | Profile = "win11", present: bool = True) -> None:
        self.profile = PROFILES[profile] if isinstance(profile, str) else profile
        self.present = present
        self.partitions: dict[int, SimulatedPartition] = {}
        self.calls: list[Call] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.error: BaseException | None = None
        self._failures: dict[str, list[int]] = {}
        self._next = _FIRST_HANDLE
        self._lock = threading.Lock()
        self._callbacks = {name: PROTOTYPES[name](self._guard(name)) for name in PROTOTYPES if self._has(name)}

    def _has(self, name: str) -> bool:
        known = hasattr(self, "_" + name) or hasattr(SimulatedPartition, name)
        return known and name not in self.profile.missing

    def resolve(self, name: str) -> int | None:
        """GetProcAddress: the address of a function, None where this version of Windows lacks it."""
        callback = self._callbacks.get(name)
        return None if callback is None else ctypes.cast(callback, ctypes.c_void_p).value

    def api(self) -> Api:
        """The functions for `WhpHypervisor`. Keep the simulator alive as long as they are used."""
        api = Api(self.resolve, self._host_wrote)
        api.keep_alive = self
        return api

    @contextlib.contextmanager
    def installed(self) -> Iterator[SimulatedWhp]:
        """Until the end of the ``with`` block, the backend ``whp`` of this process is this simulator.

        With it `Sandbox(..., backend="whp", isolated=False)` works on a machine without Windows.
        """
        before = replace_default(self.api())
        select.probe.cache_clear()
        try:
            yield self
        finally:
            replace_default(before)
            select.probe.cache_clear()

    def fail(self, name: str, result: int, after: int = 0, times: int = 1) -> None:
        """Let ``times`` calls of ``name`` fail with the HRESULT ``result``, the first ``after`` calls excepted."""
        self._failures[name] = [result, after, times]

    def names(self) -> list[str]:
        """The functions called so far, in order."""
        return [call.name for call in self.calls]

    def _host_wrote(self, handle: int, gpa: int, size: int) -> None:
        partition = self.partitions.get(handle)
        if partition is not None:
            partition.host_wrote(gpa, size)

    def _guard(self, name: str) -> Callable[..., int]:
        own: Callable[..., int | None] | None = getattr(self, "_" + name, None)
        failures, counts, calls = self._failures, self.counts, self.calls
        partitions = self.partitions
        method: Any = None if own is not None else getattr(SimulatedPartition, name)

        def call(*arguments: Any) -> int:
            counts[name] += 1
            try:
                failure = failures.get(name) if failures else None
                if failure is not None and self._fails(failure):
                    result = failure[0]
                elif own is not None:
                    result = own(*arguments) or 0
                else:
                    partition = partitions.get(arguments[0] or 0)
                    result = codes.E_INVALIDARG if partition is None else method(partition, *arguments[1:]) or 0
            except Refused as refused:
                result = refused.result
            except BaseException as error:  # noqa: BLE001 - must not cross the C frames; the test looks at `error`
                self.error = error
                result = codes.E_FAIL
            if len(calls) < MAX_CALLS:
                calls.append(_record(name, arguments, result))
            return result

        return call

    def _fails(self, failure: list[int]) -> bool:
        if failure[1] > 0:
            failure[1] -= 1
            return False
        failure[2] -= 1
        return failure[2] >= 0

    # The functions that have no partition yet

    def _WHvGetCapability(self, code: int, buffer: int, size: int, written: int | None) -> int:
        data = capability(self.profile, code, self.present)
        if data is None or code in self.profile.unknown_capabilities:
            return codes.WHV_E_UNKNOWN_CAPABILITY
        return hand_out(data, buffer, size, written)

    def _WHvCreatePartition(self, handle: int) -> int:
        if not self.present:
            return codes.ERROR_HV_NOT_PRESENT
        with self._lock:
            number, self._next = self._next, self._next + 1
        self.partitions[number] = SimulatedPartition(self.profile)
        ctypes.c_void_p.from_address(handle).value = number
        return codes.S_OK

    def _WHvDeletePartition(self, handle: int) -> int:
        partition = self.partitions.pop(handle or 0, None)
        if partition is None:
            return codes.E_INVALIDARG
        partition.close()
        return codes.S_OK


def _record(name: str, arguments: tuple[Any, ...], result: int) -> Call:
    numbers = tuple(argument or 0 for argument in arguments)
    detail = 0
    if name == "WHvGetCapability":
        detail = numbers[0]
    elif name in ("WHvSetPartitionProperty", "WHvGetPartitionProperty"):
        detail = numbers[1]
    return Call(name, numbers, result, detail)

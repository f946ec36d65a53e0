"""The functions of WinHvPlatform.dll: prototypes, loading, and results made into errors.

The library is loaded when the first backend object is made, never on import. Functions that came after Windows 10
1803 are looked up one by one and are missing where the system does not have them; versions are never compared.

Whoever wants another implementation behind the same prototypes (`testing.SimulatedWhp`) gives `Api` a function that
returns addresses by name. ctypes then makes the same C calls with the same structures.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, Final

from ...errors import BackendUnavailable, HostError
from .codes import RESULT_NAMES
from .failures import ENABLE_HINT, hint_for, meaning_of

LIBRARY: Final = "WinHvPlatform.dll"
ERROR_MOD_NOT_FOUND: Final = 126

_functype: Any = ctypes.CFUNCTYPE
if sys.platform == "win32":
    _functype = ctypes.WINFUNCTYPE

_P, _U32, _U64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64

# name: argument types. All return an HRESULT, read as unsigned. Handles, pointers and buffers are void pointers.
_REQUIRED: Final[dict[str, tuple[Any, ...]]] = {
    "WHvGetCapability": (_U32, _P, _U32, _P),
    "WHvCreatePartition": (_P,),
    "WHvSetupPartition": (_P,),
    "WHvDeletePartition": (_P,),
    "WHvGetPartitionProperty": (_P, _U32, _P, _U32, _P),
    "WHvSetPartitionProperty": (_P, _U32, _P, _U32),
    "WHvMapGpaRange": (_P, _P, _U64, _U64, _U32),
    "WHvUnmapGpaRange": (_P, _U64, _U64),
    "WHvTranslateGva": (_P, _U32, _U64, _U32, _P, _P),
    "WHvCreateVirtualProcessor": (_P, _U32, _U32),
    "WHvDeleteVirtualProcessor": (_P, _U32),
    "WHvRunVirtualProcessor": (_P, _U32, _P, _U32),
    "WHvCancelRunVirtualProcessor": (_P, _U32, _U32),
    "WHvGetVirtualProcessorRegisters": (_P, _U32, _P, _U32, _P),
    "WHvSetVirtualProcessorRegisters": (_P, _U32, _P, _U32, _P),
}
_OPTIONAL: Final[dict[str, tuple[Any, ...]]] = {
    "WHvRequestInterrupt": (_P, _P, _U32),
    "WHvGetVirtualProcessorInterruptControllerState": (_P, _U32, _P, _U32, _P),
    "WHvSetVirtualProcessorInterruptControllerState": (_P, _U32, _P, _U32),
    "WHvGetVirtualProcessorInterruptControllerState2": (_P, _U32, _P, _U32, _P),
    "WHvSetVirtualProcessorInterruptControllerState2": (_P, _U32, _P, _U32),
    "WHvGetVirtualProcessorXsaveState": (_P, _U32, _P, _U32, _P),
    "WHvSetVirtualProcessorXsaveState": (_P, _U32, _P, _U32),
    "WHvGetVirtualProcessorState": (_P, _U32, _U32, _P, _U32, _P),
    "WHvSetVirtualProcessorState": (_P, _U32, _U32, _P, _U32),
    "WHvQueryGpaRangeDirtyBitmap": (_P, _U64, _U64, _P, _U32),
    "WHvAdviseGpaRange": (_P, _P, _U32, _U32, _P, _U32),
    "WHvReadGpaRange": (_P, _U32, _U64, _U64, _P, _U32),
    "WHvWriteGpaRange": (_P, _U32, _U64, _U64, _P, _U32),
    "WHvSuspendPartitionTime": (_P,),
    "WHvResumePartitionTime": (_P,),
    "WHvResetPartition": (_P,),
    "WHvGetPartitionCounters": (_P, _U32, _P, _U32, _P),
    "WHvGetVirtualProcessorCounters": (_P, _U32, _U32, _P, _U32, _P),
    "WHvRegisterPartitionDoorbellEvent": (_P, _P, _P),
    "WHvUnregisterPartitionDoorbellEvent": (_P, _P),
    "WHvGetVirtualProcessorCpuidOutput": (_P, _U32, _U32, _U32, _P),
    "WHvGetInterruptTargetVpSet": (_P, _U64, _U32, _P, _U32, _P),
}
PROTOTYPES: Final[dict[str, Any]] = {
    name: _functype(_U32, *arguments) for name, arguments in {**_REQUIRED, **_OPTIONAL}.items()
}
REQUIRED: Final = tuple(_REQUIRED)

Resolver = Callable[[str], int | None]


def aligned(size: int, alignment: int = 16) -> Any:
    """A zeroed ctypes byte array of ``size`` bytes whose address is a multiple of ``alignment``.

    ``WHV_REGISTER_VALUE`` holds 128-bit members and the API wants it so; ctypes itself aligns to 8.
    """
    raw = ctypes.create_string_buffer(size + alignment)
    offset = -ctypes.addressof(raw) % alignment
    return (ctypes.c_char * size).from_buffer(raw, offset)


class Api:
    """The functions, each callable as an attribute by its own name and returning the HRESULT as an unsigned number.

    ``resolve`` gives a function's address or None. ``on_host_write(handle, gpa, size)``, if not None, wants to hear of
    every host write to guest memory: a real processor sees them by itself, a simulated one does not. Raises
    BackendUnavailable where the library or one of the first functions is missing.
    """

    def __init__(
        self, resolve: Resolver | None = None, on_host_write: Callable[[int, int, int], None] | None = None
    ) -> None:
        self._library: Any = None
        self.keep_alive: object = None  # whatever owns the functions
        self.on_host_write = on_host_write
        resolve = resolve or self._from_library()
        self.functions: dict[str, Any] = {}
        for name, prototype in PROTOTYPES.items():
            address = resolve(name)
            if address:
                self.functions[name] = prototype(address)
            elif name in REQUIRED:
                raise BackendUnavailable("GetProcAddress", 127, f"{LIBRARY} has no {name}", ENABLE_HINT)

    def _from_library(self) -> Resolver:
        if sys.platform != "win32":
            raise BackendUnavailable("", 0, "Windows Hypervisor Platform exists on Windows only", "")
        try:
            library = ctypes.WinDLL(LIBRARY)
        except OSError as error:
            code = error.winerror or ERROR_MOD_NOT_FOUND
            raise BackendUnavailable("LoadLibrary", code, f"{LIBRARY} cannot be loaded", ENABLE_HINT) from error
        self._library = library

        def resolve(name: str) -> int | None:
            try:
                return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            except AttributeError:
                return None

        return resolve

    def has(self, name: str) -> bool:
        """Whether this system has the function."""
        return name in self.functions

    def attempt(self, name: str, *arguments: Any) -> int:
        """Call and return the HRESULT."""
        result: int = self.functions[name](*arguments)
        return result

    def call(self, name: str, *arguments: Any) -> None:
        """Call; a failure is raised as `error_for` makes it."""
        result: int = self.functions[name](*arguments)
        if result & 0x8000_0000:
            raise error_for(name, result)


_default: Api | None = None


def default_api() -> Api:
    """What backends use that were not given an `Api`: WinHvPlatform.dll, loaded once. Raises BackendUnavailable."""
    global _default
    if _default is None:
        _default = Api()
    return _default


def replace_default(api: Api | None) -> Api | None:
    """Let backends made from now on use ``api``; None takes it back. Returns what was replaced. For simulators."""
    global _default
    before, _default = _default, api
    return before


def error_for(call: str, result: int) -> HostError:
    """The error for a failed call, BackendUnavailable where the platform as a whole cannot be used."""
    meaning, unavailable = meaning_of(call, result)
    name = RESULT_NAMES.get(result, "")
    message = f"{meaning} ({name or 'HRESULT'} {result:#010x})"
    kind = BackendUnavailable if unavailable else HostError
    return kind(call, result, message, hint_for(call, result))

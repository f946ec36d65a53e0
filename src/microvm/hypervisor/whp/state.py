"""Everything a WHP vCPU is, as bytes, and back.

A blob is a tag and three sections: registers as (name, value) pairs, the XSAVE area and the local APIC's page, both
as Hyper-V gives them. Registers that this Windows does not know are left out when saving; a blob that names one
this Windows does not know is refused when restoring.

The order of restoring matters: XCR0 and XSS first, because XSAVE is judged by them; XSAVE; the local APIC; and the TSC
deadline last. An APIC that is set after the deadline forgets it, and the guest never ticks again.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, Final

from ...errors import HostError, SnapshotError
from . import codes, registers
from .api import aligned, error_for

if TYPE_CHECKING:
    from .vcpu import WhpVcpu

Value = tuple[int, tuple[int, int]]
_TAG: Final = b"whp-v1\0\0"
_HEADER: Final = struct.Struct("<8s3I")
_ENTRY: Final = struct.Struct("<I2Q")
LAPIC_SIZE: Final = 4096
XSAVE_START: Final = 4096
MAX_XSAVE: Final = 64 << 10  # the largest area of any processor so far is 11 KiB
XSAVE_LEGACY: Final = 512
XSAVE_MIN: Final = 576
_X87_SSE: Final = 3
_BV, _COMPACT = 512, 520

_FIRST: Final = (codes.WHvX64RegisterXCr0, codes.WHvX64RegisterXss)
_DEADLINE: Final = codes.WHvX64RegisterTscDeadline
_DEBUG: Final = tuple(range(codes.WHvX64RegisterDr0, codes.WHvX64RegisterDr7 + 1))
_SYNTHETIC: Final = (
    codes.WHvRegisterGuestOsId,
    codes.WHvX64RegisterHypercall,
    codes.WHvRegisterReferenceTsc,
    codes.WHvRegisterVpAssistPage,
)
_EVENTS: Final = (
    codes.WHvRegisterPendingInterruption,
    codes.WHvRegisterInterruptState,
    codes.WHvRegisterPendingEvent,
    codes.WHvRegisterInternalActivityState,
)
_READ_ONLY: Final = frozenset((codes.WHvX64RegisterMsrMtrrCap,))
_MSRS: Final = tuple(
    name for name in dict.fromkeys(registers.MSRS.values()) if name not in (*_READ_ONLY, _DEADLINE, *_FIRST)
)
SAVED: Final = (
    *_FIRST,
    *registers.ALL,
    *_DEBUG,
    *(name for name in _MSRS if name not in registers.ALL),
    *_SYNTHETIC,
    *_EVENTS,
)
_KNOWN: Final = frozenset((*SAVED, _DEADLINE))


def has_register(vcpu: WhpVcpu, name: int) -> bool:
    """Whether this Windows has the register. Asked once a partition and register."""
    known = vcpu.partition.known_registers
    if name not in known:
        try:
            registers.get(vcpu.partition.api, vcpu.handle, vcpu.index, (name,))
        except HostError:
            known[name] = False
        else:
            known[name] = True
    return known[name]


def clocks(vcpu: WhpVcpu) -> list[Value]:
    """The TSC and, behind it, the deadline."""
    names = [name for name in (codes.WHvX64RegisterTsc, _DEADLINE) if has_register(vcpu, name)]
    return list(zip(names, registers.get(vcpu.partition.api, vcpu.handle, vcpu.index, names), strict=True))


def _variable(vcpu: WhpVcpu, call: str, buffer_size: int) -> bytes:
    """What a WHvGet...State function gives, its buffer enlarged once if it says so."""
    api, written = vcpu.partition.api, ctypes.c_uint32()
    while True:
        buffer = aligned(buffer_size, 64)
        result = api.attempt(
            call, vcpu.handle, vcpu.index, ctypes.addressof(buffer), buffer_size, ctypes.addressof(written)
        )  # fmt: skip
        if result == codes.WHV_E_INSUFFICIENT_BUFFER and buffer_size < written.value <= MAX_XSAVE:
            buffer_size = written.value
            continue
        if result:
            raise error_for(call, result)
        return bytes(buffer[: written.value or buffer_size])


def get_xsave(vcpu: WhpVcpu) -> bytes:
    """The XSAVE area as Hyper-V has it, which is the compacted format. [SDM] 1 13.4.3"""
    return _variable(vcpu, "WHvGetVirtualProcessorXsaveState", XSAVE_START)


def set_xsave(vcpu: WhpVcpu, area: bytes) -> None:
    """Put back what `get_xsave` gave. Raises HostError."""
    buffer = aligned(len(area), 64)
    buffer[:] = area
    vcpu.partition.api.call(
        "WHvSetVirtualProcessorXsaveState", vcpu.handle, vcpu.index, ctypes.addressof(buffer), len(area)
    )


def standard_xsave(area: bytes) -> bytes:
    """x87 and SSE state in the standard format: the part where both formats agree but for the header."""
    head = bytearray(area[:XSAVE_MIN])
    present = int.from_bytes(head[_BV : _BV + 8], "little") & _X87_SSE
    head[_BV:] = present.to_bytes(8, "little") + bytes(XSAVE_MIN - _BV - 8)
    return bytes(head)


def merge_xsave(present: bytes, area: bytes) -> bytes:
    """``present``, in Hyper-V's format, with the x87 and SSE state of ``area``, in the standard one."""
    if len(area) < XSAVE_MIN:
        raise ValueError(f"an XSAVE area has at least {XSAVE_MIN} bytes")
    merged = bytearray(present)
    merged[:XSAVE_LEGACY] = area[:XSAVE_LEGACY]
    for at in (_BV, _COMPACT):
        value = int.from_bytes(merged[at : at + 8], "little")
        if at == _BV or value:  # the compacted format's header lists what has room
            merged[at : at + 8] = (value | _X87_SSE).to_bytes(8, "little")
    return bytes(merged)


def get_lapic(vcpu: WhpVcpu) -> bytes:
    """The local APIC's register page. Raises HostError."""
    api = vcpu.partition.api
    if api.has("WHvGetVirtualProcessorInterruptControllerState2"):
        return _variable(vcpu, "WHvGetVirtualProcessorInterruptControllerState2", LAPIC_SIZE)
    buffer, written = aligned(LAPIC_SIZE), ctypes.c_uint32()
    api.call(
        "WHvGetVirtualProcessorState",
        vcpu.handle,
        vcpu.index,
        codes.WHvVirtualProcessorStateTypeInterruptControllerState2,
        ctypes.addressof(buffer),
        LAPIC_SIZE,
        ctypes.addressof(written),
    )
    return bytes(buffer[: written.value])


def set_lapic(vcpu: WhpVcpu, page: bytes) -> None:
    """Put back what `get_lapic` gave. Raises HostError."""
    api, buffer = vcpu.partition.api, aligned(len(page))
    buffer[:] = page
    arguments: tuple[Any, ...] = (ctypes.addressof(buffer), len(page))
    if api.has("WHvSetVirtualProcessorInterruptControllerState2"):
        api.call("WHvSetVirtualProcessorInterruptControllerState2", vcpu.handle, vcpu.index, *arguments)
    else:
        kind = codes.WHvVirtualProcessorStateTypeInterruptControllerState2
        api.call("WHvSetVirtualProcessorState", vcpu.handle, vcpu.index, kind, *arguments)


def save(vcpu: WhpVcpu) -> bytes:
    """See `base.Vcpu.save`. Raises HostError."""
    names = [name for name in (*SAVED, _DEADLINE) if has_register(vcpu, name)]
    values = registers.get(vcpu.partition.api, vcpu.handle, vcpu.index, names)
    packed = b"".join(_ENTRY.pack(name, *value) for name, value in zip(names, values, strict=True))
    xsave, lapic = get_xsave(vcpu), get_lapic(vcpu)
    return _HEADER.pack(_TAG, len(names), len(xsave), len(lapic)) + packed + xsave + lapic


def restore(vcpu: WhpVcpu, blob: bytes) -> list[Value]:
    """See `base.Vcpu.restore`. Returns the clocks that were set. Raises SnapshotError, HostError."""
    values, xsave, lapic = _parse(blob)
    for name in values:
        if not has_register(vcpu, name):
            raise SnapshotError(f"the saved vCPU has register {name:#x}, which this Windows does not have")
    api, handle, index = vcpu.partition.api, vcpu.handle, vcpu.index
    registers.put(api, handle, index, [(name, values[name]) for name in SAVED if name in values])
    set_xsave(vcpu, xsave)
    set_lapic(vcpu, lapic)
    if _DEADLINE in values:
        registers.put(api, handle, index, [(_DEADLINE, values[_DEADLINE])])
    return [(name, values[name]) for name in (codes.WHvX64RegisterTsc, _DEADLINE) if name in values]


def _parse(blob: bytes) -> tuple[dict[int, tuple[int, int]], bytes, bytes]:
    if len(blob) < _HEADER.size or blob[:8] != _TAG:
        raise SnapshotError("the saved vCPU state is not Windows Hypervisor Platform's")
    _, count, xsave_size, lapic_size = _HEADER.unpack_from(blob)
    values_end = _HEADER.size + count * _ENTRY.size
    sizes_fit = XSAVE_MIN <= xsave_size <= MAX_XSAVE and 0 < lapic_size <= LAPIC_SIZE and count <= len(_KNOWN)
    if not sizes_fit or len(blob) != values_end + xsave_size + lapic_size:
        raise SnapshotError("the saved vCPU state is damaged")
    values = {name: (low, high) for name, low, high in _ENTRY.iter_unpack(blob[_HEADER.size : values_end])}
    if not values.keys() <= _KNOWN:
        raise SnapshotError("the saved vCPU state is damaged")
    return values, blob[values_end : values_end + xsave_size], blob[values_end + xsave_size :]

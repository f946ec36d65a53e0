"""Registers between `base.Registers` and WHV_REGISTER_VALUE, and buffers to carry them.

A value is 16 bytes, kept here as two 64-bit words. A segment's attributes have the same bits on both sides.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, Final

from ..base import Registers, Segment, Table
from . import codes
from .api import Api, aligned, error_for

GENERAL: Final = (
    ("rax", codes.WHvX64RegisterRax),
    ("rcx", codes.WHvX64RegisterRcx),
    ("rdx", codes.WHvX64RegisterRdx),
    ("rbx", codes.WHvX64RegisterRbx),
    ("rsp", codes.WHvX64RegisterRsp),
    ("rbp", codes.WHvX64RegisterRbp),
    ("rsi", codes.WHvX64RegisterRsi),
    ("rdi", codes.WHvX64RegisterRdi),
    ("r8", codes.WHvX64RegisterR8),
    ("r9", codes.WHvX64RegisterR9),
    ("r10", codes.WHvX64RegisterR10),
    ("r11", codes.WHvX64RegisterR11),
    ("r12", codes.WHvX64RegisterR12),
    ("r13", codes.WHvX64RegisterR13),
    ("r14", codes.WHvX64RegisterR14),
    ("r15", codes.WHvX64RegisterR15),
    ("rip", codes.WHvX64RegisterRip),
    ("rflags", codes.WHvX64RegisterRflags),
)
SEGMENTS: Final = (
    ("es", codes.WHvX64RegisterEs),
    ("cs", codes.WHvX64RegisterCs),
    ("ss", codes.WHvX64RegisterSs),
    ("ds", codes.WHvX64RegisterDs),
    ("fs", codes.WHvX64RegisterFs),
    ("gs", codes.WHvX64RegisterGs),
    ("ldtr", codes.WHvX64RegisterLdtr),
    ("tr", codes.WHvX64RegisterTr),
)
TABLES: Final = (("gdtr", codes.WHvX64RegisterGdtr), ("idtr", codes.WHvX64RegisterIdtr))
CONTROL: Final = (
    ("cr0", codes.WHvX64RegisterCr0),
    ("cr2", codes.WHvX64RegisterCr2),
    ("cr3", codes.WHvX64RegisterCr3),
    ("cr4", codes.WHvX64RegisterCr4),
    ("cr8", codes.WHvX64RegisterCr8),
    ("efer", codes.WHvX64RegisterEfer),
)
ALL: Final = tuple(name for group in (GENERAL, SEGMENTS, TABLES, CONTROL) for _, name in group)

# MSR: the register that holds it. [SDM] 4
MSRS: Final[dict[int, int]] = {
    0x10: codes.WHvX64RegisterTsc,
    0x1B: codes.WHvX64RegisterApicBase,
    0x3B: codes.WHvX64RegisterTscAdjust,
    0x48: codes.WHvX64RegisterSpecCtrl,
    0xFE: codes.WHvX64RegisterMsrMtrrCap,
    0x174: codes.WHvX64RegisterSysenterCs,
    0x175: codes.WHvX64RegisterSysenterEsp,
    0x176: codes.WHvX64RegisterSysenterEip,
    0x1A0: codes.WHvX64RegisterMsrIa32MiscEnable,
    0x277: codes.WHvX64RegisterPat,
    0x2FF: codes.WHvX64RegisterMsrMtrrDefType,
    0x6E0: codes.WHvX64RegisterTscDeadline,
    0xDA0: codes.WHvX64RegisterXss,
    0xC000_0080: codes.WHvX64RegisterEfer,
    0xC000_0081: codes.WHvX64RegisterStar,
    0xC000_0082: codes.WHvX64RegisterLstar,
    0xC000_0083: codes.WHvX64RegisterCstar,
    0xC000_0084: codes.WHvX64RegisterSfmask,
    0xC000_0102: codes.WHvX64RegisterKernelGsBase,
    0xC000_0103: codes.WHvX64RegisterTscAux,
    **{0x200 + 2 * i: codes.WHvX64RegisterMsrMtrrPhysBase0 + i for i in range(8)},
    **{0x201 + 2 * i: codes.WHvX64RegisterMsrMtrrPhysMask0 + i for i in range(8)},
    0x250: codes.WHvX64RegisterMsrMtrrFix64k00000,
    0x258: codes.WHvX64RegisterMsrMtrrFix16k80000,
    0x259: codes.WHvX64RegisterMsrMtrrFix16kA0000,
    **{0x268 + i: codes.WHvX64RegisterMsrMtrrFix4kC0000 + i for i in range(8)},
}
MSR_FS_BASE: Final = 0xC000_0100
MSR_GS_BASE: Final = 0xC000_0101
NO_SUCH_REGISTER: Final = frozenset((codes.WHV_E_INVALID_VP_REGISTER_NAME, codes.ERROR_HV_INVALID_PARAMETER))


class Buffer:
    """Names and aligned values for up to ``size`` registers; used again and again by one thread.

    ``words[2 * i]`` and ``words[2 * i + 1]`` are the low and high half of value ``i``.
    """

    __slots__ = ("_raw", "names", "names_at", "values_at", "words")

    def __init__(self, size: int, names: Iterable[int] = ()) -> None:
        self.names: Any = (ctypes.c_uint32 * size)(*names)
        self._raw = aligned(16 * size)
        self.words = memoryview(self._raw).cast("B").cast("Q")
        self.names_at = ctypes.addressof(self.names)
        self.values_at = ctypes.addressof(self._raw)


def get(api: Api, handle: int, index: int, names: Iterable[int]) -> list[tuple[int, int]]:
    """The values of registers as (low, high) words. Raises HostError."""
    names = tuple(names)
    buffer = Buffer(len(names), names)
    api.call(
        "WHvGetVirtualProcessorRegisters", handle, index, buffer.names_at, len(names), buffer.values_at
    )  # fmt: skip
    words = buffer.words.tolist()
    return list(zip(words[::2], words[1::2], strict=True))


def put(api: Api, handle: int, index: int, values: Iterable[tuple[int, tuple[int, int]]]) -> None:
    """Set registers given as (name, (low, high)). Raises HostError."""
    result = try_put(api, handle, index, values)
    if result:
        raise error_for("WHvSetVirtualProcessorRegisters", result)


def try_put(api: Api, handle: int, index: int, values: Iterable[tuple[int, tuple[int, int]]]) -> int:
    """Like `put`; returns the HRESULT."""
    pairs = list(values)
    buffer = Buffer(len(pairs), (name for name, _ in pairs))
    for i, (_, (low, high)) in enumerate(pairs):
        buffer.words[2 * i], buffer.words[2 * i + 1] = low, high
    return api.attempt(
        "WHvSetVirtualProcessorRegisters", handle, index, buffer.names_at, len(pairs), buffer.values_at
    )  # fmt: skip


def to_values(registers: Registers) -> list[tuple[int, tuple[int, int]]]:
    """What to set for ``registers``."""
    mask = (1 << 64) - 1
    values = [(code, (getattr(registers, name) & mask, 0)) for name, code in GENERAL]
    for name, code in SEGMENTS:
        segment: Segment = getattr(registers, name)
        high = segment.limit & 0xFFFF_FFFF | (segment.selector & 0xFFFF) << 32 | (segment.attributes & 0xFFFF) << 48
        values.append((code, (segment.base & mask, high)))
    for name, code in TABLES:
        table: Table = getattr(registers, name)
        values.append((code, ((table.limit & 0xFFFF) << 48, table.base & mask)))
    values += [(code, (getattr(registers, name) & mask, 0)) for name, code in CONTROL]
    return values


def from_values(values: list[tuple[int, int]]) -> Registers:
    """The registers of `ALL`, as `get` returns them."""
    registers = Registers()
    pairs = iter(values)
    for name, _ in GENERAL:
        setattr(registers, name, next(pairs)[0])
    for name, _ in SEGMENTS:
        base, rest = next(pairs)
        setattr(registers, name, Segment(rest >> 32 & 0xFFFF, base, rest & 0xFFFF_FFFF, rest >> 48 & 0xF0FF))
    for name, _ in TABLES:
        low, base = next(pairs)
        setattr(registers, name, Table(base, low >> 48))
    for name, _ in CONTROL:
        setattr(registers, name, next(pairs)[0])
    return registers

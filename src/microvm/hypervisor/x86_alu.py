"""Integer arithmetic with the flags it leaves. [SDM] 1 appendix A; what the manual calls undefined is left clear."""

from __future__ import annotations

from typing import Final

CF: Final = 1 << 0
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
DF: Final = 1 << 10
OF: Final = 1 << 11
STATUS: Final = CF | PF | AF | ZF | SF | OF


def _common(value: int, width: int) -> int:
    """PF, ZF and SF of a result of ``width`` bits."""
    flags = 0 if (value & 0xFF).bit_count() & 1 else PF
    if not value:
        flags |= ZF
    if value >> (width - 1):
        flags |= SF
    return flags


def add(a: int, b: int, carry: int, width: int) -> tuple[int, int]:
    """``a + b + carry``: the result and all six status flags."""
    total = a + b + carry
    result = total & ((1 << width) - 1)
    flags = _common(result, width) | ((a ^ b ^ result) & AF)
    if total >> width:
        flags |= CF
    if ((a ^ result) & (b ^ result)) >> (width - 1):
        flags |= OF
    return result, flags


def subtract(a: int, b: int, borrow: int, width: int) -> tuple[int, int]:
    """``a - b - borrow``: the result and all six status flags."""
    total = a - b - borrow
    result = total & ((1 << width) - 1)
    flags = _common(result, width) | ((a ^ b ^ result) & AF)
    if total < 0:
        flags |= CF
    if ((a ^ b) & (a ^ result)) >> (width - 1):
        flags |= OF
    return result, flags


def logic(result: int, width: int) -> tuple[int, int]:
    """The flags of AND, OR, XOR and TEST: carry and overflow clear."""
    return result, _common(result, width)

"""How a simulated function answers."""

from __future__ import annotations

import ctypes

from ...hypervisor.whp import codes


class Refused(Exception):
    """The call fails with this HRESULT."""

    def __init__(self, result: int) -> None:
        self.result = result


def hand_out(data: bytes, buffer: int, size: int, written: int | None) -> int:
    """Copy a variable-size answer to the caller, or tell how much room it takes."""
    if written:
        ctypes.c_uint32.from_address(written).value = len(data)
    if size < len(data):
        return codes.WHV_E_INSUFFICIENT_BUFFER
    ctypes.memmove(buffer, data, len(data))
    return codes.S_OK

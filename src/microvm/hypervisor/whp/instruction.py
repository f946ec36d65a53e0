"""The processor as `x86_mmio` sees it while it carries out an instruction for a stopped WHP vCPU.

General registers are fetched in one call and the changed ones set in one call together with RIP; everything else is
fetched when an instruction asks for it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final

from ...bus import Bus
from .. import x86_mmio
from . import codes, registers
from .api import error_for

if TYPE_CHECKING:
    from .vcpu import WhpVcpu

_GENERAL: Final = tuple(range(codes.WHvX64RegisterRax, codes.WHvX64RegisterR15 + 1))
_MAX_SET: Final = 16 + 3
_PAGE_MASK: Final = 0xFFF
_ONES: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
# Translations that end at a device are good ones.
_REACHES_MEMORY: Final = frozenset(
    (
        codes.WHvTranslateGvaResultSuccess,
        codes.WHvTranslateGvaResultGpaUnmapped,
        codes.WHvTranslateGvaResultGpaNoReadAccess,
        codes.WHvTranslateGvaResultGpaNoWriteAccess,
    )
)


class StoppedCpu:
    """See `x86_mmio.Cpu`. One per vCPU, used again for every exit; `begin` and `end` frame an instruction."""

    def __init__(self, vcpu: WhpVcpu) -> None:
        self._vcpu = vcpu
        self._partition = vcpu.partition
        self._api = vcpu.partition.api
        self._get: Any = self._api.functions["WHvGetVirtualProcessorRegisters"]
        self._set: Any = self._api.functions["WHvSetVirtualProcessorRegisters"]
        self._in = registers.Buffer(16, _GENERAL)
        self._out = registers.Buffer(_MAX_SET)
        self._pages: dict[int, int] = {}
        self._before: list[int] = []
        self._cpl = 0
        self._hint: int | None = None
        self.gpr: list[int] = []
        self.rip = 0
        self.rflags = 0
        self._rflags_before = 0
        self.bits = 64
        self.bus = Bus()

    def begin(self, bus: Bus, rip: int, rflags: int, bits: int, cpl: int) -> None:
        """Fetch the general registers. Raises HostError."""
        result = self._get(self._vcpu.handle, self._vcpu.index, self._in.names_at, 16, self._in.values_at)
        if result:
            raise error_for("WHvGetVirtualProcessorRegisters", result)
        self._before = self._in.words[::2].tolist()
        self.gpr = list(self._before)
        self.bus, self.rip, self.rflags, self.bits, self._cpl = bus, rip, rflags, bits, cpl
        self._rflags_before = rflags
        self._pages.clear()
        self._hint = None

    def access_at(self, gva: int | None, gpa: int, one_operand: bool) -> None:
        """What the exit said about the access: saves translating it again.

        Without ``gva``, an instruction with one memory operand can only have meant an address with the same low bits.
        """
        if gva is not None:
            self._pages[gva & ~_PAGE_MASK] = gpa & ~_PAGE_MASK
        elif one_operand:
            self._hint = gpa

    def end(self, shadow: bool) -> None:
        """Set what changed, RIP always; ``shadow`` ends the interrupt shadow that the instruction stood in."""
        names, words = self._out.names, self._out.words
        names[0], words[0], words[1] = codes.WHvX64RegisterRip, self.rip, 0
        count = 1
        if self.gpr != self._before:
            for index in range(16):
                if self.gpr[index] != self._before[index]:
                    names[count], words[2 * count], words[2 * count + 1] = index, self.gpr[index], 0
                    count += 1
        if self.rflags != self._rflags_before:
            names[count], words[2 * count], words[2 * count + 1] = codes.WHvX64RegisterRflags, self.rflags, 0
            count += 1
        if shadow:
            names[count], words[2 * count], words[2 * count + 1] = codes.WHvRegisterInterruptState, 0, 0
            count += 1
        result = self._set(self._vcpu.handle, self._vcpu.index, self._out.names_at, count, self._out.values_at)
        if result:
            raise error_for("WHvSetVirtualProcessorRegisters", result)

    def fetch(self, gva: int, size: int) -> bytes:
        """Instruction bytes the exit did not bring; fewer where the next page is not there."""
        found = b""
        while len(found) < size:
            at = gva + len(found)
            try:
                gpa = self._translate(at, codes.WHvTranslateGvaFlagValidateExecute)
            except x86_mmio.Fault:
                break
            piece = min(size - len(found), 0x1000 - (at & _PAGE_MASK))
            memory = self._partition.memory_at(gpa, piece)
            if memory is None:
                break
            found += bytes(memory)
        return found

    def segment_base(self, index: int) -> int:
        name = codes.WHvX64RegisterEs + index
        return registers.get(self._api, self._vcpu.handle, self._vcpu.index, (name,))[0][0]

    def translate(self, gva: int, write: bool) -> int:
        page = self._pages.get(gva & ~_PAGE_MASK)
        if page is not None:
            return page | gva & _PAGE_MASK
        hint = self._hint
        if hint is not None and (hint ^ gva) & _PAGE_MASK == 0:
            self._hint = None
            self._pages[gva & ~_PAGE_MASK] = hint & ~_PAGE_MASK
            return hint
        flag = codes.WHvTranslateGvaFlagValidateWrite if write else codes.WHvTranslateGvaFlagValidateRead
        gpa = self._translate(gva, flag)
        self._pages[gva & ~_PAGE_MASK] = gpa & ~_PAGE_MASK
        return gpa

    def _translate(self, gva: int, flags: int) -> int:
        result, gpa = self._vcpu.translate_gva(gva, flags)
        if result in _REACHES_MEMORY:
            return gpa
        code = int(result != codes.WHvTranslateGvaResultPageNotPresent)
        code |= 2 * bool(flags & codes.WHvTranslateGvaFlagValidateWrite) | 4 * (self._cpl == 3)
        code |= 8 * (result == codes.WHvTranslateGvaResultInvalidPageTableFlags)
        raise x86_mmio.Fault(x86_mmio.PAGE_FAULT, code, gva)

    def read(self, gpa: int, size: int) -> int:
        memory = self._partition.memory_at(gpa, size)
        return self.bus.mmio_read(gpa, size) if memory is None else int.from_bytes(memory, "little")

    def write(self, gpa: int, size: int, value: int) -> None:
        if not self._partition.write_memory(gpa, value.to_bytes(size, "little")):
            self.bus.mmio_write(gpa, size, value & _ONES[size])

    def port_in(self, port: int, size: int) -> int:
        return self.bus.pio_read(port, size)

    def port_out(self, port: int, size: int, value: int) -> None:
        self.bus.pio_write(port, size, value)

    def get_xmm(self, index: int) -> int:
        name = codes.WHvX64RegisterXmm0 + index
        low, high = registers.get(self._api, self._vcpu.handle, self._vcpu.index, (name,))[0]
        return low | high << 64

    def set_xmm(self, index: int, value: int) -> None:
        words = (value & _ONES[8], value >> 64)
        name = codes.WHvX64RegisterXmm0 + index
        registers.put(self._api, self._vcpu.handle, self._vcpu.index, ((name, words),))


def translate(vcpu: WhpVcpu, gva: int, flags: int) -> tuple[int, int]:
    """WHvTranslateGva: its result code and the guest-physical address. Raises HostError."""
    result = ctypes.c_uint64()  # WHV_TRANSLATE_GVA_RESULT: the code is in the low half
    gpa = ctypes.c_uint64()
    vcpu.partition.api.call(
        "WHvTranslateGva", vcpu.handle, vcpu.index, gva, flags, ctypes.byref(result), ctypes.byref(gpa)
    )
    return result.value & 0xFFFF_FFFF, gpa.value

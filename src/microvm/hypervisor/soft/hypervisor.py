"""The software CPU as a backend."""

from __future__ import annotations

import time
from typing import Final

from ...bus import Bus
from ...errors import BackendUnavailable, HostError
from ...memory import GuestMemory
from ..base import Availability, PartitionConfig, Registers, Segment, StopReason
from . import library
from .partition import SoftPartition

_LOOPS: Final = 20_000_000
_OUTS: Final = 20_000
_CODE: Final = 0x1000


class SoftHypervisor:
    """See `hypervisor.base.Hypervisor`."""

    name = library.NAME

    def probe(self) -> Availability:
        """Run two tiny real-mode guests: a counted loop and a row of port writes. Tens of milliseconds."""
        try:
            # mov ecx, LOOPS; 1: dec ecx; jnz 1b; cli; hlt
            loop = self._run(b"\x66\xb9" + _LOOPS.to_bytes(4, "little") + b"\x66\x49\x75\xfc\xfa\xf4")
            # mov cx, OUTS; 1: out 0x80, al; dec cx; jnz 1b; cli; hlt
            outs = self._run(b"\xb9" + _OUTS.to_bytes(2, "little") + b"\xe6\x80\x49\x75\xfb\xfa\xf4")
        except BackendUnavailable as error:
            return Availability(self.name, False, error.message, error.hint)
        except HostError as error:
            return Availability(self.name, False, str(error))
        return Availability(
            self.name,
            True,
            "the software CPU works; it needs no hardware support and is many times slower than hardware",
            mips=2 * _LOOPS / loop / 1e6,
            exits_per_second=_OUTS / outs,
        )

    def _run(self, code: bytes) -> float:
        partition = self.create_partition(PartitionConfig())
        memory = GuestMemory.allocate(64 << 10)
        try:
            for region in memory:
                partition.map(region.gpa, region)
            memory.write(_CODE, code)
            vcpu = partition.create_vcpu(0)
            vcpu.set_registers(Registers(rip=_CODE, cs=Segment(0, 0, 0xFFFF, 0x9B)))
            started = time.perf_counter()
            stop = vcpu.run(Bus())
            elapsed = time.perf_counter() - started
            if stop.reason != StopReason.HALTED:
                raise HostError("uc_emu_start", 0, f"a tiny guest did not finish: {stop.reason} {stop.detail}".rstrip())
            return elapsed
        finally:
            partition.close()
            memory.close()

    def create_partition(self, config: PartitionConfig) -> SoftPartition:
        return SoftPartition(config)

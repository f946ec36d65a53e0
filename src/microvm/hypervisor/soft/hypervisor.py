"""The software CPU as a backend."""

from __future__ import annotations

from ...errors import BackendUnavailable, HostError
from ..base import Availability, PartitionConfig
from ..trial import run_trial
from . import library
from .partition import SoftPartition


class SoftHypervisor:
    """See `hypervisor.base.Hypervisor`."""

    name = library.NAME

    @property
    def build(self) -> str:
        """Which builds can take up each other's saved state: the same shim on the same engine."""
        return library.build_id()

    def probe(self) -> Availability:
        """Run the tiny guest of `hypervisor.trial`. Tens of milliseconds."""
        try:
            trial = run_trial(self)
        except BackendUnavailable as error:
            return Availability(self.name, False, error.message, error.hint)
        except HostError as error:
            return Availability(self.name, False, str(error))
        if trial.failure:
            return Availability(self.name, False, f"the software CPU is broken here: {trial.failure}")
        return Availability(
            self.name,
            True,
            "works anywhere without hardware support, many times slower than hardware",
            mips=trial.mips,
            exits_per_second=trial.exits_per_second,
        )

    def create_partition(self, config: PartitionConfig) -> SoftPartition:
        return SoftPartition(config)

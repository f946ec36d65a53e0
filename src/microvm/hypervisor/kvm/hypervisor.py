"""The KVM backend's front door."""

from __future__ import annotations

from ..base import Availability, PartitionConfig
from .api import Api
from .host import open_kvm
from .partition import KvmPartition


class KvmHypervisor:
    """Linux KVM through /dev/kvm. ``api`` is there for tests."""

    name = "kvm"

    def __init__(self, api: Api | None = None) -> None:
        self._api = api

    def create_partition(self, config: PartitionConfig) -> KvmPartition:
        """An empty partition. Raises BackendUnavailable with a hint, ConfigError."""
        api = self._api or Api()
        return KvmPartition(api, open_kvm(api), config)

    def probe(self) -> Availability:
        """See `base.Hypervisor.probe`."""
        from .probe import probe

        return probe(self)

"""Linux KVM."""

from .hypervisor import KvmHypervisor

__all__ = ["KvmHypervisor"]

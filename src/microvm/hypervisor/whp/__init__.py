"""Windows Hypervisor Platform: Hyper-V's partitions for user-mode programs, on every edition of Windows."""

from .hypervisor import WhpHypervisor

__all__ = ["WhpHypervisor"]

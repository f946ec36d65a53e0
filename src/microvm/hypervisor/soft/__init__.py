"""The software CPU: QEMU's TCG as the `unicorn` library, made a real PC processor by a compiled shim."""

from .hypervisor import SoftHypervisor

__all__ = ["SoftHypervisor"]

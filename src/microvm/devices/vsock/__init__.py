"""The socket device: many byte streams between guest and host. [virtio-v1.2] 5.10."""

from .connection import Connection, ConnectionState, Endpoint, Phase
from .device import FIRST_HOST_PORT, Vsock

__all__ = ["FIRST_HOST_PORT", "Connection", "ConnectionState", "Endpoint", "Phase", "Vsock"]

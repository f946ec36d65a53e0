"""virtio: queues, the device base class and the MMIO transport. [virtio-v1.2]"""

from .chain import Chain
from .device import DeviceState, QueueSpec, VirtioDevice
from .mmio import MmioState, VirtioMmio
from .queue import Queue, QueueState

__all__ = ["Chain", "DeviceState", "MmioState", "Queue", "QueueSpec", "QueueState", "VirtioDevice", "VirtioMmio"]

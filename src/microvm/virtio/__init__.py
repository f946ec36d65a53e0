"""virtio: queues, the device base class and the MMIO transport. [virtio-v1.2]"""

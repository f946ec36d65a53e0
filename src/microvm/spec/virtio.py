"""virtio: device ids, feature bits, status bits, the split ring's records and the MMIO registers. [virtio-v1.2]"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple


class DeviceId:
    """[virtio-v1.2] 5."""

    NET: Final = 1
    BLOCK: Final = 2
    CONSOLE: Final = 3
    ENTROPY: Final = 4
    BALLOON: Final = 5
    VSOCK: Final = 19
    FS: Final = 26


class Feature:
    """Feature bits that belong to no device, as masks. [virtio-v1.2] 6."""

    INDIRECT_DESC: Final = 1 << 28
    EVENT_IDX: Final = 1 << 29
    VERSION_1: Final = 1 << 32
    ACCESS_PLATFORM: Final = 1 << 33
    RING_RESET: Final = 1 << 40


class Status:
    """Device status bits. [virtio-v1.2] 2.1."""

    ACKNOWLEDGE: Final = 1
    DRIVER: Final = 2
    DRIVER_OK: Final = 4
    FEATURES_OK: Final = 8
    DEVICE_NEEDS_RESET: Final = 64
    FAILED: Final = 128


class InterruptBit:
    """Bits of InterruptStatus. [virtio-v1.2] 4.2.2."""

    USED_BUFFER: Final = 1
    CONFIG_CHANGE: Final = 2


class DescFlag:
    """Descriptor flags. [virtio-v1.2] 2.7.5."""

    NEXT: Final = 1
    WRITE: Final = 2
    INDIRECT: Final = 4


class Descriptor(NamedTuple):
    """One entry of a descriptor table. [virtio-v1.2] 2.7.5."""

    gpa: int
    size: int
    flags: int
    next: int


DESCRIPTOR: Final = Struct("<QIHH")
DESCRIPTOR_SIZE: Final = 16
assert DESCRIPTOR.size == DESCRIPTOR_SIZE

AVAIL_NO_INTERRUPT: Final = 1  # avail.flags: the driver asks for no interrupts. [virtio-v1.2] 2.7.6
USED_NO_NOTIFY: Final = 1  # used.flags: the device asks for no notifications. [virtio-v1.2] 2.7.8
AVAIL_HEADER_SIZE: Final = 4  # flags, idx; then 2 bytes an entry
USED_HEADER_SIZE: Final = 4  # flags, idx; then 8 bytes an entry
USED_ELEMENT_SIZE: Final = 8
DESC_ALIGN: Final = 16  # [virtio-v1.2] 2.7
AVAIL_ALIGN: Final = 2
USED_ALIGN: Final = 4
MAX_QUEUE_SIZE: Final = 32768


class MmioReg:
    """Register offsets of the MMIO transport, version 2. [virtio-v1.2] 4.2.2."""

    MAGIC: Final = 0x000
    VERSION: Final = 0x004
    DEVICE_ID: Final = 0x008
    VENDOR_ID: Final = 0x00C
    DEVICE_FEATURES: Final = 0x010
    DEVICE_FEATURES_SEL: Final = 0x014
    DRIVER_FEATURES: Final = 0x020
    DRIVER_FEATURES_SEL: Final = 0x024
    QUEUE_SEL: Final = 0x030
    QUEUE_NUM_MAX: Final = 0x034
    QUEUE_NUM: Final = 0x038
    QUEUE_READY: Final = 0x044
    QUEUE_NOTIFY: Final = 0x050
    INTERRUPT_STATUS: Final = 0x060
    INTERRUPT_ACK: Final = 0x064
    STATUS: Final = 0x070
    QUEUE_DESC_LOW: Final = 0x080
    QUEUE_DESC_HIGH: Final = 0x084
    QUEUE_DRIVER_LOW: Final = 0x090
    QUEUE_DRIVER_HIGH: Final = 0x094
    QUEUE_DEVICE_LOW: Final = 0x0A0
    QUEUE_DEVICE_HIGH: Final = 0x0A4
    SHM_SEL: Final = 0x0AC
    SHM_LEN_LOW: Final = 0x0B0
    SHM_LEN_HIGH: Final = 0x0B4
    SHM_BASE_LOW: Final = 0x0B8
    SHM_BASE_HIGH: Final = 0x0BC
    QUEUE_RESET: Final = 0x0C0
    CONFIG_GENERATION: Final = 0x0FC
    CONFIG: Final = 0x100


MMIO_MAGIC: Final = 0x7472_6976  # "virt"
MMIO_VERSION: Final = 2
MMIO_VENDOR: Final = 0x4D56_554D  # "MUVM"; no registry exists
MMIO_SIZE: Final = 0x1000

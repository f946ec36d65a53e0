"""The socket device: packets between a guest and its host. [virtio-v1.2] 5.10."""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

HOST_CID: Final = 2  # VMADDR_CID_HOST
FIRST_GUEST_CID: Final = 3  # 0 and 2 are taken, 1 means the local host
CID_ANY: Final = 0xFFFF_FFFF
MAX_PORT: Final = 0xFFFF_FFFE  # 0xffffffff means "any port"

QUEUE_RX: Final = 0
QUEUE_TX: Final = 1
QUEUE_EVENT: Final = 2

F_STREAM: Final = 1 << 0
F_SEQPACKET: Final = 1 << 1

CONFIG: Final = Struct("<Q")  # guest_cid


class Type:
    """Socket types. [virtio-v1.2] 5.10.6.4."""

    STREAM: Final = 1
    SEQPACKET: Final = 2


class Op:
    """What a packet asks for. [virtio-v1.2] 5.10.6."""

    INVALID: Final = 0
    REQUEST: Final = 1
    RESPONSE: Final = 2
    RST: Final = 3
    SHUTDOWN: Final = 4
    RW: Final = 5
    CREDIT_UPDATE: Final = 6
    CREDIT_REQUEST: Final = 7


class Shutdown:
    """Flags of a SHUTDOWN packet, from the sender's side: what it will no longer do. Once sent they stay set."""

    RECEIVE: Final = 1
    SEND: Final = 2
    BOTH: Final = 3


class Header(NamedTuple):
    """What every packet begins with. ``size`` is the payload's; the specification calls it ``len``."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    size: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


HEADER: Final = Struct("<QQIIIHHIII")
HEADER_SIZE: Final = 44
assert HEADER.size == HEADER_SIZE

EVENT: Final = Struct("<I")
EVENT_TRANSPORT_RESET: Final = 0

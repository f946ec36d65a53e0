"""virtio console device. [virtio-v1.2] 5.3."""

from __future__ import annotations

from struct import Struct
from typing import Final


class Feature:
    """[virtio-v1.2] 5.3.3."""

    SIZE: Final = 1 << 0
    MULTIPORT: Final = 1 << 1
    EMERG_WRITE: Final = 1 << 2


RECEIVE: Final = 0
TRANSMIT: Final = 1

CONFIG: Final = Struct("<HHII")  # columns, rows, ports, emergency write
assert CONFIG.size == 12

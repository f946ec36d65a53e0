"""The entropy device. [virtio-v1.2] 5.4."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from ..spec.virtio import DeviceId
from ..virtio import Chain, QueueSpec, VirtioDevice

MAX_BYTES: Final = 4096
"""Random bytes for one request: a chain may offer 4 GiB, which the host would have to allocate and generate. The
driver asks again for what it did not get."""


class Rng(VirtioDevice):
    """Hands out ``source(size)``, the host's generator unless given."""

    device_id = DeviceId.ENTROPY
    queues = (QueueSpec("requests", 64),)

    def __init__(self, source: Callable[[int], bytes] = os.urandom) -> None:
        super().__init__()
        self._source = source

    def on_requests(self, chain: Chain) -> int:
        return chain.write(self._source(min(chain.writable_bytes, MAX_BYTES)))

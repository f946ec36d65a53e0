"""The console device: hvc0 in a Linux guest. [virtio-v1.2] 5.3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ..errors import SnapshotError
from ..spec.virtio import DeviceId
from ..spec.virtio_console import CONFIG, RECEIVE, Feature
from ..virtio import Chain, QueueSpec, VirtioDevice

INPUT_MAX: Final = 64 << 10
"""Bytes of input kept for a guest that does not read; `Console.feed` takes no more."""

OUTPUT_MAX: Final = 1 << 20
"""Bytes of one output request, which the host copies. Linux sends at most 32 KiB at a time."""

_SIZE_MAX: Final = 0xFFFF


class Console(VirtioDevice):
    """One terminal, without the multi-port extension.

    ``output`` is called with what the guest prints, on the thread that serves the queue; it may block, which holds the
    guest's output back, and must not raise. ``on_room``, if given, is called when input that `feed` refused would be
    taken again: on the same thread, with the device locked, so it must do no more than wake somebody up.
    """

    device_id = DeviceId.CONSOLE
    queues = (QueueSpec("receive", 64), QueueSpec("transmit", 64))
    device_features = Feature.SIZE

    def __init__(self, output: Callable[[bytes], None], on_room: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._output = output
        self._on_room = on_room
        self._input = bytearray()
        self._refused = False
        self._set_size(80, 25)

    def on_transmit(self, chain: Chain) -> int:
        data = chain.read_all(OUTPUT_MAX)
        if data:
            self._output(data)
        return 0

    def fill_receive(self) -> None:
        """Hand buffered input to the driver's buffers."""
        waiting = self._input
        while waiting:
            chain = self.pop(RECEIVE)
            if chain is None:
                break
            count = chain.write(waiting[: chain.writable_bytes])
            del waiting[:count]
            self.complete(chain, count)
        if self._refused and len(waiting) < INPUT_MAX:
            self._refused = False
            if self._on_room is not None:
                self._on_room()

    def feed(self, data: bytes) -> int:
        """Type ``data`` at the terminal. Returns how many bytes were taken: the buffer is bounded. Any thread."""
        with self.batch():
            self.fill_receive()
            taken = data[: INPUT_MAX - len(self._input)]
            self._input += taken
            self._refused = len(taken) < len(data)
            if taken:
                self.fill_receive()
            return len(taken)
        return 0

    def resize(self, columns: int, rows: int) -> None:
        """The terminal's size, in characters; the driver is told. Any thread."""
        with self.lock:
            self._set_size(columns, rows)
            self.config_changed()

    def _set_size(self, columns: int, rows: int) -> None:
        self._columns = max(0, min(columns, _SIZE_MAX))
        self._rows = max(0, min(rows, _SIZE_MAX))
        self.config = CONFIG.pack(self._columns, self._rows, 1, 0)

    def on_activate(self) -> None:
        self.fill_receive()

    def save_state(self) -> dict[str, Any]:
        return {"input": bytes(self._input), "columns": self._columns, "rows": self._rows}

    def restore_state(self, state: dict[str, Any]) -> None:
        waiting, columns, rows = state.get("input"), state.get("columns"), state.get("rows")
        if not isinstance(waiting, bytes) or len(waiting) > INPUT_MAX:
            raise SnapshotError("console: the saved input is not one")
        if not isinstance(columns, int) or not isinstance(rows, int):
            raise SnapshotError("console: the saved size is not one")
        self._input = bytearray(waiting)
        self._set_size(columns, rows)

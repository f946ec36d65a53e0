"""A machine of ours as a process: `python bench/ours.py KERNEL INITRD CMDLINE [OPTION]...`.

Options: disk=FILE ro stream console backend=NAME. Prints the guest's serial line. Used as the counterpart of a QEMU process, through the public API alone.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

if __package__:
    from .machine import Child, Setup
else:
    sys.path.insert(0, str(Path(__file__).parent))

PORT = 5000
CMDLINE = "console=ttyS0 reboot=t panic=-1 quiet loglevel=0"


class Ours:
    """Starts machines of ours, of one backend."""

    name = "microvm"
    stream = f"vsock:{PORT}"

    def __init__(self, backend: str = "soft") -> None:
        self.backend = backend

    def argv(self, setup: Setup) -> list[str]:
        words = [sys.executable, __file__, str(setup.kernel), str(setup.initrd), cmdline(setup), str(setup.memory_mib)]
        if setup.disk:
            words += [f"disk={setup.disk}"] + ["ro"] * setup.read_only
        return words + ["stream"] * bool(setup.stream) + ["console"] * setup.console + [f"backend={self.backend}"]

    def start(self, setup: Setup) -> Child:
        return Child(self.argv(setup))


def cmdline(setup: Setup) -> str:
    return f"{CMDLINE} bench={setup.tasks}"


def main(argv: Sequence[str]) -> int:
    import microvm

    kernel, initrd, command_line, memory, *options = argv
    disks = [microvm.DiskConfig(Path(o[5:]), read_only="ro" in options) for o in options if o.startswith("disk=")]
    backend = next((o[8:] for o in options if o.startswith("backend=")), "soft")
    config = microvm.MachineConfig(
        kernel=Path(kernel),
        initrds=[Path(initrd)],
        cmdline=command_line,
        memory_mib=int(memory),
        disks=disks,
        vsock_cid=3 if "stream" in options else None,
        console="console" in options,
        rng=False,
        balloon=False,
        backend=backend,
    )
    with microvm.MicroVM(config) as vm:
        vm.serial.on_output(lambda data: os.write(1, data) and None)
        if "stream" in options:
            from machine import serve_stream as serve

            listener = vm.vsock.listen(PORT)
            threading.Thread(target=lambda: serve(listener.accept()), daemon=True).start()
        vm.start()
        vm.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""QEMU's TCG, microvm machine, set up as fast as it goes.

What was tried for the boot (medians of CPU seconds): plain 0.68; with the TSC's rate and no timer checks 0.60; with the
PIT instead of a calibrated local APIC timer 0.47, which is what is used here. ACPI on or off, bzImage or ELF, CPU model,
less CPUID and no option ROMs make no difference or a worse one; without PIT and without the TSC's rate it does not boot.
Virtio devices speak version 1, as ours do (the default is the legacy interface).
"""

from __future__ import annotations

import socket
import threading

from ..machine import Child, Setup, serve_stream
from ..ours import cmdline

QEMU = "qemu-system-x86_64"


class Qemu:
    """Starts machines of QEMU's. ``tsc_khz``: the host's TSC, which is the guest's; given so that it need not measure.

    QEMU 7.2's own wait for a calibrated local APIC timer is avoided with the PIT while that is faster (``boot``); a
    guest that is to idle gets the local APIC, whose timer need not tick.
    """

    name = "QEMU"
    stream = "/dev/vport0p1"

    def __init__(self, tsc_khz: int) -> None:
        self.tsc_khz = tsc_khz

    def argv(self, setup: Setup, lapic: bool = False, plain: bool = False) -> list[str]:
        line = cmdline(setup)
        if not plain:
            timers = "" if lapic else "nolapic_timer "
            line = f"tsc_early_khz={self.tsc_khz} tsc=reliable no_timer_check {timers}{line}"
        words = [QEMU, "-M", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max", "-m", str(setup.memory_mib)]
        words += ["-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-serial", "stdio"]
        words += ["-global", "virtio-mmio.force-legacy=false"]
        words += ["-kernel", str(setup.kernel), "-initrd", str(setup.initrd), "-append", line]
        if setup.disk:
            read_only = ",readonly=on" if setup.read_only else ""
            words += ["-drive", f"id=d,file={setup.disk},format=raw,if=none,cache=writeback{read_only}"]
            words += ["-device", "virtio-blk-device,drive=d"]
        if setup.stream or setup.console:
            words += ["-device", "virtio-serial-device"]
        if setup.console:
            words += ["-chardev", "file,id=c,path=/dev/null", "-device", "virtconsole,chardev=c"]
        if setup.stream:
            words += ["-chardev", f"socket,id=s,path={setup.stream}", "-device", "virtserialport,chardev=s,nr=1"]
        return words

    def start(self, setup: Setup, lapic: bool = False, plain: bool = False) -> Child:
        if setup.stream:
            setup.stream.unlink(missing_ok=True)
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(setup.stream))
            listener.listen()
            threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return Child(self.argv(setup, lapic, plain))

    @staticmethod
    def _serve(listener: socket.socket) -> None:
        with listener, listener.accept()[0] as peer:
            serve_stream(peer)

"""``microvm boot``: any kernel, with its console on this terminal."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING, Any, Final

from . import options, terminal

if TYPE_CHECKING:
    import argparse

    from ..machine.machine import MicroVM
    from ..machine.outcome import Outcome

ESCAPE: Final = 0x01  # Ctrl-A
CONSOLES: Final = {"serial": "ttyS0", "hvc": "hvc0"}
EXIT_ENDED_BADLY: Final = 1


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "boot",
        help="boot any kernel with its console on this terminal",
        description="Boot a kernel with its console on this terminal, until it powers off or resets. Ctrl-A X ends it.",
    )
    parser.add_argument(
        "--kernel", metavar="KERNEL", required=True, help="a bzImage, an ELF, or a name of `kernel list`"
    )
    parser.add_argument(
        "--initrd", metavar="FILE", action="append", default=[], help="an initial ramdisk; several add up"
    )
    parser.add_argument("--disk", metavar="FILE[,ro]", action="append", default=[], help="a raw disk: vda, vdb, ...")
    parser.add_argument(
        "--append", metavar="ARGS", action="append", default=[], help="added to the kernel command line"
    )
    parser.add_argument("--console", choices=sorted(CONSOLES), default="serial", help="which line (default serial)")
    parser.add_argument("--vsock", metavar="PATH", help="a Unix socket to reach the guest's vsock ports by")
    parser.add_argument("--timeout", metavar="S", help="end the machine after this many seconds, exit code 124")
    parser.add_argument("--verbose", action="store_true", help="say how the machine ended, and its counters")
    options.add_machine_options(parser, memory="256")


def run(args: argparse.Namespace) -> int:
    from ..images import kernels
    from ..machine.config import DiskConfig, MachineConfig
    from ..machine.machine import MicroVM

    options.log_warnings(args.verbose)
    timeout_s = options.seconds("timeout", args.timeout)
    memory_mib, cpus = options.memory_mib(args.memory), options.cpu_count(args.cpus)
    config = MachineConfig(
        kernels.resolve(args.kernel).path,
        initrds=args.initrd,
        cmdline=" ".join([f"console={CONSOLES[args.console]}", "reboot=t", "panic=-1", *args.append]),
        memory_mib=memory_mib,
        cpus=cpus,
        disks=[DiskConfig.parse(disk) for disk in args.disk],
        vsock_path=args.vsock,
        backend=args.backend,
    )
    with MicroVM(config) as vm, contextlib.ExitStack() as stack:
        outcome = _session(vm, stack, args.console, timeout_s)
        if args.verbose:
            _summary(vm, outcome)
    if outcome is None:
        from .dispatch import complain

        complain(f"the machine was ended after {timeout_s:g} s")
        return 124
    return _verdict(outcome)


def _session(vm: MicroVM, stack: contextlib.ExitStack, which: str, timeout_s: float | None) -> Outcome | None:
    """Connect the terminal and wait for the end. None: the time was up."""
    console = vm.console if which == "hvc" else vm.serial
    gone = threading.Event()

    def show(data: bytes) -> None:
        try:
            terminal.write_all(terminal.STDOUT, data)
        except OSError:
            gone.set()
            vm.end("nobody reads the console any more")

    stack.callback(console.on_output(show, replay=True))
    interactive = terminal.is_terminal(terminal.STDIN)
    if interactive:
        stack.enter_context(terminal.raw())
    if which == "hvc" and terminal.is_terminal(terminal.STDOUT):
        console.resize(*terminal.size())
        stack.enter_context(terminal.on_resize(console.resize))
    vm.start()
    if terminal.is_open(terminal.STDIN):
        keys = EscapeFilter(console.write, lambda: vm.end("Ctrl-A X"))
        pump = terminal.InputPump(terminal.STDIN, keys.feed if interactive else console.write)
        stack.callback(pump.close)
        pump.start()
    stack.enter_context(_terminated_by(vm))
    outcome = vm.wait(timeout_s)
    if gone.is_set():
        raise BrokenPipeError
    return outcome


class EscapeFilter:
    """Passes keys on, but for Ctrl-A: then X quits, a second Ctrl-A is a plain one, and anything else is dropped."""

    def __init__(self, pass_on: Any, quit_: Any) -> None:
        self._pass_on = pass_on
        self._quit = quit_
        self._escaped = False

    def feed(self, data: bytes) -> None:
        kept = bytearray()
        for key in data:
            if self._escaped:
                self._escaped = False
                if key in b"xX":
                    self._quit()
                elif key == ESCAPE:
                    kept.append(key)
            elif key == ESCAPE:
                self._escaped = True
            else:
                kept.append(key)
        if kept:
            self._pass_on(bytes(kept))


@contextlib.contextmanager
def _terminated_by(vm: MicroVM) -> Any:
    """SIGTERM and SIGHUP end the machine in order, so that the terminal is restored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None:
            before[number] = signal.signal(number, lambda number, _frame: vm.end(signal.Signals(number).name))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summary(vm: MicroVM, outcome: Outcome | None) -> None:
    from .dispatch import complain

    counters = ", ".join(f"{name} {value}" for name, value in vm.stats().items())
    complain(f"the machine ended: {outcome or 'time was up'}; {counters}")


def _verdict(outcome: Outcome) -> int:
    from ..machine.outcome import End
    from .dispatch import complain

    if outcome.kind in (End.POWERED_OFF, End.RESET):
        return 0
    if outcome.kind == End.STOPPED:
        number = getattr(signal, outcome.detail, None) if outcome.detail.startswith("SIG") else None
        return 128 + number if isinstance(number, int) else 0
    complain(f"the guest {outcome.kind}: {outcome.detail}" if outcome.detail else f"the guest {outcome.kind}")
    return EXIT_ENDED_BADLY

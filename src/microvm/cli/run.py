"""``microvm run``: a command in a fresh microVM, as if it ran here."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from . import options, terminal

if TYPE_CHECKING:
    from ..agent.process import Process
    from ..agent.protocol import Ready
    from ..api import Sandbox
    from ..machine.machine import MicroVM

EXIT_TIMEOUT: Final = 124  # as timeout(1)
EXIT_FAILED: Final = 125  # the sandbox failed, not the command; as env(1), timeout(1) and chroot(1)
EXIT_NOT_EXECUTABLE: Final = 126
EXIT_NOT_FOUND: Final = 127
ENOENT: Final = 2
GUEST_SIGINT: Final = 2
GUEST_SIGPIPE: Final = 13
IMPATIENCE: Final = 3  # so many Ctrl-C ...
IMPATIENCE_S: Final = 2.0  # ... in this time end the machine, whatever the command makes of them
PIPE_GRACE_S: Final = 1.0  # for a command that was told that nobody reads its output
DRAIN_S: Final = 5.0  # for output still on its way when the command has ended
CHUNK: Final = 64 << 10

given: tuple[MicroVM, Ready] | None = None
"""In a worker of the resident zygote: the machine to use, parked."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run",
        usage="microvm run [OPTIONS] [--] COMMAND [ARG]...",
        help="run a command in a fresh microVM",
        description="Run a command in a fresh microVM. Standard streams and signals are passed on, and the exit code "
        "is the command's: 128+N if signal N ended it, 124 after --timeout, 127 if there is no such command, 126 if it "
        "cannot be run, 125 if the sandbox failed. Ctrl-C goes to the command; three in a row end the machine.",
    )
    parser.add_argument("--image", metavar="NAME", default="python", help="an image of `image list` (default python)")
    parser.add_argument(
        "--kernel", metavar="KERNEL", help="a name of `kernel list`, or a file (default: the best there)"
    )
    options.add_machine_options(parser, memory="256")
    parser.add_argument(
        "--env", metavar="NAME=VALUE", action="append", default=[], help="set a variable; NAME passes ours"
    )
    parser.add_argument("--workdir", metavar="DIR", help="the working directory in the guest")
    parser.add_argument("--user", metavar="USER[:GROUP]", help="whom to run it as (default root)")
    parser.add_argument("--timeout", metavar="S", help="end the command after so many seconds, exit code 124")
    parser.add_argument("--cold", action="store_true", help="boot the machine instead of restoring it")
    parser.add_argument("--frozen-clock", action="store_true", help="keep the clock where the restored machine's stood")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass standard input on even from a terminal")
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show the guest's console and how long the boot took"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from ..api import Sandbox
    from ..errors import ConfigError, ExecError, ExecTimeout, MicroVMError
    from .dispatch import complain

    if not args.command:
        raise ConfigError("command line", "", "there is no command to run: microvm run -- COMMAND [ARG]...")
    options.log_warnings(args.verbose)
    timeout = options.seconds("timeout", args.timeout)
    sandbox = Sandbox(
        args.image,
        kernel=args.kernel,
        memory_mib=options.memory_mib(args.memory),
        cpus=options.cpu_count(args.cpus),
        backend=args.backend,
        env=options.environment(args.env),
        workdir=args.workdir,
        user=args.user,
        cold=args.cold,
        frozen_clock=args.frozen_clock,
        isolated=False,  # this process is nobody else's
        _given=given,
    )
    if args.verbose:
        sandbox.on_console(lambda data: terminal.write_all(terminal.STDERR, data))
    try:
        with sandbox:
            if args.verbose:
                complain(f"ready after {sandbox.boot_seconds:.2f} s on {sandbox.backend}")
            return _Session(sandbox, args, timeout).run()
    except ExecTimeout:
        complain(f"{args.command[0]} did not end within {timeout:g} s")
        return EXIT_TIMEOUT
    except ExecError as error:
        complain(str(error))
        code = getattr(error, "code", 0)
        return EXIT_NOT_FOUND if code == ENOENT else EXIT_NOT_EXECUTABLE if code else EXIT_FAILED
    finally:
        if (
            given is None
            and not os.environ.get("MICROVM_NO_RESIDENT")
            and not (args.cold or args.frozen_clock or args.verbose)
        ):
            with contextlib.suppress(MicroVMError, OSError):
                _leave_resident(sandbox)


def _leave_resident(sandbox: Sandbox) -> None:
    """For the next time: start the resident zygote that was missed, and note where to find it."""
    from ..workers import client, template
    from .resident import remember

    client.start_resident(template.decide(sandbox.config), "microvm.cli.resident")
    remember(sandbox, sys.argv[1:])


def follow(sandbox: Sandbox, command: list[str], *, leave_running: bool = False) -> int:
    """Run a command in a booted sandbox with our standard streams and signals; its exit code as ``run``'s."""
    from ..errors import ExecError
    from .dispatch import complain

    args = argparse.Namespace(command=command, interactive=False, tty=False, leave_running=leave_running)
    try:
        return _Session(sandbox, args, None).run()
    except ExecError as error:
        complain(str(error))
        return error.exit_code if error.code else EXIT_FAILED


class _Session:
    """One command and the streams of this process."""

    def __init__(self, sandbox: Sandbox, args: argparse.Namespace, timeout: float | None) -> None:
        self.sandbox = sandbox
        self.args = args
        self.timeout = timeout
        self.process: Process | None = None
        self.interrupts: list[float] = []
        self.gone = threading.Event()  # nobody reads our output any more

    def run(self) -> int:
        from ..agent.client import DEVNULL, PIPE

        args = self.args
        wants_input = terminal.is_open(terminal.STDIN) and (
            args.interactive or args.tty or not terminal.is_terminal(terminal.STDIN)
        )
        raw = args.tty and terminal.is_terminal(terminal.STDIN)
        columns, rows = terminal.size()
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(
                self.sandbox.start(
                    args.command,
                    stdin=PIPE if wants_input else DEVNULL,
                    pty=(rows, columns) if args.tty else None,
                    timeout=self.timeout,
                    leave_running=getattr(args, "leave_running", False),
                )
            )
            self.process = process
            stack.enter_context(self._signals())
            if raw:
                stack.enter_context(terminal.raw())
            if args.tty:
                stack.enter_context(terminal.on_resize(lambda columns, rows: process.resize(rows, columns)))
            pumps = [self._pump(process.stdout, terminal.STDOUT), self._pump(process.stderr, terminal.STDERR)]
            if wants_input:
                keys = terminal.InputPump(terminal.STDIN, self._typed)
                stack.callback(keys.close)
                keys.start()
            code = self._wait(process)
            for pump in pumps:
                if pump is not None:
                    pump.join(DRAIN_S)
        if process.timed_out:
            from .dispatch import complain

            complain(f"{args.command[0]} did not end within {self.timeout:g} s")
            return EXIT_TIMEOUT
        return code if code >= 0 else 128 - code

    def _wait(self, process: Process) -> int:
        """Wait in slices: a signal handler runs between them on every system."""
        told = 0.0
        while True:
            try:
                return process.wait(0.5 if not self.gone.is_set() else 0.1)
            except TimeoutError:
                if self.gone.is_set():
                    # A local command would be ended by SIGPIPE, or see EPIPE and end by itself.
                    if not told:
                        told = time.monotonic()
                    elif time.monotonic() - told > PIPE_GRACE_S:
                        process.kill()

    def _pump(self, stream: BinaryIO | None, fd: int) -> threading.Thread | None:
        if stream is None:
            return None
        thread = threading.Thread(target=self._copy, args=(stream, fd), name=f"output-{fd}", daemon=True)
        thread.start()
        return thread

    def _copy(self, stream: BinaryIO, fd: int) -> None:
        from ..errors import MicroVMError

        read = getattr(stream, "read1", stream.read)
        try:
            while data := read(CHUNK):
                terminal.write_all(fd, data)
        except OSError:
            self.gone.set()
            if self.process is not None:
                with contextlib.suppress(MicroVMError):
                    self.process.send_signal(GUEST_SIGPIPE)
        except (MicroVMError, ValueError):
            pass  # the guest is gone: the wait says so

    def _typed(self, data: bytes) -> None:
        from ..errors import MicroVMError

        assert self.process is not None
        stdin = self.process.stdin
        if stdin is None:
            return
        try:
            if data:
                stdin.write(data)
            else:
                stdin.close()
        except (MicroVMError, ValueError) as error:
            raise BrokenPipeError from error  # ends the pump

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Pass signals on to the command. Main thread only, like all signal handling in Python."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGBREAK"]
        numbers = [int(getattr(signal, name)) for name in names if hasattr(signal, name)]
        before = {number: signal.signal(number, self._signalled) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        assert self.process is not None
        now = time.monotonic()
        if number == signal.SIGINT:
            self.interrupts = [at for at in self.interrupts if now - at < IMPATIENCE_S] + [now]
            if len(self.interrupts) >= IMPATIENCE:
                raise KeyboardInterrupt
        # A handler must not block on the process's locks, which the interrupted code may hold.
        guest_number = GUEST_SIGINT if sys.platform == "win32" else number
        threading.Thread(target=self._forward, args=(guest_number,), daemon=True).start()

    def _forward(self, number: int) -> None:
        from ..errors import MicroVMError

        assert self.process is not None
        with contextlib.suppress(MicroVMError, OSError):
            self.process.send_signal(number)

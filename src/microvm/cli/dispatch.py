"""Dispatch and the one place where errors become a sentence and an exit code.

Each subcommand is a module of this package with ``add_parser(subparsers)``, which adds exactly one parser under its
own name, and ``run(args) -> int``. Only the module that is used is imported, so ``microvm --version`` costs little
more than an interpreter start.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from .._version import __version__

if TYPE_CHECKING:
    import argparse

COMMANDS: Final = {
    "run": "run a command in a fresh microVM",
    "boot": "boot any kernel with its console on this terminal",
    "checkpoint": "save moments of a sandbox and go on from them",
    "doctor": "say what works on this machine and what to enable",
    "selftest": "ask a backend what it does on this machine, for a report",
    "image": "build, list and remove root filesystems",
    "kernel": "fetch, build and list kernels",
}

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2
EXIT_UNAVAILABLE: Final = 69  # EX_UNAVAILABLE of <sysexits.h>
EXIT_INTERNAL: Final = 70  # EX_SOFTWARE
EXIT_SIGNAL: Final = 128
ENOMEM: Final = 12
SIGINT: Final = 2
SIGPIPE: Final = 13
REPORT: Final = "this is a bug in microvm, please report it with the command you ran (MICROVM_DEBUG=1 shows where)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Never raises, but for ``SystemExit`` from argparse."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        _keep_standard_streams()
    if arguments in (["--version"], ["-V"]):
        return _print_version()
    if arguments[:1] == ["run"] and argv is None:
        from .fast import attempt

        code = attempt(arguments)
        if code is not None:
            return code
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return EXIT_SIGNAL + SIGINT
    except BrokenPipeError:
        _forget_stdout()
        return EXIT_SIGNAL + SIGPIPE
    except Exception as error:  # the last line of defence: a person reads a sentence, not a traceback
        if os.environ.get("MICROVM_DEBUG") == "1":
            raise
        message, code = explain(error)
        complain(message)
        return code


def _keep_standard_streams() -> None:
    """Put /dev/null in the place of a standard stream that is closed, or the next file opened would become it.

    Opened for reading, so that a write to standard output fails as it did when closed.
    """
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY)  # takes the lowest number that is free: this one


def explain(error: Exception) -> tuple[str, int]:
    """The sentence and the exit code for an error that reached the top."""
    from .. import errors

    text = " ".join(str(error).split())
    if isinstance(error, errors.BackendUnavailable):
        return text, EXIT_UNAVAILABLE
    if isinstance(error, errors.ConfigError | errors.BootError):
        return text, EXIT_USAGE
    if isinstance(error, errors.InternalError):
        return f"{text}: {REPORT}", EXIT_INTERNAL
    if isinstance(error, errors.MicroVMError):
        return text, EXIT_FAILURE
    if isinstance(error, MemoryError | OSError):
        from ..hypervisor.limits import withheld

        out = withheld("", ENOMEM if isinstance(error, MemoryError) else error.errno or 0)
        if out is not None:
            return str(out), EXIT_UNAVAILABLE
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror.lower()}", EXIT_FAILURE
    return f"{type(error).__name__}: {text or 'no message'}: {REPORT}", EXIT_INTERNAL


def complain(message: str) -> None:
    """One line on standard error, if there is still someone to read it."""
    try:
        if sys.stderr is not None:
            print(f"microvm: {message}", file=sys.stderr, flush=True)
    except OSError:
        pass


def _print_version() -> int:
    try:
        print(f"microvm {__version__}", flush=True)
    except BrokenPipeError:
        _forget_stdout()
    return 0


def _forget_stdout() -> None:
    """Keep the interpreter from writing to a closed pipe once more when it exits."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass


def _dispatch(arguments: list[str]) -> int:
    arguments, tail = _split(arguments)
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise _usage(f"there is no command {name!r}: use one of {', '.join(COMMANDS)}")
    parser, module = _parser(name)
    args = parser.parse_args(arguments)
    if module is None:
        parser.print_help()
        return EXIT_USAGE if name is None and not arguments else 0
    if tail is not None:
        if not hasattr(args, "command"):
            raise _usage(f"microvm {name} takes no command after --")
        args.command = [*args.command, "--", *tail] if args.command else tail
    return int(module.run(args))


def _split(arguments: list[str]) -> tuple[list[str], list[str] | None]:
    """Cut at the first ``--``: what follows belongs to the guest and argparse never sees it."""
    if "--" not in arguments:
        return arguments, None
    cut = arguments.index("--")
    return arguments[:cut], arguments[cut + 1 :]


def _usage(sentence: str) -> Exception:
    from ..errors import ConfigError

    return ConfigError("command line", "", sentence)


def preload(name: str) -> None:
    """Import what the subcommand ``name`` is parsed with, in a process that is going to be copied."""
    _parser(name)


def _parser(used: str | None) -> tuple[argparse.ArgumentParser, Any]:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            complain(f"{message} (see {self.prog} --help)")
            sys.exit(EXIT_USAGE)

    parser = Parser(prog="microvm", description="Run commands and kernels in microVMs.", allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=f"microvm {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="subcommand")
    module: Any = None
    for name, summary in COMMANDS.items():
        if name == used:
            import importlib

            module = importlib.import_module(f".{name}", __package__)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary, add_help=False)
    return parser, module

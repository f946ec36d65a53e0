"""The command line's frame: dispatch, exit codes, one sentence for every error."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import types

import pytest

from microvm import __version__
from microvm.cli import dispatch, main
from microvm.errors import (
    BackendUnavailable,
    BootError,
    ConfigError,
    ExecError,
    HostError,
    InternalError,
    StateError,
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A subcommand ``fake`` whose ``run`` is whatever the test sets."""
    module = types.ModuleType("microvm.cli.fake")
    seen = types.SimpleNamespace(run=lambda args: 0, args=None)

    def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        parser = subparsers.add_parser("fake")
        parser.add_argument("--flag", action="store_true")
        parser.add_argument("command", nargs=argparse.REMAINDER)

    def run(args: argparse.Namespace) -> int:
        seen.args = args
        return seen.run(args)

    module.add_parser = add_parser  # type: ignore[attr-defined]
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "microvm.cli.fake", module)
    monkeypatch.setitem(dispatch.COMMANDS, "fake", "for tests")
    monkeypatch.delenv("MICROVM_DEBUG", raising=False)
    return seen


def raising(error: BaseException) -> object:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("memory", "0 MiB", "a machine needs at least 64 MiB"), 2, "memory 0 MiB: a machine needs"),
        (BootError("the kernel is truncated"), 2, "the kernel is truncated"),
        (BackendUnavailable("", 0, "no backend works", "load the kvm module"), 69, "(load the kvm module)"),
        (InternalError("a list was empty"), 70, "please report it"),
        (KeyError("x"), 70, "please report it"),
        (StateError("not running"), 1, "not running"),
        (ExecError("no such command"), 1, "no such command"),
        (HostError("mmap", 12, "out of memory"), 1, "mmap: out of memory"),
        (FileNotFoundError(2, "No such file or directory", "x.img"), 1, "x.img: no such file or directory"),
        (MemoryError(), 69, "cannot allocate memory (free memory"),
        (OSError(24, "Too many open files"), 69, "too many open files (raise the limit on open files (ulimit -n)"),
        (ValueError("two\nlines"), 70, "two lines"),
    ],
)
def test_error_is_one_sentence_and_an_exit_code(
    command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str], error: Exception, code: int, text: str
) -> None:
    command.run = raising(error)
    assert main(["fake"]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("microvm: ")
    assert printed.err.count("\n") == 1
    assert text in printed.err


def test_debug_shows_the_traceback(command: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_DEBUG", "1")
    command.run = raising(KeyError("x"))
    with pytest.raises(KeyError):
        main(["fake"])


def test_interrupt_exits_as_a_shell_reports_it(command: types.SimpleNamespace) -> None:
    command.run = raising(KeyboardInterrupt())
    assert main(["fake"]) == 130


def test_exit_code_of_the_command_is_passed_on(command: types.SimpleNamespace) -> None:
    command.run = lambda args: 7
    assert main(["fake"]) == 7


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--", "ls", "-l"], ["ls", "-l"]),
        (["ls", "-l"], ["ls", "-l"]),
        (["--flag", "--", "ls", "--flag"], ["ls", "--flag"]),
        (["--", "sh", "--", "x"], ["sh", "--", "x"]),
        (["git", "log", "--", "file"], ["git", "log", "--", "file"]),
        (["--"], []),
        ([], []),
    ],
)
def test_words_after_the_separator_belong_to_the_guest(
    command: types.SimpleNamespace, arguments: list[str], expected: list[str]
) -> None:
    assert main(["fake", *arguments]) == 0
    assert command.args.command == expected


def test_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frobnicate"]) == 2
    assert "there is no command 'frobnicate'" in capsys.readouterr().err


def test_unknown_option_is_one_line(command: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["fake", "--no-such"])
    assert caught.value.code == 2 or command.args is not None
    assert capsys.readouterr().err.count("\n") <= 1


def test_no_arguments_print_the_help_and_fail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("run", "boot", "doctor", "image", "kernel"))


def run_python(*arguments: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, **kwargs)  # type: ignore[call-overload, no-any-return]


def test_version_is_printed_without_loading_anything() -> None:
    done = run_python("-X", "importtime", "-m", "microvm", "--version")
    assert done.stdout == f"microvm {__version__}\n"
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"argparse", "asyncio", "ctypes", "socket", "microvm.errors", "microvm.machine"}


def test_closed_stdout_is_no_traceback() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "microvm", "--help"], stdout=closed, stderr=subprocess.PIPE, timeout=60, check=False
        )
    assert b"Traceback" not in done.stderr

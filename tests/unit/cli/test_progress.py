from __future__ import annotations

import io

from microvm.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_each_step_is_a_plain_line() -> None:
    out = io.StringIO()
    with Bar(out) as progress:
        progress("unpacking", None)
        for number in range(100):
            progress("compiling", number / 100)
        progress("ready", 1.0)
    assert out.getvalue() == "unpacking\ncompiling 0%\nready\n"


def test_a_terminal_has_one_line_a_step() -> None:
    out = Terminal()
    with Bar(out) as progress:
        progress("unpacking", None)
        progress("compiling", 0.5)
    assert out.getvalue() == "\runpacking\ncompiling 50%\n"

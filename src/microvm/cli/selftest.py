"""``microvm selftest``: what a backend does on this machine, for a report to us."""

from __future__ import annotations

import dataclasses
import json
import platform
from typing import TYPE_CHECKING, Any

from .._version import __version__

if TYPE_CHECKING:
    import argparse

EXIT_FAILURE = 1


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "selftest",
        help="ask a backend what it does on this machine, for a report",
        description="Run tiny guests on a backend and say what was seen. Takes a few seconds. The exit code is 69 if "
        "the backend cannot be used, 1 if something works otherwise than it should.",
    )
    parser.add_argument("--backend", default="auto", metavar="NAME", help="auto (the default) or a backend's name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from ..hypervisor import questions, select

    backend = select.choose(args.backend)
    answers = questions.ask(backend)
    host = f"{platform.system()} {platform.release()} {platform.version()} {platform.machine()}"
    head = {"version": __version__, "python": platform.python_version(), "host": host, "backend": backend.name}
    head["processor"] = platform.processor()
    if args.json:
        print(json.dumps(head | {"answers": [dataclasses.asdict(answer) for answer in answers]}, indent=2))
    else:
        print(f"microvm {__version__}, Python {head['python']}, {host}\nbackend {backend.name}")
        for answer in answers:
            mark = {True: "ok", False: "NO", None: "--"}[answer.good]
            print(f"{mark} {answer.question:17} {answer.answer}")
    return EXIT_FAILURE if any(answer.good is False for answer in answers) else 0

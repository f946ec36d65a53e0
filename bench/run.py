"""The benchmarks: `python -m bench [--only NAME]... [--rounds N] [--json FILE]`.

Every figure is the median of ROUNDS runs, ours and QEMU's in turns, in the same minutes, on the same kernel with the
same initial ramdisk and the same command line but for what a platform needs. Nothing is asserted. The goals are those
of the project; a goal is missed when the figure is above it.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import microvm
from bench.guestside import GuestSide
from bench.measures import MEASURES, Context, Figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench", description="measure, side by side with QEMU")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="leave out the others; repeatable")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, ours and QEMU's in turns (default 5)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    # An installed package has its bytecode; a child that must compile the sources each time measures that instead.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    compileall.compile_dir(str(Path(microvm.__file__).parent), quiet=2)
    compileall.compile_dir(str(Path(__file__).parent), quiet=2)
    guest = GuestSide()
    figures: list[Figure] = []
    load_before = os.getloadavg()
    started = time.time()
    try:
        context = Context(guest, max(1, args.rounds), lambda text: print(f"==> {text}", file=sys.stderr, flush=True))
        for name in args.only or MEASURES:
            context.say(name)
            try:
                figures += MEASURES[name](context)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                print(f"{name}: {error}", file=sys.stderr)
                figures.append(Figure(name, "failed", note=str(error).splitlines()[0]))
    finally:
        guest.close()
    print(table(figures))
    host = {
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load_before,
        "load_after": os.getloadavg(),
        "seconds": round(time.time() - started, 1),
        "rounds": args.rounds,
    }
    print(f"load {load_before[0]:.1f} before, {os.getloadavg()[0]:.1f} after, on {os.cpu_count()} CPUs")
    if args.json:
        document = {"host": host, "figures": [figure.as_dict() for figure in figures]}
        Path(args.json).write_text(json.dumps(document, indent=1) + "\n")
    return 0


def table(figures: Sequence[Figure]) -> str:
    rows = [("measure", "unit", "ours", "QEMU", "ratio", "goal", "", "note")]
    for figure in figures:
        rows.append(
            (
                figure.name,
                figure.unit,
                show(figure.ours),
                show(figure.peer),
                show(figure.ratio),
                figure.goal_text,
                {True: "met", False: "MISSED", None: ""}[figure.met],
                figure.note,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(7)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, 1, 5, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, [*widths, 0], strict=True))
        ).rstrip()
        for row in rows
    )


def show(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    raise SystemExit(main())

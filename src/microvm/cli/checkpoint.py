"""``microvm checkpoint``: moments of a sandbox to come back to, as a tree."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import options


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "checkpoint",
        help="save moments of a sandbox and go on from them",
        description="Checkpoints hold a sandbox's memory, files and running processes. Each may follow another, so "
        "they form trees. Removing one keeps what others have from it.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    create = actions.add_parser("create", help="run a command and save the sandbox after it")
    create.add_argument("name", metavar="NAME")
    create.add_argument("--from", dest="parent", metavar="NAME", help="go on from this checkpoint")
    create.add_argument("--image", metavar="NAME", default="python", help="without --from: the image (default python)")
    create.add_argument("--kernel", metavar="KERNEL", help="without --from: the kernel")
    options.add_machine_options(create, memory="256")
    create.add_argument("command", nargs="*", metavar="COMMAND", help="what to do first")
    apply = actions.add_parser("apply", help="run a command in a sandbox that goes on from a checkpoint")
    apply.add_argument("name", metavar="NAME")
    apply.add_argument("--frozen-clock", action="store_true", help="keep the clock where it stood")
    apply.add_argument("command", nargs="*", metavar="COMMAND")
    actions.add_parser("list", help="all checkpoints, oldest first")
    actions.add_parser("tree", help="what follows what")
    rename = actions.add_parser("rename", help="give a checkpoint another name")
    rename.add_argument("name", metavar="NAME")
    rename.add_argument("new", metavar="NEW")
    for name, text in (("rm", "remove a checkpoint"), ("merge", "make one whole, without those it builds on")):
        actions.add_parser(name, help=text).add_argument("name", metavar="NAME")
    export = actions.add_parser("export", help="write a checkpoint into a file of its own")
    export.add_argument("name", metavar="NAME")
    export.add_argument("file", metavar="FILE", type=Path)
    import_ = actions.add_parser("import", help="take in an exported file")
    import_.add_argument("name", metavar="NAME")
    import_.add_argument("file", metavar="FILE", type=Path)
    import_.add_argument("--trust", action="store_true", help="believe a file that another user or machine wrote")


def run(args: argparse.Namespace) -> int:
    from ..snapshot.tree import Tree

    tree = Tree()
    if args.action == "create":
        return _create(args)
    if args.action == "apply":
        return _apply(args)
    if args.action == "list":
        for node in tree.nodes():
            print(f"{node.name:30}  {_when(node.created_ns)}  {node.memory_mib:6} MiB RAM  {node.size >> 10:8} KiB")
    elif args.action == "tree":
        for line in tree.draw():
            print(line)
    elif args.action == "rename":
        tree.rename(args.name, args.new)
    elif args.action == "rm":
        tree.remove(args.name)
    elif args.action == "merge":
        tree.merge(args.name)
    elif args.action == "export":
        tree.export(args.name, args.file)
    else:
        tree.import_(args.name, args.file, trust=args.trust)
    return 0


def _create(args: argparse.Namespace) -> int:
    from ..api import Sandbox
    from ..snapshot.tree import Tree

    tree = Tree()
    tree.new_path(args.name)  # a name that is taken is said before anything runs
    if args.parent is not None:
        sandbox = Sandbox.from_snapshot(tree.find(args.parent).path, isolated=False)
    else:
        sandbox = Sandbox(
            args.image,
            kernel=args.kernel,
            memory_mib=options.memory_mib(args.memory),
            cpus=options.cpu_count(args.cpus),
            backend=args.backend,
            isolated=False,
        )
    with sandbox:
        code = _command(sandbox, args.command, leave=True) if args.command else 0
        if code == 0:
            sandbox.checkpoint(args.name)
    return code


def _apply(args: argparse.Namespace) -> int:
    from ..api import Sandbox
    from ..snapshot.tree import Tree

    path = Tree().find(args.name).path
    with Sandbox.from_snapshot(path, isolated=False, frozen_clock=args.frozen_clock) as sandbox:
        return _command(sandbox, args.command or ["/bin/sh"])


def _command(sandbox: Any, command: list[str], leave: bool = False) -> int:
    from .run import follow

    return follow(sandbox, command, leave_running=leave)


def _when(created_ns: int) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(created_ns / 1e9))

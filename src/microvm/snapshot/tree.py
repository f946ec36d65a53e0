"""Checkpoints: named snapshots in a directory of the user's, each after another or the first of a tree.

    <data>/checkpoints/<id>.mvs       the snapshot; it may be a difference against another
    <data>/checkpoints/<name>.name    the id that a name stands for

Two relations link them. ``after`` is the story: the checkpoint the machine had last passed, which is what the tree
shows. The difference's parent is storage. Every change is one rename, or a series of which each leaves all checkpoints
whole; a crash leaves at most a file that nothing names, and the next change removes it.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .._os.filelock import file_lock
from ..errors import ConfigError, SnapshotError
from . import key, ranges
from .format import Parent, Snapshot, write

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}\Z")
_STRAY: Final = "new-"


@dataclass(frozen=True, slots=True)
class Node:
    """A checkpoint. ``size`` is its own bytes on disk; ``builds_on`` the id of what it is a difference against."""

    name: str
    id: str
    path: Path
    after: str | None
    builds_on: str | None
    created_ns: int
    memory_mib: int
    size: int


class Tree:
    """The checkpoints in ``root``, by default the user's. Any number of processes may use it."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = default_root() if root is None else root

    def nodes(self) -> list[Node]:
        """All checkpoints, oldest first. Files that are none of ours any more are left out."""
        found = []
        for entry in self.root.glob("*.name"):
            with contextlib.suppress(SnapshotError, OSError):
                found.append(self._node(entry.stem))
        return sorted(found, key=lambda node: (node.created_ns, node.name))

    def find(self, name: str) -> Node:
        """The checkpoint called ``name``. Raises ConfigError, SnapshotError if its file is damaged."""
        check_name(name)
        try:
            return self._node(name)
        except OSError:
            raise ConfigError("checkpoint", name, "there is none of that name (`microvm checkpoint list`)") from None

    def new_path(self, name: str) -> Path:
        """Where to save a checkpoint that `add` will call ``name``. Raises ConfigError if the name is taken."""
        check_name(name)
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self._name_path(name).exists():
            raise ConfigError("checkpoint", name, "there is one of that name already")
        return self.root / f"{_STRAY}{os.getpid()}-{os.urandom(4).hex()}.mvs"

    def add(self, name: str, saved: Path) -> Node:
        """Take in the snapshot that was saved at `new_path`. Raises ConfigError, SnapshotError."""
        with self._locked():
            with Snapshot.open(saved) as snapshot:
                identity = snapshot.id
            final = self._path(identity)
            os.replace(saved, final)
            self._write_name(name, identity, new=True)
            self._sweep()
        return self.find(name)

    def rename(self, old: str, new: str) -> None:
        """Raises ConfigError if there is no such checkpoint, or the new name is taken."""
        check_name(new)
        with self._locked():
            node = self.find(old)
            if self._name_path(new).exists():
                raise ConfigError("checkpoint", new, "there is one of that name already")
            os.rename(self._name_path(node.name), self._name_path(new))

    def remove(self, name: str) -> None:
        """Remove a checkpoint; those that build on it take its differences in, and follow what it followed."""
        with self._locked():
            node = self.find(name)
            for other in self.nodes():
                if node.id in (other.builds_on, other.after):
                    self._rewrite(other, skip=node)
            self._name_path(name).unlink()
            self._path(node.id).unlink()
            self._sweep()

    def merge(self, name: str) -> None:
        """Have a checkpoint take in all it builds on, so that it is whole in one file."""
        with self._locked():
            node = self.find(name)
            if node.builds_on is not None:
                self._rewrite(node, whole=True)

    def export(self, name: str, path: Path) -> None:
        """Write a checkpoint, whole, into a file of its own."""
        with Snapshot.open(self.find(name).path, verify=True) as snapshot:
            _copy(snapshot, path, snapshot.pages, None, snapshot.id)

    def import_(self, name: str, path: Path, *, trust: bool = False) -> Node:
        """Take in an exported file. One of another user is refused, unless ``trust`` says that it is to be believed.

        A file can hold any state of a machine: trust those you would run programs from. Raises SnapshotError.
        """
        saved = self.new_path(name)
        secret = None if not trust else b""
        try:
            with Snapshot.open(path, secret=secret, verify=True) as snapshot:
                if self._path(snapshot.id).exists():
                    raise ConfigError("checkpoint", str(path), "is here already, under another name")
                description = {**snapshot.description, "note": {**_note(snapshot), "after": None}}
                _copy(snapshot, saved, snapshot.pages, None, snapshot.id, description)
            return self.add(name, saved)
        finally:
            with contextlib.suppress(OSError):
                saved.unlink()

    def draw(self) -> list[str]:
        """The tree, a line a checkpoint."""
        nodes = self.nodes()
        known = {node.id for node in nodes}
        below: dict[str | None, list[Node]] = {}
        for node in nodes:
            below.setdefault(node.after if node.after in known else None, []).append(node)
        lines: list[str] = []

        def show(node: Node, lead: str, mark: str, follow: str) -> None:
            lines.append(f"{lead}{mark}{node.name}")
            children = below.get(node.id, [])
            for index, child in enumerate(children):
                last = index == len(children) - 1
                show(child, lead + follow, "└─ " if last else "├─ ", "   " if last else "│  ")

        for node in below.get(None, []):
            show(node, "", "", "")
        return lines

    def _node(self, name: str) -> Node:
        identity = self._name_path(name).read_text().strip()
        path = self._path(identity)
        with Snapshot.open(path) as snapshot:
            note = _note(snapshot)
            after = note.get("after")
            return Node(
                name=name,
                id=snapshot.id,
                path=path,
                after=after if isinstance(after, str) else None,
                builds_on=None if snapshot.parent is None else snapshot.parent.id,
                created_ns=int(snapshot.description.get("created_ns", 0)),
                memory_mib=snapshot.header.memory_size >> 20,
                size=getattr(path.stat(), "st_blocks", path.stat().st_size // 512) * 512,
            )

    def _rewrite(self, node: Node, skip: Node | None = None, whole: bool = False) -> None:
        """Write a checkpoint anew, without what it has from ``skip``; its memory and id stay."""
        with Snapshot.open(node.path) as snapshot:
            note = _note(snapshot)
            if skip is not None and note.get("after") == skip.id:
                note = {**note, "after": skip.after}
            parent, pages = snapshot.parent, snapshot.own
            if whole:
                parent, pages = None, snapshot.pages
            elif skip is not None and parent is not None and parent.id == skip.id:
                pages = ranges.merge(pages, parent.own)
                parent = parent.parent
            base = None if parent is None else Parent(parent.id, parent.path)
            _copy(snapshot, node.path, pages, base, node.id, {**snapshot.description, "note": note})

    def _path(self, identity: str) -> Path:
        if not re.fullmatch("[0-9a-f]{32}", identity):
            raise SnapshotError(f"a checkpoint's name in {self.root} is damaged")
        return self.root / f"{identity}.mvs"

    def _name_path(self, name: str) -> Path:
        return self.root / f"{name}.name"

    def _write_name(self, name: str, identity: str, new: bool) -> None:
        temporary = self.root / f".{name}.{os.getpid()}"
        temporary.write_text(identity + "\n")
        try:
            if new and self._name_path(name).exists():
                raise ConfigError("checkpoint", name, "there is one of that name already")
            os.replace(temporary, self._name_path(name))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _sweep(self) -> None:
        """Remove snapshots that no name stands for. With the lock; one that is being saved is not in the way."""
        named = {entry.read_text().strip() for entry in self.root.glob("*.name")}
        for path in self.root.glob("*.mvs"):
            if path.stem not in named and not path.name.startswith(_STRAY):
                with contextlib.suppress(OSError):
                    path.unlink()

    def _locked(self) -> contextlib.AbstractContextManager[bool]:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        return file_lock(self.root / "lock", poll_s=0.05)


def default_root() -> Path:
    """``$MICROVM_DATA/checkpoints``, or below ``$XDG_DATA_HOME`` (``%LOCALAPPDATA%``) or ``~/.local/share``."""
    if chosen := os.environ.get("MICROVM_DATA"):
        return Path(chosen) / "checkpoints"
    for variable in ("XDG_DATA_HOME", "LOCALAPPDATA"):
        if base := os.environ.get(variable):
            return Path(base) / "microvm" / "checkpoints"
    return Path.home() / ".local" / "share" / "microvm" / "checkpoints"


def check_name(name: str) -> None:
    """Raises ConfigError for what cannot be a checkpoint's name."""
    if not NAME.match(name):
        raise ConfigError("checkpoint", repr(name), "a name has letters, digits and . _ + -, at most 100")


def _note(snapshot: Snapshot) -> dict[str, Any]:
    note = snapshot.description.get("note")
    return note if isinstance(note, dict) else {}


def _copy(
    snapshot: Snapshot,
    path: Path,
    pages: ranges.Ranges,
    parent: Parent | None,
    identity: str,
    description: dict[str, Any] | None = None,
) -> None:
    fields = dict(snapshot.description if description is None else description)
    mapping = snapshot.map()
    with mapping, memoryview(mapping) as memory:
        write(path, fields, memory, pages, parent=parent, secret=key.load(), identity=identity)

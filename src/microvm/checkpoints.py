"""Checkpoints of sandboxes: points to come back to, with memory and running processes.

with Sandbox() as sandbox:
    sandbox.run("pip-like setup work")
    ready = sandbox.checkpoint("ready")
for attempt in ready.fork(3): ...
"""

from __future__ import annotations

from pathlib import Path

from .api import Sandbox
from .errors import MicroVMError
from .snapshot.tree import Node, Tree


class Checkpoint:
    """A named point of a sandbox's life. Made by `Sandbox.checkpoint`, or found by its name with `find`."""

    def __init__(self, node: Node, tree: Tree) -> None:
        self._node = node
        self._tree = tree

    @classmethod
    def find(cls, name: str, root: Path | None = None) -> Checkpoint:
        """The checkpoint of that name. Raises ConfigError."""
        tree = Tree(root)
        return cls(tree.find(name), tree)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}>"

    @property
    def name(self) -> str:
        """Its name when it was found or made."""
        return self._node.name

    @property
    def node(self) -> Node:
        """What there is to know of it."""
        return self._node

    def restore(self, *, isolated: bool = True, frozen_clock: bool = False) -> Sandbox:
        """A sandbox that goes on from here, booted. The checkpoint stays as it is; the caller closes the sandbox.

        Raises SnapshotError where it cannot be restored.
        """
        sandbox = Sandbox.from_snapshot(self._node.path, isolated=isolated, frozen_clock=frozen_clock)
        sandbox.boot()
        return sandbox

    def fork(self, count: int = 1) -> list[Sandbox | Exception]:
        """So many sandboxes that go on from here; one that could not be made is its exception instead."""
        with self.restore() as first:
            return first.fork(count)

    def remove(self) -> None:
        """Remove it; checkpoints that build on it keep all they have."""
        self._tree.remove(self.name)


def create(sandbox: Sandbox, name: str, root: Path | None = None) -> Checkpoint:
    """Save a running sandbox as a checkpoint; it goes on. Raises ConfigError if the name is taken."""
    tree = Tree(root)
    path = tree.new_path(name)
    try:
        sandbox.snapshot(path, difference_in=tree.root, after=sandbox.last_checkpoint)
        node = tree.add(name, path)
    except MicroVMError:
        path.unlink(missing_ok=True)
        raise
    sandbox.last_checkpoint = node.id
    return Checkpoint(node, tree)

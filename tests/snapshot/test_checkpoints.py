"""Checkpoints: a tree of moments, kept whole whatever is removed from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from microvm import Sandbox
from microvm.checkpoints import Checkpoint
from microvm.errors import ConfigError, SnapshotError
from microvm.snapshot.tree import Tree

pytestmark = [pytest.mark.boots, pytest.mark.timeout(180)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICROVM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def chain(guests: str, data: Path) -> Tree:
    """one, after it two and side, after two three."""
    with Sandbox(guests, memory_mib=128) as sandbox:
        sandbox.run("echo 1 > /tmp/log")
        one = sandbox.checkpoint("one")
    with one.restore() as sandbox:
        sandbox.run("echo 2 >> /tmp/log")
        two = sandbox.checkpoint("two")
    with one.restore() as sandbox:
        sandbox.run("echo side >> /tmp/log")
        sandbox.checkpoint("side")
    with two.restore() as sandbox:
        sandbox.run("echo 3 >> /tmp/log")
        sandbox.checkpoint("three")
    return Tree()


def log(name: str) -> list[str]:
    with Checkpoint.find(name).restore() as sandbox:
        return sandbox.run("cat /tmp/log", check=True).stdout_text.split()


def test_tree_of_differences(chain: Tree) -> None:
    nodes = {node.name: node for node in chain.nodes()}
    assert list(nodes) == ["one", "two", "side", "three"]
    assert nodes["one"].builds_on is None
    assert nodes["two"].builds_on == nodes["side"].builds_on == nodes["one"].id
    assert nodes["three"].builds_on == nodes["two"].id
    assert nodes["two"].size < nodes["one"].size / 3
    assert chain.draw() == ["one", "├─ two", "│  └─ three", "└─ side"]
    assert log("three") == ["1", "2", "3"]
    assert log("side") == ["1", "side"]


def test_removing_and_merging_keep_what_others_have(chain: Tree, tmp_path: Path) -> None:
    chain.remove("two")
    assert chain.draw() == ["one", "├─ side", "└─ three"]
    assert log("three") == ["1", "2", "3"]
    chain.merge("three")
    chain.remove("one")
    assert chain.find("three").builds_on is None
    assert log("three") == ["1", "2", "3"]
    assert log("side") == ["1", "side"]
    chain.remove("side")
    assert {path.suffix for path in chain.root.iterdir()} == {".mvs", ".name", ""}
    assert len(list(chain.root.glob("*.mvs"))) == 1


def test_names(chain: Tree) -> None:
    chain.rename("two", "zwei")
    assert log("three") == ["1", "2", "3"]
    for wrong in ("two", "nothing"):
        with pytest.raises(ConfigError):
            chain.find(wrong)
    with pytest.raises(ConfigError, match="already"):
        chain.rename("zwei", "one")
    for wrong in ("", "../x", "a b", ".hidden", "x" * 101):
        with pytest.raises(ConfigError):
            chain.new_path(wrong)


def test_export_and_import(chain: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.export("three", tmp_path / "file")
    with pytest.raises(ConfigError, match="under another name"):
        chain.import_("again", tmp_path / "file")
    monkeypatch.setenv("MICROVM_DATA", str(tmp_path / "other"))
    Tree().import_("three", tmp_path / "file")
    assert log("three") == ["1", "2", "3"]
    monkeypatch.setenv("MICROVM_DATA", str(tmp_path / "foreign"))
    monkeypatch.setenv("MICROVM_CONFIG", str(tmp_path / "config"))  # another user's key
    with pytest.raises(SnapshotError, match="not saved by this user"):
        Tree().import_("three", tmp_path / "file")
    Tree().import_("three", tmp_path / "file", trust=True)
    assert log("three") == ["1", "2", "3"]


def test_copies_of_a_checkpoint(chain: Tree) -> None:
    boxes = Checkpoint.find("two").fork(2)
    ids = set()
    for box in boxes:
        assert isinstance(box, Sandbox)
        with box:
            assert box.run("cat /tmp/log").stdout == b"1\n2\n"
            ids.add(box.run("cat /etc/machine-id").stdout)
    assert len(ids) == 2


def microvm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "microvm", "checkpoint", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=90, stdin=subprocess.DEVNULL)


def test_command_line(guests: str, data: Path, tmp_path: Path) -> None:
    done = microvm("create", "base", "--image", guests, "--memory", "128", "--", "sh", "-c", "echo set up > /tmp/file")
    assert (done.returncode, done.stderr) == (0, "")
    assert microvm("create", "base", "--image", guests).returncode != 0
    done = microvm("create", "next", "--from", "base", "--", "sh", "-c", "echo more >> /tmp/file")
    assert (done.returncode, done.stderr) == (0, "")
    done = microvm("create", "broken", "--from", "base", "--", "sh", "-c", "exit 7")
    assert done.returncode == 7
    done = microvm("apply", "next", "--", "cat", "/tmp/file")
    assert (done.returncode, done.stdout, done.stderr) == (0, "set up\nmore\n", "")
    assert microvm("tree").stdout == "base\n└─ next\n"
    assert [line.split()[0] for line in microvm("list").stdout.splitlines()] == ["base", "next"]
    assert microvm("rename", "next", "last").returncode == 0
    assert microvm("export", "last", str(tmp_path / "file")).returncode == 0
    assert microvm("rm", "base").returncode == 0
    assert microvm("merge", "last").returncode == 0
    assert microvm("apply", "last", "--", "cat", "/tmp/file").stdout == "set up\nmore\n"
    assert microvm("rm", "last").returncode == 0
    assert microvm("import", "again", str(tmp_path / "file")).returncode == 0
    assert microvm("tree").stdout == "again\n"
    assert "there is none of that name" in microvm("apply", "nothing").stderr

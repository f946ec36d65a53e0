from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from microvm.errors import ConfigError
from microvm.images import cache


def fill(out: Path) -> dict[str, Any]:
    (out / "file").write_bytes(b"content")
    return {"kind": "test"}


def test_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache.root() == tmp_path / "cache"
    monkeypatch.delenv("MICROVM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.root() == tmp_path / "microvm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache.root() == Path.home() / ".cache" / "microvm"


def test_obtain_makes_an_entry_once() -> None:
    made = []

    def make(out: Path) -> dict[str, Any]:
        made.append(out)
        return fill(out)

    first = cache.obtain("kernels", "one", make)
    second = cache.obtain("kernels", "one", make)
    assert first == second
    assert len(made) == 1
    assert (first / "file").read_bytes() == b"content"
    assert cache.read_meta(first) == {"kind": "test"}


def test_force_replaces_an_entry() -> None:
    path = cache.obtain("kernels", "one", fill)

    def other(out: Path) -> dict[str, Any]:
        assert (path / "file").exists(), "the old entry serves until the new one is whole"
        return {"kind": "other"}

    cache.obtain("kernels", "one", other, force=True)
    assert cache.read_meta(path) == {"kind": "other"}
    assert not (path / "file").exists()


def test_a_failed_build_leaves_nothing(cache_root: Path) -> None:
    def fail(out: Path) -> dict[str, Any]:
        (out / "half").write_bytes(b"x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        cache.obtain("kernels", "one", fail)
    assert cache.entries("kernels") == []
    assert sorted(path.name for path in (cache_root / "work").iterdir()) == ["kernels-one.lock"]


def test_leftovers_of_a_killed_build_are_swept(cache_root: Path) -> None:
    left = cache_root / "work" / "kernels-one"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    path = cache.obtain("kernels", "one", fill)
    assert sorted(file.name for file in path.iterdir()) == ["file", "meta.json"]


def test_an_entry_without_sound_meta_does_not_exist(cache_root: Path) -> None:
    broken = cache_root / "kernels" / "broken"
    broken.mkdir(parents=True)
    assert cache.entries("kernels") == []
    (broken / "meta.json").write_bytes(b"[1]")
    assert cache.entries("kernels") == []
    (broken / "meta.json").write_bytes(b"{")
    assert cache.entries("kernels") == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "-x", "x" * 101, "a\0b", "a\n"])
def test_names_that_could_leave_the_cache_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        cache.entry_path("kernels", name)


def test_remove_takes_the_whole_entry(cache_root: Path) -> None:
    path = cache.obtain("kernels", "one", fill)
    cache.remove("kernels", "one")
    assert not path.exists()
    with pytest.raises(ConfigError, match="no such entry"):
        cache.remove("kernels", "one")


def test_two_processes_make_an_entry_once(cache_root: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from microvm.images import cache\n"
        "def make(out):\n"
        "    print('made', flush=True); time.sleep(0.3); return {}\n"
        "cache.obtain('kernels', 'one', make)\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as first,
        subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as second,
    ):
        output = first.communicate()[0] + second.communicate()[0]
    assert (first.returncode, second.returncode) == (0, 0)
    assert output.split() == [b"made"]


def test_missing_tools_name_the_packages() -> None:
    with pytest.raises(cache.MissingTools, match=r"baking needs no-such-tool \(apt-get install oven\)") as caught:
        cache.need_tools("baking", {"no-such-tool": "oven", sys.executable: "python3"})
    assert caught.value.packages == ["oven"]

"""What a guest may make us write when it sends a tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvm.agent import protocol as wire
from microvm.agent.trees import Receiver, link_stays_inside
from microvm.errors import ExecError

DIRECTORY, FILE, LINK = 0o040755, 0o100644, 0o120777
ROOT = wire.pack_record(DIRECTORY, 0, 0, b".")
END = wire.pack_record(0, 0, 0, b"")


def file(name: bytes, data: bytes = b"evil") -> bytes:
    return wire.pack_record(FILE, len(data), 0, name) + data


def directory(name: bytes) -> bytes:
    return wire.pack_record(DIRECTORY, 0, 0, name)


def link(name: bytes, target: bytes) -> bytes:
    return wire.pack_record(LINK, 0, 0, name, target)


def receive(root: Path, *parts: bytes, max_size: int | None = None, step: int = 7) -> list[str]:
    receiver = Receiver(root, max_size)
    data = b"".join(parts)
    try:
        for at in range(0, len(data), step):
            receiver.feed(data[at : at + step])
        return receiver.finish()
    finally:
        receiver.close()


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_honest_tree_arrives(tmp_path: Path, step: int) -> None:
    parts = [ROOT, directory(b"a"), file(b"a/f", b"data"), file(b"zero", b""), link(b"l", b"a/f"), END]
    assert receive(tmp_path / "t", *parts, step=step) == []
    assert (tmp_path / "t/l").read_bytes() == b"data"
    assert (tmp_path / "t/zero").read_bytes() == b""


@pytest.mark.parametrize("name", [b"../x", b"/x", b"a/../../x", b"..", b"", b"a//b", b"./x", b"a/."])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: bytes) -> None:
    for record in (file(name), directory(name), link(name, b"x")):
        with pytest.raises(ExecError):
            receive(tmp_path / "t", ROOT, directory(b"a"), record, END)
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_behind_a_link_of_the_tree_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    with pytest.raises(ExecError, match="no directory of the tree"):
        receive(tmp_path / "t", ROOT, link(b"a", b"../outside"), file(b"a/x"), END)
    assert os.listdir(tmp_path / "outside") == []


def test_nothing_is_written_through_a_link_that_is_there_already(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "victim").write_text("old")
    (tmp_path / "t").mkdir()
    (tmp_path / "t/a").symlink_to(tmp_path / "outside")
    (tmp_path / "t/f").symlink_to(tmp_path / "victim")
    with pytest.raises(ExecError, match="in the way"):
        receive(tmp_path / "t", ROOT, directory(b"a"), file(b"a/x"), END)
    receive(tmp_path / "t", ROOT, file(b"f", b"new"), END)
    assert (tmp_path / "victim").read_text() == "old"
    assert (tmp_path / "t/f").read_text() == "new"
    assert os.listdir(tmp_path / "outside") == []


def test_links_that_lead_out_are_left_out(tmp_path: Path) -> None:
    links = [link(b"a", b"/etc/passwd"), link(b"b", b"../x"), link(b"d/c", b"../../x"), link(b"d/ok", b"../f")]
    assert receive(tmp_path / "t", ROOT, directory(b"d"), *links, END) == ["a", "b", "d/c"]
    assert sorted(os.listdir(tmp_path / "t/d")) == ["ok"]


def test_a_link_does_not_replace_a_directory(tmp_path: Path) -> None:
    assert receive(tmp_path / "t", ROOT, directory(b"d"), file(b"d/x"), link(b"d", b"e"), END) == ["d"]
    assert (tmp_path / "t/d/x").exists()


def test_special_bits_do_not_come_along(tmp_path: Path) -> None:
    receive(tmp_path / "t", ROOT, wire.pack_record(0o106755, 1, 0, b"f") + b"x", END)
    assert (tmp_path / "t/f").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "parts",
    [
        [ROOT],
        [ROOT, file(b"f")[:-1]],
        [ROOT, END, file(b"f")],
        [ROOT, END, b"x"],
        [wire.pack_record(FILE, 0, 0, b".")],
        [ROOT, wire.pack_record(FILE, 0, 0, b"n" * 5000), END],
    ],
)
def test_incomplete_and_overlong_streams_are_errors(tmp_path: Path, parts: list[bytes]) -> None:
    with pytest.raises(ExecError):
        receive(tmp_path / "t", *parts)


def test_the_size_is_capped_before_anything_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ExecError, match="more than the 100 bytes"):
        receive(tmp_path / "t", ROOT, wire.pack_record(FILE, 1 << 60, 0, b"f"), b"x" * 1000, max_size=100)


@pytest.mark.parametrize(
    ("name", "target", "inside"),
    [
        ("l", "a", True),
        ("l", "../a", False),
        ("d/l", "../a", True),
        ("d/l", "../../a", False),
        ("l", "/a", False),
        ("l", "", False),
        ("l", "a/../b", False),  # a may itself be a link
        ("l", "./a//b", True),
        ("d/l", "./../a", True),
    ],
)
def test_which_links_stay_inside(name: str, target: str, inside: bool) -> None:
    assert link_stays_inside(name, target) is inside


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), max_size=6), st.integers(0, 3))
def test_a_link_that_stays_inside_never_resolves_outside(parts: list[str], depth: int) -> None:
    name, target = "/".join([*["d"] * depth, "l"]), "/".join(parts)
    if link_stays_inside(name, target):
        resolved = os.path.normpath("/".join([*["d"] * depth, target]))
        assert not resolved.startswith(("..", "/"))


@given(st.binary(max_size=300))
def test_no_bytes_escape_or_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tmp_path_factory.mktemp("fuzz")
    try:
        receive(root / "t", ROOT, data)
    except (ExecError, OSError):
        pass
    assert os.listdir(root) in ([], ["t"])

"""Files between host and guest."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from microvm.agent.client import AgentClient
from microvm.errors import ConfigError, ExecError, GuestFileError, GuestFileNotFound

from .conftest import Agent, Connect
from .test_run import wait_until


@pytest.mark.parametrize("size", [0, 1, 61440, 61441, 3_000_000])
def test_what_is_written_is_read(client: AgentClient, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = str(tmp_path / "file")
    client.files.write(path, data)
    assert client.files.read(path) == data
    assert client.files.stat(path).size == size


def test_parts_and_caps(client: AgentClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    assert client.files.read(str(path), offset=3, limit=4) == b"3456"
    with pytest.raises(ExecError, match="longer than the 5 bytes allowed"):
        client.files.read(str(path), max_size=5)
    with pytest.raises(ExecError, match="longer than"):
        client.files.get(str(path), tmp_path / "copy", max_size=5)
    assert sorted(os.listdir(tmp_path)) == ["file"]


def test_a_write_keeps_mode_and_owner_unless_told(client: AgentClient, tmp_path: Path) -> None:
    path = tmp_path / "file"
    client.files.write(str(path), b"1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o751)
    os.chown(path, 5, 6)
    client.files.write(str(path), b"2")
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o751, 5, 6)
    client.files.write(str(path), b"3", mode=0o600, uid=7, gid=8)
    status = path.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o600, 7, 8)


def test_ways_to_write(client: AgentClient, tmp_path: Path) -> None:
    path = tmp_path / "deep/er/file"
    client.files.write(str(path), "text", parents=True)
    client.files.write(str(path), b"+", append=True)
    assert client.files.read_text(str(path)) == "text+"
    with pytest.raises(GuestFileError, match="file exists"):
        client.files.write(str(path), b"", exclusive=True)
    inode = path.stat().st_ino
    client.files.write(str(path), b"!", in_place=True)
    assert (path.read_bytes(), path.stat().st_ino) == (b"!", inode)
    (tmp_path / "link").symlink_to(path)
    client.files.write(str(tmp_path / "link"), b"through")
    assert (tmp_path / "link").is_symlink()
    assert path.read_bytes() == b"through"


def test_a_write_that_breaks_off_leaves_nothing(agent: Agent, connect: Connect, tmp_path: Path) -> None:
    from microvm.agent import protocol as wire
    from microvm.agent.operations import WriteOptions

    (tmp_path / "file").write_bytes(b"old")
    sock = connect()
    sock.sendall(WriteOptions().request(str(tmp_path / "file"), 100) + wire.frame(wire.DATA, b"new"))
    assert wait_until(lambda: len(os.listdir(tmp_path)) == 2)
    sock.close()
    assert wait_until(lambda: os.listdir(tmp_path) == ["file"])
    assert (tmp_path / "file").read_bytes() == b"old"


def test_refusals_are_os_errors_of_the_guest(client: AgentClient, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        client.files.read("/nope")
    assert (raised.value.errno, raised.value.filename) == (2, "/nope")
    with pytest.raises(GuestFileNotFound):
        client.files.write(str(tmp_path / "no/dir"), bytes(200_000))
    with pytest.raises(GuestFileError, match="is a directory"):
        client.files.read("/etc")
    with pytest.raises(GuestFileError, match="not a directory"):
        client.files.list("/etc/passwd")
    with pytest.raises(ConfigError):
        client.files.read("")
    with pytest.raises(ConfigError):
        client.files.read("a\0b")


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/tty", "{}/fifo"])
def test_what_is_no_regular_file_is_refused_at_once(client: AgentClient, tmp_path: Path, path: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(GuestFileError):
        client.files.read(path.format(tmp_path))
    with pytest.raises(GuestFileError):
        client.files.write(path.format(tmp_path), b"x")
    assert client.ping() < 5


def test_listing_tells_names_types_and_targets(client: AgentClient, tmp_path: Path) -> None:
    hostile = [b"new\nline", b"\xff\xfe", b"-rf", b" ", b"a" * 255, "ümlaut".encode()]
    for name in hostile:
        (Path(os.fsdecode(bytes(tmp_path) + b"/" + name))).write_bytes(name)
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("some/where")
    entries = {entry.raw_name: entry for entry in client.files.list(str(tmp_path))}
    assert set(entries) == {*hostile, b"dir", b"link"}
    assert entries[b"dir"].is_dir
    assert entries[b"link"].is_symlink
    assert entries[b"link"].target == "some/where"
    assert entries[b"-rf"].is_file
    for name in hostile:
        assert client.files.read(bytes(tmp_path) + b"/" + name) == name
        assert client.files.read(f"{tmp_path}/{entries[name].name}") == name


def test_a_large_directory_is_listed_whole(client: AgentClient, tmp_path: Path) -> None:
    for number in range(3000):
        (tmp_path / f"{number:0100}").touch()
    assert len(client.files.list(str(tmp_path))) == 3000


def test_small_operations(client: AgentClient, tmp_path: Path) -> None:
    files, base = client.files, str(tmp_path)
    files.mkdir(f"{base}/a/b/c", parents=True, mode=0o700)
    files.mkdir(f"{base}/a/b/c", parents=True)
    with pytest.raises(GuestFileError, match="file exists"):
        files.mkdir(f"{base}/a")
    files.write(f"{base}/a/f", b"x")
    files.rename(f"{base}/a/f", f"{base}/a/g")
    files.symlink("g", f"{base}/a/l")
    files.chmod(f"{base}/a/g", 0o604)
    files.chown(f"{base}/a/g", 3, 4)
    info = files.stat(f"{base}/a/l")
    assert (info.mode, info.uid, info.gid) == (0o604, 3, 4)
    assert files.stat(f"{base}/a/l", follow=False).is_symlink
    assert files.exists(f"{base}/a/g")
    assert not files.exists(f"{base}/a/f")
    with pytest.raises(GuestFileError, match="not empty"):
        files.remove(f"{base}/a")
    files.remove(f"{base}/a/l")
    assert files.exists(f"{base}/a/g")
    files.remove(f"{base}/a", recursive=True)
    assert os.listdir(tmp_path) == []
    with pytest.raises(GuestFileNotFound):
        files.remove(f"{base}/a", recursive=True)
    files.remove(f"{base}/a", recursive=True, missing_ok=True)
    files.remove(f"{base}/a", missing_ok=True)


def test_removing_a_tree_follows_no_link(client: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep/file").touch()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/link").symlink_to(tmp_path / "keep")
    client.files.remove(str(tmp_path / "tree"), recursive=True)
    assert (tmp_path / "keep/file").exists()


def make_tree(root: Path) -> None:
    (root / "sub/empty").mkdir(parents=True)
    (root / "big").write_bytes(os.urandom(500_000))
    (root / "sub/script").write_text("#!/bin/sh\n")
    (root / "sub/script").chmod(0o755)
    (root / "sub/zero").touch()
    Path(os.fsdecode(bytes(root) + b"/sub/\xff")).write_text("odd")
    (root / "link").symlink_to("sub/script")
    (root / "sub/up").symlink_to("../big")
    for number in range(200):
        (root / "sub" / ("n" * 100 + str(number))).write_text(str(number))
    os.utime(root / "big", ns=(1, 1_234_567_891_000_000_123))


def snapshot(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (None if path.is_symlink() else status.st_mode, content)
    return found


def test_a_tree_goes_there_and_back(client: AgentClient, tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_tree(source)
    client.files.put(source, str(tmp_path / "guest"))
    assert snapshot(tmp_path / "guest") == snapshot(source)
    assert (tmp_path / "guest/big").stat().st_mtime_ns == 1_234_567_891_000_000_123
    assert client.files.get(str(tmp_path / "guest"), tmp_path / "back") == []
    assert snapshot(tmp_path / "back") == snapshot(source)


def test_a_file_goes_there_and_back(client: AgentClient, tmp_path: Path) -> None:
    (tmp_path / "tool").write_bytes(b"#!")
    (tmp_path / "tool").chmod(0o755)
    client.files.put(tmp_path / "tool", str(tmp_path / "guest"))
    client.files.get(str(tmp_path / "guest"), tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"#!"
    assert stat.S_IMODE((tmp_path / "back").stat().st_mode) == 0o755


def test_put_follows_no_link_in_the_guest(client: AgentClient, tmp_path: Path) -> None:
    source, guest, outside = tmp_path / "source", tmp_path / "guest", tmp_path / "outside"
    (source / "a").mkdir(parents=True)
    (source / "a/file").write_text("new")
    (source / "plain").write_text("new")
    for folder in (guest, outside):
        folder.mkdir()
    (outside / "victim").write_text("old")
    (guest / "plain").symlink_to(outside / "victim")
    (guest / "a").symlink_to(outside)
    with pytest.raises(GuestFileError):
        client.files.put(source, str(guest))
    assert sorted(os.listdir(outside)) == ["victim"]
    assert (outside / "victim").read_text() == "old"


def test_transfers_that_fail_say_where(client: AgentClient, tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    with pytest.raises(GuestFileError, match="no such file"):
        client.files.put(tmp_path / "source", str(tmp_path / "no/where"))
    with pytest.raises(GuestFileNotFound):
        client.files.get(str(tmp_path / "nope"), tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        client.files.put(tmp_path / "nope", "/tmp/x")
    with pytest.raises(ExecError, match="more than the 1000 bytes allowed"):
        client.files.get(str(tmp_path / "source"), tmp_path / "x", max_size=1000)

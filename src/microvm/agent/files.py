"""The guest's files, from the host."""

from __future__ import annotations

import builtins
import os
import stat as stat_bits
from typing import TYPE_CHECKING

from ..errors import GuestFileError, GuestFileNotFound
from . import operations as op
from . import protocol as wire
from . import trees

if TYPE_CHECKING:
    from .client import AgentClient

_EISDIR = 21


class Files:
    """Reads and writes files in the guest, as its root user.

    Every method raises GuestFileError (an OSError with the guest's ``errno`` and ``filename``) for what the guest
    refuses, GuestFileNotFound for what is not there, and ExecError for a guest that does not answer or breaks the
    protocol.
    """

    def __init__(self, client: AgentClient) -> None:
        self._client = client

    def read(
        self,
        path: wire.GuestPath,
        *,
        offset: int = 0,
        limit: int | None = None,
        max_size: int = op.DEFAULT_MAX_FILE,
    ) -> bytes:
        """The contents of a regular file, from ``offset``, at most ``limit`` bytes.

        More than ``max_size`` bytes are an ExecError.
        """
        return self._client.perform(op.read_file(path, offset, limit, max_size))

    def read_text(self, path: wire.GuestPath) -> str:
        """The contents of a UTF-8 file."""
        return self.read(path).decode()

    def write(
        self,
        path: wire.GuestPath,
        data: bytes | bytearray | memoryview | str,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        append: bool = False,
        exclusive: bool = False,
        parents: bool = False,
        in_place: bool = False,
    ) -> None:
        """Write a file, which appears whole or not at all.

        ``mode``, ``uid`` and ``gid`` are by default those of the file that is replaced, else 0644 and root. ``append``
        adds to the file, ``in_place`` writes into it (needed in /proc and /sys), ``exclusive`` fails when it exists,
        ``parents`` makes missing directories.
        """
        options = op.WriteOptions(
            mode=mode,
            uid=uid,
            gid=gid,
            append=append,
            exclusive=exclusive,
            parents=parents,
            in_place=in_place,
        )
        content = data.encode() if isinstance(data, str) else memoryview(data)
        self._client.perform(op.write_file(path, content, options))

    def list(self, path: wire.GuestPath = "/") -> list[wire.FileInfo]:
        """The files of a directory, sorted by name, without ``.`` and ``..``."""
        return self._client.perform(op.list_directory(path))

    def stat(self, path: wire.GuestPath, *, follow: bool = True) -> wire.FileInfo:
        """What a file is (its ``name`` is empty)."""
        return self._client.perform(op.stat(path, follow))

    def exists(self, path: wire.GuestPath) -> bool:
        """Whether there is such a file; a symbolic link to nowhere is none."""
        try:
            self.stat(path)
        except GuestFileNotFound:
            return False
        return True

    def mkdir(self, path: wire.GuestPath, *, mode: int | None = None, parents: bool = False) -> None:
        """Make a directory. With ``parents`` also those above it, and one that exists is fine."""
        self._client.perform(op.mkdir(path, mode, parents))

    def remove(self, path: wire.GuestPath, *, recursive: bool = False, missing_ok: bool = False) -> None:
        """Remove a file, a link (not what it leads to) or an empty directory; ``recursive``: any directory."""
        if recursive:
            self._client.perform(op.remove_tree(path, missing_ok))
        else:
            self._client.perform(op.remove(path, missing_ok))

    def rename(self, old: wire.GuestPath, new: wire.GuestPath) -> None:
        """Rename a file, in place of what is there."""
        self._client.perform(op.two_paths(wire.RENAME, old, new))

    def symlink(self, target: wire.GuestPath, path: wire.GuestPath) -> None:
        """Make the symbolic link ``path`` to ``target``."""
        self._client.perform(op.two_paths(wire.SYMLINK, target, path))

    def chmod(self, path: wire.GuestPath, mode: int) -> None:
        """Set a file's permissions."""
        self._client.perform(op.set_attributes(path, mode, None, None))

    def chown(self, path: wire.GuestPath, uid: int | None = None, gid: int | None = None) -> None:
        """Set a file's owner, group or both."""
        self._client.perform(op.set_attributes(path, None, uid, gid))

    def put(
        self,
        local: str | os.PathLike[str],
        remote: wire.GuestPath,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
    ) -> None:
        """Copy a file or a directory of the host to the guest; ``remote`` is the name it gets.

        A file keeps its permissions unless ``mode`` is given. All belongs to root unless ``uid`` and ``gid`` say
        otherwise. A directory is merged into one that exists. Raises OSError for what the host refuses.
        """
        source = trees.local_path(local)
        if source.is_dir():
            self._client.perform(trees.put_tree(source, remote, uid or 0, gid or 0))
            return
        if mode is None:
            mode = stat_bits.S_IMODE(source.stat().st_mode) & 0o777
        options = op.WriteOptions(mode=mode, uid=uid, gid=gid)
        self._client.perform(trees.put_file(source, remote, options))

    def get(
        self, remote: wire.GuestPath, local: str | os.PathLike[str], *, max_size: int | None = None
    ) -> builtins.list[str]:
        """Copy a file or a directory of the guest to the host; ``local`` is the name it gets.

        Nothing is written outside ``local``, whatever the guest sends: links that lead out of a directory are left out,
        and returned. Owners, devices, pipes and special permission bits do not come along. More than ``max_size`` bytes
        are an ExecError. Raises OSError for what the host refuses.
        """
        target = trees.local_path(local)
        try:
            self._client.perform(trees.get_file(remote, target, max_size))
        except GuestFileError as error:
            if error.code != _EISDIR:
                raise
            return self._client.perform(trees.get_tree(remote, target, max_size))
        return []

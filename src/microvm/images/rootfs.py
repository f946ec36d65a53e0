"""Root file system images: built here from Debian packages, packed from an archive, or given as a file."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import os
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from microvm.errors import ConfigError, HostError
from microvm.images import cache, erofs, python_tree, userland
from microvm.images.cache import Progress, quiet

KIND: Final = "images"
RECIPE: Final = 1  # raised when what a built image contains changes
DEFAULT: Final = "python"
MEMBERS_MAX: Final = 2_000_000  # of an archive: more would exhaust the host's memory before its disk
_EPOCH: Final = 1_704_067_200  # 2024-01-01, the time of every file in a built image


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A root file system.

    ``path`` is an erofs image, to be attached read-only. ``size`` is in bytes, ``created`` in ISO 8601, UTC.
    """

    name: str
    path: Path
    size: int
    created: str
    meta: Mapping[str, Any]


def _make_base(tree: Path, progress: Progress) -> None:
    userland.merge_usr(tree)
    userland.add_common(tree)
    userland.add_busybox(tree, progress, userland.find_busybox(progress))


_RECIPES: Final[dict[str, Callable[[Path, Progress], None]]] = {"base": _make_base, "python": python_tree.make}


def recipes() -> tuple[str, ...]:
    """Names that ``build`` takes."""
    return tuple(_RECIPES)


def list() -> tuple[Image, ...]:
    """Every image in the cache, newest first."""
    found = (_from_entry(path, meta) for path, meta in cache.entries(KIND))
    return tuple(image for image in found if image is not None)


def build(name: str, progress: Progress = quiet, *, force: bool = False) -> Image:
    """Build ``base`` or ``python`` unless the current recipe of it is built.

    Raises ConfigError for another name, MissingTools naming the Debian packages to install, HostError.
    """
    if name not in _RECIPES:
        raise ConfigError("image", name, f"one of {', '.join(_RECIPES)}, or give an archive with --from")

    def make(out: Path) -> dict[str, Any]:
        with cache.scratch(f"image-{name}") as scratch:
            tree = scratch / "tree"
            tree.mkdir()
            tree.chmod(0o755)
            _RECIPES[name](tree, progress)
            progress("packing the image", None)
            erofs.make(tree, out / "root.erofs", userland.OWNERS, times=_EPOCH, compress=True)
        return _stamp(name, "recipe")

    return _load(cache.obtain(KIND, _current_entry(name), make, force=force, progress=progress))


def build_from(archive: Path, name: str = "", progress: Progress = quiet, *, force: bool = False) -> Image:
    """Pack a tar archive (plain, gzip, bzip2 or xz) of a root file system, such as ``docker export`` writes.

    Owners are kept; device nodes and what is under /dev are left out, because the guest makes its own. ``name`` is the
    archive's own by default. Raises ConfigError for what is not an archive, MissingTools, HostError.
    """
    if not archive.is_file():
        raise ConfigError("archive", str(archive), "no such file")
    label = name or archive.name.split(".")[0]
    if label in _RECIPES:
        raise ConfigError("name", label, "taken by a built image: choose another with --name")
    with open(archive, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    def make(out: Path) -> dict[str, Any]:
        cache.need_tools("packing an archive", {"tar": "tar", "mkfs.erofs": "erofs-utils"})
        with cache.scratch(f"image-{digest[:12]}") as scratch:
            progress(f"unpacking {archive.name}", None)
            tree = scratch / "tree"
            tree.mkdir()
            owners = _unpack(archive, tree, scratch / "exclude")
            progress("packing the image", None)
            erofs.make(tree, out / "root.erofs", owners, times=None, compress=True)
        return _stamp(label, "archive")

    return _load(cache.obtain(KIND, f"{label}-{digest[:12]}", make, force=force, progress=progress))


def remove(name: str) -> None:
    """Delete an image by its name (all versions of it) or its entry's. Raises ConfigError when there is none."""
    doomed = [image for image in list() if name in (image.name, image.path.parent.name)]
    if not doomed:
        raise ConfigError("image", name, "no such image (`microvm image list`)")
    for image in doomed:
        cache.remove(KIND, image.path.parent.name)


def resolve(which: str | os.PathLike[str] | None) -> Image:
    """The image that a user named: one of the cache, or an erofs file. None or an empty string is ``python``.

    Raises ConfigError that says which command builds a missing one.
    """
    text = os.fspath(which) if which is not None else ""
    name = text or DEFAULT
    images = list()
    # The current recipe goes before a newer image of an older one.
    current = _current_entry(name) if name in _RECIPES else name
    for image in images:
        if image.path.parent.name == current:
            return image
    for image in images:
        if image.name == name:
            return image
    if name in _RECIPES:
        raise ConfigError("image", name, f"not built yet: run `microvm image build {name}`")
    path = Path(text)
    if not path.exists():
        raise ConfigError("image", text, "no such image or file (`microvm image list`)")
    if not path.is_file():
        raise ConfigError("image", text, "not a file")
    if not erofs.is_erofs(path):
        raise ConfigError("image", text, "not an erofs image (`microvm image build --from ARCHIVE` makes one)")
    return Image(path.name, path, path.stat().st_size, "", {"kind": "file"})


def _current_entry(name: str) -> str:
    """The cache entry of a built image: its name and a hash of all that decides what is in it."""
    described = (RECIPE, name, userland.FINGERPRINT, python_tree.FINGERPRINT if name == "python" else "")
    return f"{name}-{hashlib.sha256(repr(described).encode()).hexdigest()[:12]}"


def _stamp(name: str, kind: str) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _load(path: Path) -> Image:
    image = _from_entry(path, cache.read_meta(path) or {})
    if image is None:
        raise ConfigError("image", str(path), "the cache entry is damaged: remove it and make it again")
    return image


def _from_entry(path: Path, meta: dict[str, Any]) -> Image | None:
    image = path / "root.erofs"
    try:
        size = image.stat().st_size
    except OSError:
        return None
    return Image(str(meta.get("name", path.name)), image, size, str(meta.get("created", "")), meta)


def _unpack(archive: Path, tree: Path, exclude: Path) -> dict[str, tuple[int, int]]:
    """Unpack with tar, which does not follow links out of the tree; return who owns what does not belong to root."""
    owners: dict[str, tuple[int, int]] = {}
    devices = []
    try:
        with tarfile.open(archive) as tar:
            for count, member in enumerate(tar):
                if count >= MEMBERS_MAX:
                    raise ConfigError("archive", str(archive), f"more than {MEMBERS_MAX} files")
                path = os.path.normpath(member.name).lstrip("/")
                if ".." in path.split("/"):
                    raise ConfigError("archive", str(archive), f"holds a path that climbs: {member.name}")
                if member.isdev() or path.startswith("dev/"):
                    devices.append(member.name)
                elif (member.uid or member.gid) and path != ".":
                    owners[path] = (member.uid, member.gid)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ConfigError("archive", str(archive), f"not a readable tar archive ({error})") from error
    exclude.write_text("".join(f"{name}\n" for name in devices))
    command = ["tar", "-xf", str(archive), "-C", str(tree), "--no-same-owner", "--same-permissions"]
    options = ["--no-wildcards", "--anchored", f"--exclude-from={exclude}", "--delay-directory-restore"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise HostError("tar", done.returncode, lines[0] if lines else "failed")
    for path in ("dev", "proc", "sys", "tmp", "run"):
        (tree / path).mkdir(exist_ok=True)
    return owners

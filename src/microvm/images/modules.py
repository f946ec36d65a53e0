"""Choose the modules that a distribution's kernel needs in a sandbox, in the order to load them.

The order comes from the modules themselves (``depends=`` and ``softdep=pre:`` of ``.modinfo``): a package as
downloaded has no ``modules.dep``, which is made when it is installed.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from microvm.errors import ConfigError
from microvm.images import cpio

# What a sandbox needs before it can mount its root and answer, first things first. Measured in Debian's 6.1, these take
# 34 M guest instructions; ext4 alone would take as many again, so it waits until something asks for it.
BOOT_MODULES: Final = (
    "virtio_mmio",
    "virtio_blk",
    "erofs",
    "overlay",
    "vmw_vsock_virtio_transport",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
)
LATE_MODULES: Final = ("virtiofs", "ext4")
BOOT_DIRECTORY: Final = "lib/modules-boot"
LATE_DIRECTORY: Final = "lib/modules-late"
MODULE_MAX: Final = 64 << 20  # one module, unpacked
_SIGNATURE_MARK: Final = b"~Module signature appended~\n"
_SIGNATURE: Final = struct.Struct(">BBBBBxxxI")  # algorithm, hash, id type, signer length, key id length, length
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")


def module_name(path: str) -> str:
    """``kernel/drivers/char/hw_random/virtio-rng.ko.xz`` -> ``virtio_rng``, as the kernel calls it."""
    return path.rsplit("/", 1)[-1].split(".ko", 1)[0].replace("-", "_")


def unpacked(path: str, data: bytes) -> bytes:
    """The module itself. Raises ConfigError for a compression the standard library does not have, or too much."""
    if path.endswith(".ko"):
        return data
    if not path.endswith(".ko.xz"):
        raise ConfigError("module", path, "compressed in a way that cannot be read here")
    try:
        out = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data, MODULE_MAX + 1)
    except lzma.LZMAError as error:
        raise ConfigError("module", path, f"damaged: {error}") from error
    if len(out) > MODULE_MAX:
        raise ConfigError("module", path, f"unpacks to more than {MODULE_MAX >> 20} MiB")
    return out


def modinfo(module: bytes) -> list[tuple[str, str]]:
    """The ``key=value`` pairs of the module's ``.modinfo`` section. Raises ConfigError when it has none."""
    try:
        if module[:6] != b"\x7fELF\x02\x01":
            raise ValueError("not ELF")
        (table,) = struct.unpack_from("<Q", module, 0x28)
        size, count, names_index = struct.unpack_from("<HHH", module, 0x3A)
        if size != _SECTION.size or table + size * count > len(module):
            raise ValueError("section headers")
        sections = [_SECTION.unpack_from(module, table + index * size) for index in range(count)]
        names = _content(module, sections[names_index])
        for section in sections:
            if names[section[0] : names.index(b"\0", section[0])] == b".modinfo":
                pairs = (text.partition("=") for text in _content(module, section).decode("latin-1").split("\0"))
                return [(name, value) for name, separator, value in pairs if separator]
    except (struct.error, IndexError, ValueError) as error:
        raise ConfigError("module", "", f"not a kernel module ({error})") from error
    raise ConfigError("module", "", "not a kernel module (no .modinfo)")


def _content(module: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    if offset + size > len(module):
        raise ValueError("a section beyond the end")
    return module[offset : offset + size]


def requirements(module: bytes) -> list[str]:
    """Names of the modules to load before this one, soft dependencies first."""
    hard: list[str] = []
    soft: list[str] = []
    for key, value in modinfo(module):
        if key == "depends":
            hard += [name for name in value.split(",") if name]
        elif key == "softdep":
            before = value.partition("pre:")[2].partition("post:")[0]
            soft += before.split()
    return [name.replace("-", "_") for name in soft + hard]


def load_order(available: Mapping[str, bytes], wanted: Iterable[str] = BOOT_MODULES) -> list[str]:
    """``wanted`` and all they need, every module after what it needs; names that do not exist are built in.

    A soft dependency on an algorithm (``crc32c``) is met by its generic module.
    """
    order: list[str] = []
    visited: set[str] = set()
    # An explicit stack of iterators: a hostile chain of a thousand modules must not exhaust Python's.
    for top in wanted:
        stack = [(top, iter(_needs(available, top, visited)))] if top in available and top not in visited else []
        while stack:
            name, rest = stack[-1]
            for needed in rest:
                if needed in available and needed not in visited:
                    stack.append((needed, iter(_needs(available, needed, visited))))
                    break
            else:
                order.append(name)
                stack.pop()
    return order


def _needs(available: Mapping[str, bytes], name: str, visited: set[str]) -> list[str]:
    visited.add(name)
    needed = requirements(available[name])
    return [other if other in available else f"{other}_generic" for other in needed]


def without_signature(module: bytes) -> bytes:
    """The module without the signature at its end: a kernel that finds one spends 5 M instructions and more on it."""
    end = len(module) - len(_SIGNATURE_MARK)
    if not module.endswith(_SIGNATURE_MARK) or end < _SIGNATURE.size:
        return module
    _, _, _, signer, key_id, length = _SIGNATURE.unpack_from(module, end - _SIGNATURE.size)
    start = end - _SIGNATURE.size - signer - key_id - length
    return module[:start] if start > 0 else module


def modules_cpio(available: Mapping[str, bytes]) -> bytes:
    """The initramfs part with the modules, numbered in the order to load them.

    ``/lib/modules-boot/NN-name.ko`` are for every boot; ``/lib/modules-late/NN-name.ko`` for a guest that finds it
    needs them: those go after all of the first.
    """
    boot = load_order(available, BOOT_MODULES)
    late = [name for name in load_order(available, LATE_MODULES) if name not in boot]
    return cpio.pack(
        cpio.file(f"{directory}/{number:02}-{name}.ko", without_signature(available[name]))
        for directory, names in ((BOOT_DIRECTORY, boot), (LATE_DIRECTORY, late))
        for number, name in enumerate(names)
    )

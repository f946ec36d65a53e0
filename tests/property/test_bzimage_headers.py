"""No bzImage, however damaged, does anything but load or raise BootError or ConfigError."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from microvm import boot
from microvm.errors import BootError
from microvm.memory import GuestMemory
from microvm.spec import bootparam
from microvm.testing.kernels import gzip_payload, make_bzimage, make_elf

MEMORY = GuestMemory.allocate(64 << 20)
GOOD = make_bzimage(gzip_payload(make_elf()))
SIZES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: (1 << 64) - 1}
WIDTHS = {
    name: {"B": 1, "H": 2, "I": 4, "Q": 8}[code]
    for name, code in zip(bootparam.SetupHeader._fields, bootparam.SETUP_HEADER.format[1:], strict=True)
}


def attempt(kernel: bytes, unpack: bool) -> None:
    with contextlib.suppress(BootError):
        state = boot.load(MEMORY, kernel, [b"initrd"], "quiet", unpack=unpack)
        assert 0x100000 <= state.kernel_start < state.kernel_end <= MEMORY.size
        assert state.initrd is not None
        assert state.initrd.gpa >= state.kernel_end or state.initrd.gpa + state.initrd.size <= state.kernel_start


@st.composite
def headers(draw: st.DrawFn) -> dict[str, int]:
    names = draw(st.lists(st.sampled_from(sorted(WIDTHS)), min_size=1, max_size=4, unique=True))
    changes = {}
    for name in names:
        top = SIZES[WIDTHS[name]]
        changes[name] = draw(
            st.one_of(st.integers(0, top), st.sampled_from([0, 1, top, top - 15, top >> 1, top & 0x1000]))
        )
    if changes.get("cmdline_size", 5) < 5 and changes["cmdline_size"]:
        del changes["cmdline_size"]  # too short for the command line used here: a ConfigError of its own
    return changes


@settings(max_examples=300)
@given(headers(), st.booleans())
def test_absurd_setup_headers(changes: dict[str, int], unpack: bool) -> None:
    attempt(make_bzimage(gzip_payload(make_elf()), **changes), unpack)


@given(st.lists(st.tuples(st.integers(1024, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=8))
def test_damaged_payload(changes: list[tuple[int, int]]) -> None:
    kernel = bytearray(GOOD)
    for position, value in changes:
        kernel[position] = value
    attempt(bytes(kernel), True)


@given(st.integers(0, len(GOOD)), st.booleans())
def test_any_truncation(size: int, unpack: bool) -> None:
    attempt(GOOD[:size], unpack)


@given(
    st.sampled_from([b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"BZh9", b"\x5d\0\0", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd"]),
    st.binary(max_size=200),
    st.integers(0, 1 << 16),
)
def test_random_payload_of_each_format(magic: bytes, body: bytes, size: int) -> None:
    attempt(make_bzimage(magic + body + size.to_bytes(4, "little")), True)

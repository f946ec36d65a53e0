"""No ELF file, however damaged, does anything but load or raise BootError."""

from __future__ import annotations

import contextlib

from hypothesis import given, settings
from hypothesis import strategies as st

from microvm import boot
from microvm.errors import BootError
from microvm.memory import GuestMemory
from microvm.spec import elf
from microvm.testing.kernels import ehdr, make_elf

MEMORY = GuestMemory.allocate(64 << 20)
U16 = st.integers(0, 0xFFFF)
# The values that break comparisons: small ones, RAM's edges, and those next to a wrap.
U64 = st.one_of(
    st.integers(0, 0x2000),
    st.sampled_from([0x100000, 0x1000000, 0x3FFFFFF, 0x4000000, 0xC0000000, 1 << 32, 1 << 63, (1 << 64) - 1]),
    st.integers(0, (1 << 64) - 1),
)


def attempt(kernel: bytes) -> None:
    with contextlib.suppress(BootError):
        state = boot.load(MEMORY, kernel)
        assert 0x100000 <= state.kernel_start <= state.entry < state.kernel_end <= MEMORY.size


@given(st.binary(max_size=2048))
def test_random_bytes_behind_an_elf_magic(data: bytes) -> None:
    attempt(b"\x7fELF" + data)


@given(st.lists(st.tuples(st.integers(0, 0x600), st.integers(0, 255)), min_size=1, max_size=12))
def test_flipped_bytes(changes: list[tuple[int, int]]) -> None:
    kernel = bytearray(make_elf())
    for position, value in changes:
        kernel[position % len(kernel)] = value
    attempt(bytes(kernel))


@given(st.integers(0, 2000))
def test_any_truncation(size: int) -> None:
    attempt(make_elf()[:size])


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from([elf.PT_LOAD, elf.PT_NOTE, 6]), *[U64] * 7), min_size=1, max_size=5),
    U64,
    st.binary(max_size=600),
)
def test_absurd_program_headers(table: list[tuple[int, ...]], entry: int, body: bytes) -> None:
    phdrs = [elf.PHDR.pack(kind, 7, *fields[:6]) for kind, *fields in table]
    attempt(ehdr(len(phdrs), entry) + b"".join(phdrs) + body)


@given(U64, U16, U16, st.binary(max_size=400))
def test_absurd_header_table(phoff: int, phnum: int, phentsize: int, body: bytes) -> None:
    attempt(ehdr(1, phoff=phoff) + body)
    attempt(ehdr(phnum, phentsize=phentsize) + body)


@given(st.binary(max_size=300), st.sampled_from([0, 4, 8, 1 << 63]))
def test_any_notes(notes: bytes, align: int) -> None:
    from microvm.testing.kernels import LOAD_GPA, TEXT, phdr

    start = 64 + 2 * 56
    table = phdr(elf.PT_LOAD, start + len(notes), LOAD_GPA, len(TEXT)) + phdr(
        elf.PT_NOTE, start, 0, len(notes), align=align
    )
    attempt(ehdr(2) + table + notes + TEXT)

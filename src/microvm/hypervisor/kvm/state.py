"""Reading and writing all of a vCPU: MSRs, XSAVE, and the blob that `Vcpu.save` makes.

The blob is a magic number, a version and tagged sections that hold KVM's own structures. It is bounds-checked and
never unpickled, but it is not authenticated: that is the snapshot format's task.

The order is KVM's, not ours: CPUID before everything (it decides which MSRs exist), the local APIC before the MSRs
(the TSC deadline needs its mode), the TSC before the deadline, pending events last. [kvm-api] 4.31, 4.57
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

from ...errors import HostError, SnapshotError
from . import abi
from .api import Api

if TYPE_CHECKING:
    from .vcpu import KvmVcpu

MAGIC: Final = b"mvKVMcpu"
VERSION: Final = 1
_HEADER: Final = struct.Struct("<8sI")
_SECTION: Final = struct.Struct("<4sI")
_MSR: Final = struct.Struct("<IIQ")
_CPUID: Final = struct.Struct("<7I12x")
MAX_BLOB: Final = 1 << 20  # a vCPU is some 10 KiB; a foreign file must not make us parse more than this
MSR_BATCH: Final = 128  # KVM takes at most 256 a call
TSC_TOLERANCE_PPM: Final = 250  # what KVM itself lets pass before it scales. [kvm] tsc_tolerance_ppm

LAPIC_TMICT: Final = 0x380
LAPIC_TMCCT: Final = 0x390

# Sections that are one structure each, in the order they are written back; MSRs go after LAPIC.
_STRUCTURES: Final = (
    (b"MPST", abi.KVM_GET_MP_STATE, abi.KVM_SET_MP_STATE, abi.kvm_mp_state),
    (b"REGS", abi.KVM_GET_REGS, abi.KVM_SET_REGS, abi.kvm_regs),
    (b"SREG", abi.KVM_GET_SREGS, abi.KVM_SET_SREGS, abi.kvm_sregs),
    (b"XSAV", 0, 0, None),
    (b"XCRS", abi.KVM_GET_XCRS, abi.KVM_SET_XCRS, abi.kvm_xcrs),
    (b"DEBG", abi.KVM_GET_DEBUGREGS, abi.KVM_SET_DEBUGREGS, abi.kvm_debugregs),
    (b"APIC", abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC, abi.kvm_lapic_state),
)

# MSRs with guest state that KVM_GET_MSR_INDEX_LIST leaves out: MTRRs and machine check.
_EXTRA_MSRS: Final = (
    *range(0x200, 0x210),
    0x250, 0x258, 0x259, *range(0x268, 0x270), abi.MSR_MTRRdefType,
    abi.MSR_IA32_MCG_STATUS, abi.MSR_IA32_MCG_CTL, *range(0x400, 0x480),
)  # fmt: skip

# CPUID words that are feature bits: a restored guest uses what it was shown, so this processor must have it.
_FEATURE_WORDS: Final = (
    (1, 0, ("ecx", "edx")),
    (7, 0, ("ebx", "ecx", "edx")),
    (7, 1, ("eax",)),
    (0xD, 0, ("eax",)),
    (0xD, 1, ("eax",)),
    (0x8000_0001, 0, ("ecx", "edx")),
)
_CPUID_REGISTERS: Final = {"eax": 3, "ebx": 4, "ecx": 5, "edx": 6}
_OSXSAVE: Final = 1 << 27


def _msrs_argument(entries: list[tuple[int, int]]) -> ctypes.Array[ctypes.c_char]:
    packed = struct.pack("<II", len(entries), 0) + b"".join(_MSR.pack(index, 0, value) for index, value in entries)
    return ctypes.create_string_buffer(packed, len(packed))


def _get_available(api: Api, fd: int, indices: Iterable[int]) -> dict[int, int]:
    """The values of those MSRs that this vCPU has."""
    left = list(indices)
    values: dict[int, int] = {}
    while left:
        batch = left[:MSR_BATCH]
        argument = _msrs_argument([(index, 0) for index in batch])
        done = api.ioctl(fd, abi.KVM_GET_MSRS, argument)
        for position in range(done):
            index, _, value = _MSR.unpack_from(argument, 8 + _MSR.size * position)
            values[index] = value
        # KVM stops at the first it does not have: that one is skipped.
        left = left[done + (done < len(batch)) :]
    return values


def get_msrs(api: Api, fd: int, indices: Iterable[int]) -> dict[int, int]:
    """The values of all these MSRs. Raises KeyError with the first that the vCPU does not have."""
    wanted = list(indices)
    values = _get_available(api, fd, wanted)
    for index in wanted:
        if index not in values:
            raise KeyError(index)
    return values


def set_msrs(api: Api, fd: int, values: Mapping[int, int]) -> list[int]:
    """Write MSRs in the order given. Returns those that were refused."""
    left = list(values.items())
    refused: list[int] = []
    while left:
        batch = left[:MSR_BATCH]
        done = api.ioctl(fd, abi.KVM_SET_MSRS, _msrs_argument(batch))
        if done < len(batch):
            refused.append(batch[done][0])
            done += 1
        left = left[done:]
    return refused


def saved_msrs(api: Api, kvm_fd: int, vcpu_fd: int) -> tuple[int, ...]:
    """The MSRs that hold a vCPU's state here: the TSC first, its deadline last."""
    count = 512
    while True:
        argument = ctypes.create_string_buffer(struct.pack("<I", count), 4 + 4 * count)
        result = api.try_ioctl(kvm_fd, abi.KVM_GET_MSR_INDEX_LIST, argument)
        if result == 0:
            break
        needed: int = struct.unpack_from("<I", argument)[0]
        if result != -errno.E2BIG or not count < needed <= 1 << 16:
            api.ioctl(kvm_fd, abi.KVM_GET_MSR_INDEX_LIST, argument)
        count = needed
    listed: int = struct.unpack_from("<I", argument)[0]
    indices = set(struct.unpack_from(f"<{min(listed, count)}I", argument, 4)) | set(_EXTRA_MSRS)
    # Hyper-V's registers belong to an interface we do not offer; SMBASE to a mode no guest of ours enters.
    indices -= {index for index in indices if 0x4000_0000 <= index < 0x4000_0200} | {0x9E}
    indices -= {abi.MSR_IA32_TSC, abi.MSR_IA32_TSC_DEADLINE}
    order = (abi.MSR_IA32_TSC, *sorted(indices), abi.MSR_IA32_TSC_DEADLINE)
    return tuple(_get_available(api, vcpu_fd, order))


def get_xsave(api: Api, fd: int, size: int) -> bytes:
    """XSAVE state in the standard format, ``size`` bytes."""
    buffer = ctypes.create_string_buffer(size)
    api.ioctl(fd, abi.KVM_GET_XSAVE2 if size > 4096 else abi.KVM_GET_XSAVE, buffer)
    return buffer.raw


def set_xsave(api: Api, fd: int, data: bytes, size: int) -> None:
    """Load XSAVE state; what lies behind ``data`` is in its initial state. Raises HostError if invalid."""
    buffer = ctypes.create_string_buffer(data[:size], size)
    api.ioctl(fd, abi.KVM_SET_XSAVE, buffer)


def save_vcpu(vcpu: KvmVcpu) -> bytes:
    """All of a settled vCPU's state."""
    api, fd, paused = vcpu.api, vcpu.fd, vcpu.paused
    sections: list[tuple[bytes, bytes]] = []
    for tag, get, _, layout in _STRUCTURES:
        if layout is None:
            sections.append((tag, get_xsave(api, fd, vcpu.partition.xsave_size)))
            continue
        structure = layout()
        api.ioctl(fd, get, structure)
        data = bytearray(structure)
        if paused is not None and tag == b"APIC":
            struct.pack_into("<I", data, LAPIC_TMICT, paused.initial_count)
            struct.pack_into("<I", data, LAPIC_TMCCT, paused.current_count)
        sections.append((tag, bytes(data)))
    sections.append((b"TSCK", struct.pack("<I", api.ioctl(fd, abi.KVM_GET_TSC_KHZ))))
    sections.append((b"CPID", vcpu.cpuid))
    msrs = _get_available(api, fd, vcpu.partition.saved_msrs(vcpu))
    if paused is not None:
        msrs[abi.MSR_IA32_TSC] = paused.tsc
        msrs[abi.MSR_IA32_TSC_DEADLINE] = paused.deadline
    sections.append((b"MSRS", b"".join(_MSR.pack(index, 0, value) for index, value in msrs.items())))
    events = abi.kvm_vcpu_events()
    api.ioctl(fd, abi.KVM_GET_VCPU_EVENTS, events)
    sections.append((b"EVNT", bytes(events)))
    body = b"".join(_SECTION.pack(tag, len(data)) + data for tag, data in sections)
    return _HEADER.pack(MAGIC, VERSION) + body


def parse(blob: bytes, magic: bytes, version: int, what: str) -> dict[bytes, bytes]:
    """The sections of a blob. Raises SnapshotError."""
    if len(blob) < _HEADER.size or len(blob) > MAX_BLOB or blob[:8] != magic:
        raise SnapshotError(f"this is not the state of {what} saved by the kvm backend")
    found: int = _HEADER.unpack_from(blob)[1]
    if found != version:
        raise SnapshotError(f"the state of {what} has version {found}, this is version {version}")
    sections: dict[bytes, bytes] = {}
    at = _HEADER.size
    while at < len(blob):
        if len(blob) - at < _SECTION.size:
            raise SnapshotError(f"the state of {what} is cut short")
        tag, size = _SECTION.unpack_from(blob, at)
        at += _SECTION.size
        if size > len(blob) - at or tag in sections:
            raise SnapshotError(f"the state of {what} is damaged")
        sections[tag] = blob[at : at + size]
        at += size
    return sections


def pack(magic: bytes, version: int, sections: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A blob that `parse` takes apart."""
    return _HEADER.pack(magic, version) + b"".join(_SECTION.pack(tag, len(data)) + data for tag, data in sections)


def restore_vcpu(vcpu: KvmVcpu, blob: bytes) -> None:
    """Put a saved vCPU in place. Raises SnapshotError."""
    sections = parse(blob, MAGIC, VERSION, "a vCPU")
    expected = {tag: ctypes.sizeof(layout) for tag, _, _, layout in _STRUCTURES if layout is not None}
    expected |= {b"TSCK": 4, b"EVNT": ctypes.sizeof(abi.kvm_vcpu_events)}
    for tag in (*expected, b"XSAV", b"CPID", b"MSRS"):
        if tag not in sections or len(sections[tag]) != expected.get(tag, len(sections[tag])):
            raise SnapshotError("the state of a vCPU is damaged")
    if len(sections[b"MSRS"]) % _MSR.size or len(sections[b"CPID"]) % _CPUID.size:
        raise SnapshotError("the state of a vCPU is damaged")
    if len(sections[b"XSAV"]) > vcpu.partition.xsave_size:
        raise SnapshotError("the saved vCPU has vector state that this processor lacks")
    try:
        _restore_sections(vcpu, sections)
    except HostError as error:
        raise SnapshotError(f"the host refused a saved vCPU: {error}") from error


def _restore_sections(vcpu: KvmVcpu, sections: dict[bytes, bytes]) -> None:
    api, fd = vcpu.api, vcpu.fd
    _check_features(vcpu, sections[b"CPID"])
    if sections[b"CPID"] != vcpu.cpuid:
        set_cpuid(vcpu, sections[b"CPID"])
    _match_tsc(vcpu, struct.unpack("<I", sections[b"TSCK"])[0])
    for tag, _, put, layout in _STRUCTURES:
        if layout is None:
            set_xsave(api, fd, sections[tag], vcpu.partition.xsave_size)
        else:
            api.ioctl(fd, put, layout.from_buffer_copy(sections[tag]))
    wanted = {index: value for index, _, value in _MSR.iter_unpack(sections[b"MSRS"])}
    present = _get_available(api, fd, wanted)
    # Only what differs is written: some registers can be read but not written, even with their own value.
    always = (abi.MSR_IA32_TSC, abi.MSR_IA32_TSC_DEADLINE)
    changed = {i: value for i, value in wanted.items() if present.get(i) != value or i in always}
    refused = set_msrs(api, fd, changed)
    if refused:
        index = refused[0]
        raise SnapshotError(f"this processor does not take the saved value {wanted[index]:#x} of MSR {index:#x}")
    api.ioctl(fd, abi.KVM_SET_VCPU_EVENTS, abi.kvm_vcpu_events.from_buffer_copy(sections[b"EVNT"]))
    if vcpu.paused is not None:
        counts = [struct.unpack_from("<I", sections[b"APIC"], at)[0] for at in (LAPIC_TMICT, LAPIC_TMCCT)]
        deadline = wanted.get(abi.MSR_IA32_TSC_DEADLINE, 0)
        vcpu.partition.clock.stop_restored(vcpu, wanted.get(abi.MSR_IA32_TSC, 0), deadline, counts[0], counts[1])


def set_cpuid(vcpu: KvmVcpu, entries: bytes) -> None:
    """Give a vCPU its CPUID leaves, packed as kvm_cpuid_entry2. KVM refuses a change once the vCPU has run."""
    packed = struct.pack("<II", len(entries) // _CPUID.size, 0) + entries
    vcpu.api.ioctl(vcpu.fd, abi.KVM_SET_CPUID2, ctypes.create_string_buffer(packed, len(packed)))
    vcpu.cpuid = entries


def _check_features(vcpu: KvmVcpu, cpuid: bytes) -> None:
    ours = {(entry[0], entry[1]): entry for entry in _CPUID.iter_unpack(vcpu.partition.cpuid_for(vcpu.index))}
    for saved in _CPUID.iter_unpack(cpuid):
        for function, index, registers in _FEATURE_WORDS:
            if (saved[0], saved[1]) != (function, index):
                continue
            own = ours.get((function, index), (0,) * 7)
            for register in registers:
                at = _CPUID_REGISTERS[register]
                missing = (
                    saved[at] & ~own[at] & ~_OSXSAVE if (function, register) == (1, "ecx") else saved[at] & ~own[at]
                )
                if missing:
                    where = f"CPUID {function:#x}.{index} {register} {missing:#x}"
                    raise SnapshotError(f"the saved vCPU uses processor features that this host lacks ({where})")


def _match_tsc(vcpu: KvmVcpu, khz: int) -> None:
    own = vcpu.api.ioctl(vcpu.fd, abi.KVM_GET_TSC_KHZ)
    if abs(khz - own) * 1_000_000 <= own * TSC_TOLERANCE_PPM:
        return
    if vcpu.api.try_ioctl(vcpu.fd, abi.KVM_SET_TSC_KHZ, khz) < 0:
        raise SnapshotError(
            f"the saved guest's clock runs at {khz} kHz, this processor's at {own} kHz and cannot be scaled"
        )

"""The CPUID policy, on a processor that has everything."""

from __future__ import annotations

import pytest

from microvm.hypervisor.kvm.cpuid import Leaf, machine_cpuid

ALL = 0xFFFF_FFFF
EVERYTHING = [
    Leaf(0, 0, 0, 0xD, 0x756E_6547, 0x6C65_746E, 0x4965_6E69),
    Leaf(1, 0, 0, 0x806F8, ALL, ALL, ALL),
    *(Leaf(4, index, 1, 0x1C00_4121 | level << 5, ALL, ALL, ALL) for index, level in enumerate((1, 2, 3))),
    Leaf(6, 0, 0, ALL, ALL, ALL, ALL),
    Leaf(7, 0, 1, 2, ALL, ALL, ALL),
    Leaf(7, 1, 1, ALL, ALL, ALL, ALL),
    Leaf(0xA, 0, 0, ALL, ALL, ALL, ALL),
    Leaf(0xB, 0, 1, 5, 5, 5, 99),
    *(Leaf(0xD, index, 1, ALL, ALL, ALL, ALL) for index in (0, 1, 2, 11, 12, 15)),
    Leaf(0x14, 0, 1, ALL, ALL, ALL, ALL),
    Leaf(0x4000_0000, 0, 0, 0x4000_0001, 1, 2, 3),
    Leaf(0x4000_0001, 0, 0, ALL, 0, 0, ALL),
    Leaf(0x8000_0001, 0, 0, ALL, ALL, ALL, ALL),
    Leaf(0x8000_0008, 0, 0, 0x3030, ALL, ALL, ALL),
    Leaf(0x8000_000A, 0, 0, ALL, ALL, ALL, ALL),
    Leaf(0x8000_001E, 0, 0, ALL, ALL, ALL, ALL),
]


def leaves(vcpu: int = 0, vcpus: int = 1, tsc_khz: int = 2_596_122) -> dict[tuple[int, int], Leaf]:
    found = machine_cpuid(EVERYTHING, vcpu, vcpus, tsc_khz, True)
    keyed = {(leaf.function, leaf.index): leaf for leaf in found}
    assert len(keyed) == len(found), "a leaf twice"
    return keyed


def test_what_is_not_saved_is_hidden() -> None:
    found = leaves()
    assert not found[1, 0].ecx & (1 << 3 | 1 << 5 | 1 << 15)
    assert not found[7, 0].ebx & (1 << 2 | 1 << 25)
    assert not found[7, 0].ecx & 1 << 7
    assert not found[7, 0].edx & (1 << 19 | 1 << 20)
    assert not found[0x8000_0001, 0].ecx & (1 << 2 | 1 << 23)
    for key in ((0xA, 0), (0x14, 0), (0x8000_000A, 0), (0xD, 11), (0xD, 12), (0xD, 15)):
        assert key not in found


def test_what_runs_well_stays() -> None:
    found = leaves()
    assert found[7, 0].ebx & 1 << 9, "ERMS"
    assert found[1, 0].ecx & 1 << 13, "CMPXCHG16B"
    assert found[0xD, 2].eax == ALL


@pytest.mark.parametrize("vcpus", [1, 2, 3, 4, 31, 32])
def test_every_vcpu_is_a_core_of_one_package(vcpus: int) -> None:
    for vcpu in range(vcpus):
        found = leaves(vcpu, vcpus)
        assert found[1, 0].ebx >> 24 == vcpu
        assert found[1, 0].ebx >> 16 & 0xFF >= vcpus
        assert bool(found[1, 0].edx >> 28 & 1) == (vcpus > 1)
        threads, cores = found[0xB, 0], found[0xB, 1]
        assert (threads.ebx, cores.ebx) == (1, vcpus)
        assert threads.edx == cores.edx == vcpu
        assert 1 << cores.eax >= vcpus
        assert found[0x8000_0008, 0].ecx & 0xFF == vcpus - 1
        assert found[0x8000_001E, 0].eax == vcpu
        assert found[4, 2].eax >> 26 == (1 << cores.eax) - 1


@pytest.mark.parametrize("tsc_khz", [800_000, 1_000_000, 2_596_122, 2_999_999, 4_700_123, 6_000_000])
def test_tsc_leaf_is_exact_enough_and_fits_linuxs_arithmetic(tsc_khz: int) -> None:
    leaf = leaves(tsc_khz=tsc_khz)[0x15, 0]
    assert leaf.ecx // 1000 * leaf.ebx < 1 << 32
    assert abs(leaf.ecx * leaf.ebx / leaf.eax - tsc_khz * 1000) < tsc_khz * 1000 * 5e-6


def test_signature_and_clock_are_kvms() -> None:
    found = leaves()
    base, features = found[0x4000_0000, 0], found[0x4000_0001, 0]
    assert b"".join(v.to_bytes(4, "little") for v in (base.ebx, base.ecx, base.edx)) == b"KVMKVMKVM\0\0\0"
    assert features.eax & 1 << 3
    assert features.eax & 1 << 24
    assert not features.eax & 1 << 4, "asynchronous page faults"
    assert features.edx == 0


def test_basic_leaves_reach_the_tsc_frequency() -> None:
    assert leaves()[0, 0].eax >= 0x16

"""Every size, offset and number of `hypervisor/kvm/abi.py` against the C headers of this machine."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from microvm.hypervisor.kvm import abi

HEADER = Path("/usr/include/linux/kvm.h")

# Our name: the C expression whose address or size it stands for.
NESTED = {
    "_run_io": "io",
    "_run_mmio": "mmio",
    "_run_fail_entry": "fail_entry",
    "_run_internal": "internal",
    "_run_system_event": "system_event",
}
FIELD_SPELLING = {
    ("kvm_irq_routing_entry", "address_lo"): "u.msi.address_lo",
    ("kvm_irq_routing_entry", "address_hi"): "u.msi.address_hi",
    ("kvm_irq_routing_entry", "data"): "u.msi.data",
    ("kvm_irq_routing_entry", "devid"): "u.msi.devid",
    ("kvm_vcpu_events", "triple_fault_pending"): "triple_fault.pending",
    ("kvm_dirty_log", "dirty_bitmap"): "dirty_bitmap",
}
NO_C_FIELD = {("kvm_irq_routing_entry", "union_pad"), ("kvm_run", "u")}
PARTIAL = {"kvm_run"}  # we stop before the synchronised registers


def structures() -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in vars(abi).items()
        if isinstance(value, type) and issubclass(value, ctypes.Structure) and name.startswith("kvm_")
    }


def constants() -> dict[str, int]:
    return {name: value for name, value in vars(abi).items() if name.startswith("KVM_") and isinstance(value, int)}


@pytest.fixture(scope="module")
def from_c(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What the compiler says, by expression."""
    if not sys.platform.startswith("linux") or shutil.which("gcc") is None or not HEADER.exists():
        pytest.skip("needs gcc and the Linux headers")
    lines = []
    for name, structure in structures().items():
        if name not in PARTIAL:
            lines.append(f'S("sizeof {name}", sizeof(struct {name}));')
        for field, *_ in structure._fields_:
            if (name, field) in NO_C_FIELD:
                continue
            spelling = FIELD_SPELLING.get((name, field), field)
            lines.append(f'S("{name}.{field}", offsetof(struct {name}, {spelling}));')
    for ours, member in NESTED.items():
        for field, *_ in getattr(abi, ours)._fields_:
            lines.append(f'S("{ours}.{field}", offsetof(struct kvm_run, {member}.{field}));')
    lines.append('S("kvm_run.eoi_vector", offsetof(struct kvm_run, eoi.vector));')
    for name in constants():
        # A constant newer than the installed header cannot be compared.
        lines.append(f'#ifdef {name}\nS("{name}", {name});\n#endif')
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\n"
        '#define S(name, value) printf("%s=%llu\\n", name, (unsigned long long)(value))\n'
        "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n"
    )
    subprocess.run(["gcc", "-w", "-o", str(folder / "abi"), str(source)], check=True)
    text = subprocess.run([str(folder / "abi")], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(.+)=(\d+)", text)}


def test_structure_sizes_are_the_kernels(from_c: dict[str, int]) -> None:
    for name, structure in structures().items():
        if name not in PARTIAL:
            assert ctypes.sizeof(structure) == from_c[f"sizeof {name}"], name


def test_field_offsets_are_the_kernels(from_c: dict[str, int]) -> None:
    for name, structure in structures().items():
        for field, *_ in structure._fields_:
            if (name, field) not in NO_C_FIELD:
                assert getattr(structure, field).offset == from_c[f"{name}.{field}"], (name, field)


def test_exit_data_lies_where_the_kernel_puts_it(from_c: dict[str, int]) -> None:
    union = abi.kvm_run.u.offset
    for name in NESTED:
        for field, *_ in getattr(abi, name)._fields_:
            assert union + getattr(getattr(abi, name), field).offset == from_c[f"{name}.{field}"], (name, field)
    assert union + abi._run_union.eoi_vector.offset == from_c["kvm_run.eoi_vector"]


def test_numbers_are_the_kernels(from_c: dict[str, int]) -> None:
    compared = 0
    for name, value in constants().items():
        if name in from_c:
            assert value == from_c[name], name
            compared += 1
    assert compared > 100


def test_fixed_addresses_agree_with_the_layout() -> None:
    from microvm.boot import layout
    from microvm.hypervisor.kvm import partition

    assert partition.TSS_GPA == layout.KVM_TSS
    assert partition.IDENTITY_MAP_GPA == layout.KVM_IDENTITY_MAP

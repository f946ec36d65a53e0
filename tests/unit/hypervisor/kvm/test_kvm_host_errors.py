"""Bad hosts: every one is BackendUnavailable with one sentence and a hint. The host is a fake between us and ioctl."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from microvm.errors import BackendUnavailable, ConfigError, HostError
from microvm.hypervisor import limits
from microvm.hypervisor.base import PartitionConfig
from microvm.hypervisor.kvm import KvmHypervisor, abi, api, host


class FakeHost(api.Api):
    """A KVM whose every call succeeds until told otherwise; descriptors are counted."""

    def __init__(self) -> None:
        self.open_error = 0
        self.errors: dict[int, int] = {}
        self.results: dict[int, int] = {abi.KVM_GET_API_VERSION: 12, abi.KVM_GET_VCPU_MMAP_SIZE: 12288}
        self.missing: set[int] = set()
        self.open_fds: set[int] = set()
        self._next = 1000

    def _fd(self) -> int:
        self._next += 1
        self.open_fds.add(self._next)
        return self._next

    def open(self, path: str) -> int:
        if self.open_error:
            raise OSError(self.open_error, os.strerror(self.open_error))
        return self._fd()

    def close(self, fd: int) -> None:
        self.open_fds.remove(fd)

    def map_run(self, fd: int, size: int) -> mmap.mmap:
        return mmap.mmap(-1, size)

    def try_ioctl(self, fd: int, request: int, argument: Any = 0) -> int:
        if request in self.errors:
            return -self.errors[request]
        if request == abi.KVM_CHECK_EXTENSION:
            if argument in self.missing:
                return 0
            return {abi.KVM_CAP_MAX_VCPUS: 288, abi.KVM_CAP_XSAVE2: 4096, abi.KVM_CAP_NR_MEMSLOTS: 509}.get(argument, 1)
        if request in (abi.KVM_CREATE_VM, abi.KVM_CREATE_VCPU):
            return self._fd()
        return self.results.get(request, 0)


def refused(fake: FakeHost, make: Callable[[KvmHypervisor], object] | None = None) -> BackendUnavailable:
    """The error, after checking its form and that nothing stays open."""
    backend = KvmHypervisor(fake)
    with pytest.raises(BackendUnavailable) as caught:
        (make or (lambda b: b.create_partition(PartitionConfig())))(backend)
    error = caught.value
    assert error.hint, error
    assert "\n" not in str(error)
    assert not fake.open_fds
    return error


@pytest.fixture
def no_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: False)


@pytest.mark.usefixtures("no_container")
@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({"vmx"}, "kvm_intel"),
        ({"svm"}, "kvm_amd"),
        ({"hypervisor"}, "nested"),
        (set(), "firmware"),
        ({"hypervisor", "svm"}, "kvm_amd"),
    ],
)
@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENODEV, errno.ENXIO])
def test_absent_device_hints_at_the_module_the_firmware_or_nesting(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], word: str, code: int
) -> None:
    monkeypatch.setattr(host, "_cpu_flags", lambda: frozenset(flags))
    fake = FakeHost()
    fake.open_error = code
    assert word in refused(fake).hint


def test_absent_device_in_a_container_hints_at_the_device_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/.dockerenv")
    fake = FakeHost()
    fake.open_error = errno.ENOENT
    assert "--device /dev/kvm" in refused(fake).hint


def test_no_permission_hints_at_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "access", lambda path, mode: False)
    fake = FakeHost()
    fake.open_error = errno.EACCES
    hint = refused(fake).hint
    assert "usermod" in hint or "root" in hint


def test_forbidden_device_hints_at_the_sandbox() -> None:
    fake = FakeHost()
    fake.open_error = errno.EPERM
    assert "container" in refused(fake).hint


def test_other_open_error_still_has_a_hint() -> None:
    for code in (errno.EMFILE, errno.EIO, errno.EBUSY):
        fake = FakeHost()
        fake.open_error = code
        refused(fake)


def test_a_device_that_is_not_kvm_is_named() -> None:
    fake = FakeHost()
    fake.errors[abi.KVM_GET_API_VERSION] = errno.ENOTTY
    assert "not the KVM device" in refused(fake).hint


def test_another_interface_version_is_refused() -> None:
    fake = FakeHost()
    fake.results[abi.KVM_GET_API_VERSION] = 11
    assert "11" in str(refused(fake))


@pytest.mark.parametrize("name", host.REQUIRED)
def test_each_missing_capability_is_named_with_the_kernel_that_has_it(name: str) -> None:
    fake = FakeHost()
    capability, since = host.REQUIRED[name]
    fake.missing.add(capability)
    error = refused(fake)
    assert name in str(error)
    assert since in error.hint


def test_another_hypervisor_holding_the_processor_is_named() -> None:
    fake = FakeHost()
    fake.errors[abi.KVM_CREATE_VM] = errno.EBUSY
    assert "another hypervisor" in refused(fake).hint


@pytest.mark.parametrize("request_number", [abi.KVM_CREATE_VM, abi.KVM_SET_TSS_ADDR, abi.KVM_ENABLE_CAP])
def test_out_of_memory_while_making_a_partition_frees_all(request_number: int) -> None:
    fake = FakeHost()
    fake.errors[request_number] = errno.ENOMEM
    assert "memory" in refused(fake).hint


def test_out_of_memory_while_mapping_is_unavailable() -> None:
    from microvm.memory import GuestMemory

    fake = FakeHost()
    fake.errors[abi.KVM_SET_USER_MEMORY_REGION] = errno.ENOMEM
    partition = KvmHypervisor(fake).create_partition(PartitionConfig())
    memory = GuestMemory.allocate(4096)
    with pytest.raises(BackendUnavailable) as caught:
        partition.map(0, memory.regions[0])
    assert "memory" in caught.value.hint
    fake.errors.clear()
    partition.map(0, memory.regions[0])  # nothing was left behind
    partition.close()
    assert not fake.open_fds


def test_the_address_space_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64 << 20, 64 << 20))
    assert "64 MiB (ulimit -v)" in limits.memory_hint()


def test_the_control_groups_limit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_cgroup_limit", lambda: 128 << 20)
    assert "128 MiB" in limits.memory_hint()


def test_too_many_open_files_is_named() -> None:
    fake = FakeHost()
    fake.errors[abi.KVM_CREATE_VM] = errno.EMFILE
    assert "ulimit -n" in refused(fake).hint


def test_a_vcpu_that_cannot_be_made_leaves_no_descriptor() -> None:
    for request_number in (abi.KVM_CREATE_VCPU, abi.KVM_SET_CPUID2):
        fake = FakeHost()
        partition = KvmHypervisor(fake).create_partition(PartitionConfig())
        fake.errors[request_number] = errno.EINVAL
        with pytest.raises(HostError):
            partition.create_vcpu(0)
        partition.close()
        assert not fake.open_fds


def test_more_vcpus_than_kvm_has_is_the_callers_mistake() -> None:
    fake = FakeHost()
    with pytest.raises(ConfigError, match="1 to 32"):
        KvmHypervisor(fake).create_partition(PartitionConfig(vcpus=33))
    assert not fake.open_fds


def test_probe_turns_a_refusal_into_a_reason() -> None:
    fake = FakeHost()
    fake.open_error = errno.EACCES
    found = KvmHypervisor(fake).probe()
    assert not found.usable
    assert found.reason
    assert found.hint


def test_unknown_ioctl_and_errno_make_a_plain_host_error() -> None:
    error = api.host_error(api.call_name(abi.KVM_SET_REGS), errno.EINVAL)
    assert type(error) is HostError
    assert str(error).startswith("KVM_SET_REGS: ")
    assert api.call_name(0xAE77) == "ioctl 0xae77"


def test_a_device_that_permissions_allow_but_the_mount_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.os, "access", lambda path, mode: True)
    assert "nodev" in host._permission_hint(errno.EACCES)


def test_a_worker_passes_on_what_the_host_withheld() -> None:
    from microvm.workers import wire

    for error in (OSError(errno.EMFILE, "too many"), MemoryError()):
        passed = wire.unpack_error(wire.pack_error(error))
        assert isinstance(passed, BackendUnavailable)
        assert passed.hint


def test_a_software_cpu_without_room_is_an_error_and_not_the_end_of_the_process() -> None:
    pytest.importorskip("unicorn")
    code = (
        "import resource; from microvm.hypervisor import select; backend = select.load('soft')\n"
        "from microvm.hypervisor.soft import library; library.load()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (80 << 20),) * 2)\n"
        "print(backend.probe())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "usable=False" in done.stdout, done.stderr
    assert "ulimit -v" in done.stdout

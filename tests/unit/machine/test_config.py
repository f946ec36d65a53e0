"""What a configuration refuses, and that it says why in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm.errors import ConfigError
from microvm.machine.config import MAX_CMDLINE, MAX_MEMORY_MIB, DiskConfig, MachineConfig


@pytest.mark.parametrize(
    ("memory_mib", "why"),
    [
        (0, "at least 64 MiB"),
        (-2, "at least 64 MiB"),
        (62, "at least 64 MiB"),
        (65, "multiple of 2 MiB"),
        (MAX_MEMORY_MIB + 2, "at most"),
        (10**30, "at most"),
        (True, "whole number"),
        (128.0, "whole number"),
        ("128", "whole number"),
    ],
)
def test_impossible_memory_is_refused(memory_mib: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        MachineConfig(Path("kernel"), memory_mib=memory_mib)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "memory"


@pytest.mark.parametrize("cpus", [0, -1, 33, 10**9, 1.5, True])
def test_impossible_cpu_counts_are_refused(cpus: int) -> None:
    with pytest.raises(ConfigError, match="1 to 32"):
        MachineConfig(Path("kernel"), cpus=cpus)


@pytest.mark.parametrize("cid", [0, 1, 2, -1, 1 << 32, 0xFFFF_FFFF])
def test_reserved_vsock_addresses_are_refused(cid: int) -> None:
    with pytest.raises(ConfigError, match="vsock cid"):
        MachineConfig(Path("kernel"), vsock_cid=cid)


def test_unknown_backend_is_refused_with_the_choice() -> None:
    with pytest.raises(ConfigError, match="one of auto, "):
        MachineConfig(Path("kernel"), backend="xen")


@pytest.mark.parametrize("cmdline", ["x" * (MAX_CMDLINE + 1), "a\0b", "a\nb", "naïve"])
def test_command_lines_linux_would_cut_or_misread_are_refused(cmdline: str) -> None:
    with pytest.raises(ConfigError, match="kernel command line"):
        MachineConfig(Path("kernel"), cmdline=cmdline)


def test_longest_command_line_is_accepted() -> None:
    assert len(MachineConfig(Path("kernel"), cmdline="x" * MAX_CMDLINE).cmdline) == MAX_CMDLINE


def test_strings_become_paths_and_lists_tuples() -> None:
    config = MachineConfig("kernel", initrds=["a"], disks=[DiskConfig("d")])  # type: ignore[arg-type, list-item]
    assert config.kernel == Path("kernel")
    assert config.initrds == (Path("a"),)
    assert config.disks == (DiskConfig(Path("d")),)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_names_no_file_can_have_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="kernel"):
        MachineConfig(name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "path", "read_only"),
    [("a.img", "a.img", False), ("a.img,ro", "a.img", True), ("a.img,rw", "a.img", False), ("a,b", "a,b", False)],
)
def test_disk_option_is_read(text: str, path: str, read_only: bool) -> None:
    assert DiskConfig.parse(text) == DiskConfig(Path(path), read_only)


def test_too_many_disks_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 8"):
        MachineConfig(Path("kernel"), disks=[DiskConfig(Path("d"))] * 9)


class TestFiles:
    @pytest.fixture
    def kernel(self, tmp_path: Path) -> Path:
        path = tmp_path / "kernel"
        path.write_bytes(b"x")
        return path

    def test_missing_kernel_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no such file"):
            MachineConfig(tmp_path / "none").check_files()

    def test_file_below_a_file_is_refused(self, kernel: Path) -> None:
        with pytest.raises(ConfigError, match=r"kernel .*: cannot be opened"):
            MachineConfig(kernel / "below").check_files()

    def test_missing_initrd_is_refused(self, kernel: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"initrd .*no such file"):
            MachineConfig(kernel, initrds=[tmp_path / "none"]).check_files()

    def test_directory_as_disk_is_refused(self, kernel: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"disk .*is a directory"):
            MachineConfig(kernel, disks=[DiskConfig(tmp_path)]).check_files()

    def test_device_as_kernel_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="not a regular file"):
            MachineConfig(Path("/dev/null")).check_files()

    @pytest.mark.parametrize(("size", "why"), [(0, "is empty"), (511, "multiple of 512"), (1025, "multiple of 512")])
    def test_disk_of_odd_size_is_refused(self, kernel: Path, tmp_path: Path, size: int, why: str) -> None:
        disk = tmp_path / "disk"
        disk.write_bytes(bytes(size))
        with pytest.raises(ConfigError, match=why):
            MachineConfig(kernel, disks=[DiskConfig(disk)]).check_files()

    def test_memory_far_beyond_the_host_is_refused(self, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("microvm.machine.config.host_memory_mib", lambda: 1024)
        MachineConfig(kernel, memory_mib=8192).check_files()
        with pytest.raises(ConfigError, match="8 times the host's 1024 MiB"):
            MachineConfig(kernel, memory_mib=8194).check_files()

"""Every test here runs on every backend that can make a partition on this machine.

A backend that is missing skips with its reason, and so does what a host withholds from a backend (a KVM that only
interprets supervisor code knows few instructions); both are found by trying. ``MICROVM_REQUIRE=kvm,soft`` turns these
skips into failures for the backends it names. Away from Windows, WHP runs over `testing.SimulatedWhp`: the backend's
own code, with its C interface served by the software CPU.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

from microvm.errors import BackendUnavailable
from microvm.hypervisor import select
from microvm.hypervisor.base import Availability, Hypervisor, PartitionConfig

from .machine import Machine

REQUIRED = frozenset(filter(None, os.environ.get("MICROVM_REQUIRE", "").split(",")))


def pytest_configure(config: pytest.Config) -> None:
    unknown = REQUIRED - set(select.backend_names())
    if unknown:
        raise pytest.UsageError(f"MICROVM_REQUIRE names no backend: {', '.join(sorted(unknown))}")


def gap(backend: Hypervisor, reason: str) -> NoReturn:
    """Skip the running test because this host cannot do what it needs; fail if the backend is required."""
    if backend.name in REQUIRED:
        pytest.fail(f"{backend.name} is required: {reason}")
    if probe(backend.name).usable:
        pytest.fail(f"{backend.name} passes its probe, yet {reason}")
    pytest.skip(f"{backend.name} here: {reason}")


@functools.cache
def load(name: str) -> Hypervisor:
    """The backend; WHP over the simulator where there is no Windows."""
    if name == "whp" and sys.platform != "win32":
        pytest.importorskip("iced_x86")
        from microvm.hypervisor.whp import WhpHypervisor

        return WhpHypervisor(simulated().api())
    return select.load(name)


@functools.cache
def simulated() -> Any:
    from microvm.testing.simulated_whp import SimulatedWhp

    return SimulatedWhp(os.environ.get("MICROVM_WHP_PROFILE", "win11"))


@functools.cache
def probe(name: str) -> Availability:
    return load(name).probe()


@functools.cache
def _open(name: str) -> Hypervisor | str:
    """The backend, or why it cannot make a partition."""
    try:
        backend = load(name)
        backend.create_partition(PartitionConfig()).close()
    except BackendUnavailable as error:
        return str(error)
    return backend


@pytest.fixture(params=select.backend_names())
def backend(request: pytest.FixtureRequest) -> Hypervisor:
    name = request.param
    found = _open(name)
    if isinstance(found, str):
        if name in REQUIRED:
            pytest.fail(f"{name} is required: {found}")
        pytest.skip(f"{name}: {found}")
    return found


@pytest.fixture(autouse=True)
def no_error_inside_the_simulator() -> Iterator[None]:
    """What goes wrong behind its C interface can only be an HRESULT there; here it fails the test."""
    yield
    if simulated.cache_info().currsize and (error := simulated().error):
        simulated().error = None
        raise error


@pytest.fixture
def machine(backend: Hypervisor) -> Iterator[Machine]:
    """One vCPU, 4 MiB."""
    with Machine(backend) as made:
        yield made


@pytest.fixture
def make_machine(backend: Hypervisor) -> Iterator[Callable[..., Machine]]:
    """Makes machines with other parameters and closes them."""
    made: list[Machine] = []

    def make(**options: object) -> Machine:
        made.append(Machine(backend, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()

"""The asyncio mirror of the package: the same names and parameters, with ``await``.

    async with aio.Sandbox() as sandbox:
        result = await sandbox.run(["python3", "-c", "print(6 * 7)"])

Commands and files are served by the event loop itself. What blocks in the machine below (building, starting, waiting
for its end) runs on a thread of its own, so any number of sandboxes can be waited for at once. Cancelling a call that
runs a command ends the command.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from . import api, pool
from .agent.aclient import AsyncAgentClient
from .agent.aclient import AsyncFiles as Files
from .agent.aclient import AsyncProcess as Process
from .agent.client import DEVNULL, PIPE, STDOUT
from .agent.operations import Result
from .agent.protocol import FileInfo, GuestInfo, GuestPath, Ready
from .errors import CommandFailed, ExecError, ExecTimeout, StateError
from .machine import machine as machine_module
from .machine.config import DiskConfig, MachineConfig

if TYPE_CHECKING:
    from types import TracebackType

    from .checkpoints import Checkpoint
    from .hypervisor.base import Hypervisor
    from .machine.console import Console
    from .machine.outcome import Outcome
    from .machine.vsock_host import VsockHost

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "FileInfo",
    "Files",
    "GuestInfo",
    "MicroVM",
    "Pool",
    "Process",
    "Result",
    "Sandbox",
]

T = TypeVar("T")


class MicroVM:
    """`microvm.MicroVM` for asyncio."""

    def __init__(self, config: MachineConfig, *, hypervisor: Hypervisor | None = None) -> None:
        self._vm = machine_module.MicroVM(config, hypervisor=hypervisor)

    @classmethod
    def _of(cls, vm: machine_module.MicroVM) -> MicroVM:
        mirror = cls.__new__(cls)
        mirror._vm = vm
        return mirror

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return repr(self._vm)

    @property
    def config(self) -> MachineConfig:
        return self._vm.config

    @property
    def state(self) -> str:
        return self._vm.state

    @property
    def backend(self) -> str:
        return self._vm.backend

    @property
    def outcome(self) -> Outcome | None:
        return self._vm.outcome

    @property
    def serial(self) -> Console:
        return self._vm.serial

    @property
    def console(self) -> Console:
        return self._vm.console

    @property
    def vsock(self) -> VsockHost:
        return self._vm.vsock

    async def start(self) -> None:
        await on_thread(self._vm.start)

    async def pause(self) -> None:
        await on_thread(self._vm.pause)

    async def resume(self) -> None:
        await on_thread(self._vm.resume)

    async def wait(self, timeout_s: float | None = None) -> Outcome | None:
        return await on_thread(lambda: self._vm.wait(timeout_s))

    @classmethod
    async def restore(
        cls, path: str | os.PathLike[str], *, hypervisor: Hypervisor | None = None, verify: bool = False
    ) -> MicroVM:
        return cls._of(
            await on_thread(lambda: machine_module.MicroVM.restore(path, hypervisor=hypervisor, verify=verify))
        )

    async def snapshot(
        self, path: str | os.PathLike[str], *, difference: bool = False, note: dict[str, Any] | None = None
    ) -> str:
        return await on_thread(lambda: self._vm.snapshot(path, difference=difference, note=note))

    def end(self, detail: str = "") -> None:
        self._vm.end(detail)

    async def stop(self, detail: str = "") -> Outcome | None:
        return await on_thread(lambda: self._vm.stop(detail))

    async def close(self) -> None:
        await on_thread(self._vm.close)

    def set_balloon(self, target_mib: int) -> None:
        self._vm.set_balloon(target_mib)

    def stats(self) -> dict[str, int]:
        return self._vm.stats()


class Sandbox:
    """`microvm.Sandbox` for asyncio. For one event loop."""

    def __init__(
        self,
        image: str | os.PathLike[str] = "python",
        *,
        kernel: str | os.PathLike[str] | None = None,
        memory_mib: int = 256,
        cpus: int = 1,
        backend: str = "auto",
        env: Mapping[str, str] | None = None,
        workdir: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        disks: Sequence[DiskConfig | str | os.PathLike[str]] = (),
        cmdline: str = "",
        boot_timeout: float = api.BOOT_TIMEOUT_S,
        cold: bool = False,
        isolated: bool = True,
        frozen_clock: bool = False,
    ) -> None:
        self._inner = api.Sandbox(
            image,
            kernel=kernel,
            memory_mib=memory_mib,
            cpus=cpus,
            backend=backend,
            env=env,
            workdir=workdir,
            user=user,
            timeout=timeout,
            disks=disks,
            cmdline=cmdline,
            boot_timeout=boot_timeout,
            cold=cold,
            isolated=isolated,
            frozen_clock=frozen_clock,
        )
        self._client: AsyncAgentClient | None = None

    @classmethod
    def _of(cls, inner: api.Sandbox) -> Sandbox:
        mirror = cls.__new__(cls)
        mirror._inner = inner
        mirror._client = AsyncAgentClient(mirror._connect)
        return mirror

    async def __aenter__(self) -> Self:
        if self._client is None:
            await self.boot()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._inner.has_writable_disks and not self._inner.closed:
            try:
                await self.shutdown()
            except ExecError:
                pass
        await self.close()

    def __repr__(self) -> str:
        return repr(self._inner)

    @property
    def vm(self) -> MicroVM:
        return MicroVM._of(self._inner.vm)

    @property
    def backend(self) -> str:
        return self._inner.backend

    @property
    def ready(self) -> Ready | None:
        return self._inner.ready

    @property
    def boot_seconds(self) -> float:
        return self._inner.boot_seconds

    @property
    def closed(self) -> bool:
        return self._inner.closed

    @property
    def has_writable_disks(self) -> bool:
        return self._inner.has_writable_disks

    @property
    def files(self) -> Files:
        return self._agent().files

    @property
    def config(self) -> MachineConfig:
        return self._inner.config

    async def fork(self, count: int = 1) -> list[Sandbox | Exception]:
        children = await on_thread(lambda: self._inner.fork(count))
        return [child if isinstance(child, Exception) else Sandbox._of(child) for child in children]

    @classmethod
    def from_snapshot(
        cls,
        path: str | os.PathLike[str],
        *,
        isolated: bool = True,
        frozen_clock: bool = False,
        timeout: float | None = None,
    ) -> Sandbox:
        mirror = cls.__new__(cls)
        mirror._inner = api.Sandbox.from_snapshot(path, isolated=isolated, frozen_clock=frozen_clock, timeout=timeout)
        mirror._client = None
        return mirror

    async def snapshot(
        self,
        path: str | os.PathLike[str],
        *,
        difference_in: str | os.PathLike[str] | None = None,
        after: str | None = None,
    ) -> None:
        await on_thread(lambda: self._inner.snapshot(path, difference_in=difference_in, after=after))

    async def checkpoint(self, name: str) -> Checkpoint:
        return await on_thread(lambda: self._inner.checkpoint(name))

    def on_console(self, listener: Callable[[bytes], None]) -> None:
        self._inner.on_console(listener)

    async def boot(self) -> Ready:
        try:
            ready = await on_thread(self._inner.boot)
        except asyncio.CancelledError:
            # The boot goes on behind our back: have it closed as soon as it can be.
            threading.Thread(target=self._inner.close, name="microvm-close", daemon=True).start()
            raise
        self._client = AsyncAgentClient(self._connect)
        return ready

    async def run(
        self,
        command: api.Command,
        *,
        input: bytes | str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: GuestPath | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        stdout: int = PIPE,
        stderr: int = PIPE,
        max_output: int = 64 << 20,
    ) -> Result:
        client = self._agent()
        data = input.encode() if isinstance(input, str) else input
        options = self._inner._defaults(env, cwd, user, timeout)
        try:
            return await client.run(
                api._words(command),
                input=data,
                check=check,
                stdout=stdout,
                stderr=stderr,
                max_output=max_output,
                **options,
            )
        except (ExecTimeout, CommandFailed):
            raise
        except ExecError as error:
            raise await self._explain(error) from error.__cause__

    async def start(
        self,
        command: api.Command,
        *,
        stdin: int = PIPE,
        stdout: int = PIPE,
        stderr: int = PIPE,
        pty: tuple[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        cwd: GuestPath | None = None,
        user: str | None = None,
        timeout: float | None = None,
        leave_running: bool = False,
    ) -> Process:
        client = self._agent()
        options = self._inner._defaults(env, cwd, user, timeout)
        try:
            return await client.start(
                api._words(command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pty=pty,
                leave_running=leave_running,
                **options,
            )
        except ExecError as error:
            raise await self._explain(error) from error.__cause__

    async def info(self) -> GuestInfo:
        return await self._agent().info()

    async def ping(self, timeout: float | None = None) -> float:
        return await self._agent().ping(timeout)

    async def shutdown(self, timeout: float = api.SHUTDOWN_TIMEOUT_S) -> Outcome | None:
        self._agent()
        outcome = await on_thread(lambda: self._inner.shutdown(timeout))
        await self.close()
        return outcome

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.close()
        await on_thread(self._inner.close)

    def _agent(self) -> AsyncAgentClient:
        if self._client is None:
            self._inner._agent()
            raise StateError('the sandbox has not been booted: use "async with", or boot()')
        return self._client

    async def _connect(self) -> socket.socket:
        machine = self._inner._machine
        assert machine is not None
        return await on_thread(machine.connect)

    async def _explain(self, error: ExecError) -> ExecError:
        return await on_thread(lambda: self._inner._explain(error))


class Pool:
    """`microvm.Pool` for asyncio."""

    def __init__(self, size: int = 4, image: str | os.PathLike[str] = "python", **options: Any) -> None:
        self._inner = pool.Pool(size, image, **options)

    async def __aenter__(self) -> Self:
        self._inner.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def ready(self) -> int:
        return self._inner.ready

    def start(self) -> None:
        self._inner.start()

    async def take(self, timeout: float | None = None) -> Sandbox:
        inner = self._inner.take(0) if self._inner.ready else None
        return Sandbox._of(inner if inner is not None else await on_thread(lambda: self._inner.take(timeout)))

    async def map(
        self,
        work: Callable[[Sandbox, Any], Awaitable[Any]] | str | Sequence[str],
        items: Iterable[Any],
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
        return_exceptions: bool = False,
    ) -> list[Any]:
        todo = list(items)
        results: list[Any] = [None] * len(todo)
        places = asyncio.Semaphore(self._inner.size)
        done = 0

        async def one(index: int) -> None:
            nonlocal done
            async with places:
                try:
                    results[index] = await self._one(work, todo[index], timeout)
                except Exception as error:
                    if not return_exceptions:
                        raise
                    results[index] = error
            done += 1
            if progress is not None:
                progress(done, len(todo))

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(todo))]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return results

    async def _one(self, work: Any, item: Any, timeout: float | None) -> Any:
        async with await self.take() as sandbox:
            if not callable(work):
                return await sandbox.run(pool.command_for(work, item), timeout=timeout)
            try:
                return await asyncio.wait_for(work(sandbox, item), timeout)
            except TimeoutError:
                raise ExecTimeout(f"the work on {item!r} took longer than {timeout:g} s") from None

    async def close(self) -> None:
        await on_thread(self._inner.close)


async def on_thread(function: Callable[[], T]) -> T:
    """Run ``function`` on a thread of its own and await it.

    Not `asyncio.to_thread`: its pool is small, and a few machines being waited for would hold up everything else.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, failure = None, None
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - carried to the event loop and raised there
            failure = error
        try:
            loop.call_soon_threadsafe(finish, result, failure)
        except RuntimeError:
            pass  # the loop was closed meanwhile: nobody waits any more

    threading.Thread(target=work, name="microvm-aio", daemon=True).start()
    return await future

"""Every error the package raises, sorted by who must act.

    MicroVMError
      ConfigError(ValueError)       the caller asked for the impossible: field, value, allowed
      StateError                    right call, wrong moment
      HostError(OSError)            the host refused: call as the vendor spells it, code, hint
        BackendUnavailable          what to enable, in one sentence
      GuestError                    the guest broke a contract: contained in its own VM
        GuestMemoryError            an address outside guest memory
        VirtqueueError              a ring or a descriptor chain that breaks the specification
        BootError                   the kernel or initrd cannot be booted
      SnapshotError                 a snapshot is corrupt, foreign or newer
      ExecError                     a command could not be run in the guest
        ExecTimeout(TimeoutError)   a command ran longer than it was allowed to
        CommandFailed               a command that was to succeed did not (``check=True``)
        GuestFileError(OSError)     the guest refused a file operation
          GuestFileNotFound(FileNotFoundError)
        WorkerError                 the process that a sandbox ran in ended unexpectedly
      InternalError                 our bug

Attributes carry the data; ``str(error)`` is one lower-case sentence, and a hint is there only when it can be
acted on.
"""

from __future__ import annotations


class MicroVMError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(MicroVMError, ValueError):
    """The caller asked for something that cannot be.

    ``field`` names the setting, ``value`` is what was given, ``allowed`` says in words what would do.
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        shown = value if isinstance(value, str) else repr(value)
        super().__init__(f"{field} {shown}: {allowed}" if shown else f"{field}: {allowed}")


class StateError(MicroVMError):
    """A correct call at the wrong moment, such as starting a machine twice."""


class HostError(MicroVMError, OSError):
    """The host refused a call.

    ``call`` is the vendor's spelling (``KVM_CREATE_VM``, ``WHvSetupPartition``), ``code`` the errno or HRESULT,
    ``hint`` what the person at the machine can do, or the empty string.
    """

    def __init__(self, call: str, code: int, message: str, hint: str = "") -> None:
        self.call = call
        self.code = code
        self.hint = hint
        self.message = message
        OSError.__init__(self, code, message)

    def __str__(self) -> str:
        text = f"{self.call}: {self.message}" if self.call else self.message
        return f"{text} ({self.hint})" if self.hint else text


class BackendUnavailable(HostError):
    """A hypervisor cannot be used on this host; ``hint`` says what to enable."""


class GuestError(MicroVMError):
    """The guest broke a contract. Contained: its device or its VM suffers, the host process does not."""


class GuestMemoryError(GuestError):
    """The guest named memory it does not have."""


class VirtqueueError(GuestError):
    """A virtqueue or descriptor chain breaks [virtio-v1.2] 2.7."""


class BootError(GuestError):
    """The kernel, initrd or command line cannot be booted as given."""


class SnapshotError(MicroVMError):
    """A snapshot is corrupt, truncated, foreign, or newer than this version."""


class ExecError(MicroVMError):
    """A command could not be started or followed in the guest.

    ``code`` is the guest's errno (Linux numbers, whatever the host), 0 when there is none.
    """

    def __init__(self, message: str, code: int = 0) -> None:
        self.code = code
        super().__init__(message)

    @property
    def exit_code(self) -> int:
        """What a shell would exit with: 127 for a command that is not there, 126 for one that cannot be run."""
        return 127 if self.code == 2 else 126


class ExecTimeout(ExecError, TimeoutError):
    """A command ran longer than allowed and was ended.

    ``stdout`` and ``stderr`` hold what it had written by then.
    """

    def __init__(self, message: str, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(message)


class CommandFailed(ExecError):
    """A command ended with another code than 0 although the caller asked for success.

    ``returncode`` is as in ``subprocess``: negative for a signal. ``stdout`` and ``stderr`` hold its output.
    """

    def __init__(self, message: str, returncode: int, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(message)


class GuestFileError(ExecError, OSError):
    """The guest refused a file operation; ``errno`` and ``filename`` are the guest's."""

    def __init__(self, code: int, reason: str, path: str) -> None:
        ExecError.__init__(self, reason, code)
        self.errno = code
        self.strerror = reason
        self.filename = path

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class GuestFileNotFound(GuestFileError, FileNotFoundError):
    """The guest has no such file."""


class WorkerError(ExecError):
    """The process that a sandbox's machine ran in ended: it crashed, or was killed. No other sandbox is touched."""


class InternalError(MicroVMError):
    """A bug of ours: the message is for a report, not for the user to act on."""

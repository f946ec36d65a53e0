"""The WHP backend's front door."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from ...errors import BackendUnavailable, HostError
from ..base import Availability, PartitionConfig
from ..trial import run_trial
from . import codes
from .api import Api, default_api
from .failures import ENABLE_HINT
from .features import capability
from .partition import WhpPartition


class WhpHypervisor:
    """Windows Hypervisor Platform. ``api`` is for simulators and tests; else WinHvPlatform.dll when first needed."""

    name = "whp"

    def __init__(self, api: Api | None = None) -> None:
        self._api = api

    @property
    def api(self) -> Api:
        """The functions. Raises BackendUnavailable where they cannot be loaded."""
        if self._api is None:
            self._api = default_api()
        return self._api

    def create_partition(self, config: PartitionConfig) -> WhpPartition:
        """An empty partition. Raises BackendUnavailable with a hint, ConfigError."""
        api = self.api
        present = ctypes.c_int32()
        known = capability(api, codes.WHvCapabilityCodeHypervisorPresent, present)
        if not known or not present.value:
            raise BackendUnavailable(
                "WHvGetCapability",
                codes.ERROR_HV_NOT_PRESENT,
                "Windows says that no hypervisor is running",
                ENABLE_HINT,
            )
        return WhpPartition(api, config)

    def questions(self) -> dict[str, Callable[[], tuple[str, bool | None]]]:
        """WHP's own questions for ``microvm selftest`` (`hypervisor.questions`)."""
        from .questions import questions

        return questions(self)

    def probe(self) -> Availability:
        """See `base.Hypervisor.probe`. A feature that looks enabled proves nothing, so a partition is really made."""
        try:
            trial = run_trial(self)
        except BackendUnavailable as error:
            what = f"{error.call}: {error.message}" if error.call else error.message
            return Availability(self.name, False, what, error.hint)
        except HostError as error:
            return Availability(self.name, False, str(error), "please report this with `microvm selftest --json`")
        if trial.failure:
            return Availability(self.name, False, trial.failure, "please report this with `microvm selftest --json`")
        mips, exits_per_second = round(trial.mips, 1), float(round(trial.exits_per_second))
        reason = "Windows Hypervisor Platform runs guests on the processor"
        return Availability(self.name, True, reason, "", True, mips, exits_per_second)

"""``microvm selftest``: every question is answered, and the exit code says what came of it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("iced_x86")
pytest.importorskip("unicorn")

from microvm.cli import main
from microvm.errors import HostError
from microvm.hypervisor import questions
from microvm.testing.simulated_whp import PROFILES, SimulatedWhp


@pytest.mark.parametrize("profile", PROFILES)
def test_every_question_is_answered(profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    with SimulatedWhp(profile).installed():
        code = main(["selftest", "--backend", "whp", "--json"])
    report = json.loads(capsys.readouterr().out)
    answers = {answer["question"]: answer for answer in report["answers"]}
    assert [name for name, answer in answers.items() if answer["good"] is False] == []
    assert code == 0
    assert answers.keys() >= questions.QUESTIONS.keys()
    assert answers.keys() >= {"properties", "cancel", "registers", "functions"}


def test_backend_that_cannot_be_used_is_exit_69_with_what_to_enable(capsys: pytest.CaptureFixture[str]) -> None:
    with SimulatedWhp(present=False).installed():
        assert main(["selftest", "--backend", "whp"]) == 69
    assert "HypervisorPlatform" in capsys.readouterr().err


def test_question_that_fails_does_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(backend: object) -> tuple[str, bool]:
        raise HostError("WHvMapGpaRange", 5, "no")

    monkeypatch.setattr(questions, "QUESTIONS", {"broken": broken, "speed": questions.speed})
    with SimulatedWhp().installed():
        assert main(["selftest", "--backend", "whp"]) == 1
    out = capsys.readouterr().out
    assert "NO broken            HostError: WHvMapGpaRange: no" in out
    assert "ok speed" in out

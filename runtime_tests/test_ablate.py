"""tools.ablate changes one choice at a time, keeps what it has measured, and leaves blank what it has not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from l4q.errors import UsageError
from tools import ablate
from tools.reproduction.recipe import MODELS

AXES = {"initialisation": ("init", ("l4q", "calibrated")), "rate": ("scale_share", (0.05, 1.0))}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three variants of two steps; the first step of a warm-up moves nothing."""
    monkeypatch.setattr(ablate, "AXES", AXES)
    tiny = replace(MODELS["glassllm"], steps=2, batch=2, eval_windows=4, calibration=4)
    monkeypatch.setattr(ablate, "MODELS", {"glassllm": tiny})


def test_every_choice_is_one_run_and_is_kept(glassllm_dir: Path, tmp_path: Path) -> None:
    """Untrained first, then trained; the point that axes share is measured once, and nothing twice."""
    assert len(list(ablate.variants(ablate.Variant(bits=3)))) == 3
    options = ["--seeds", "0", "--assets", str(glassllm_dir.parent), "--out", str(tmp_path)]
    runner = CliRunner()
    first = runner.invoke(ablate.command, [*options, "--untrained"], catch_exceptions=False)
    assert json.loads(first.stdout.splitlines()[-1])["initialisation"] == {"l4q": None, "calibrated": None}
    started = {path.name for path in tmp_path.glob("3bit-*.json")}
    assert len(started) == 2, "a learning rate changes nothing before training"
    second = runner.invoke(ablate.command, options, catch_exceptions=False)
    found = json.loads(second.stdout.splitlines()[-1])
    assert found["initialisation"]["calibrated"] == found["rate"]["0.05"]
    assert found["rate"]["1.0"] != found["rate"]["0.05"]
    files = sorted(tmp_path.glob("3bit-*.json"))
    assert len(files) == 3
    stamps = [path.stat().st_mtime_ns for path in files]
    third = runner.invoke(ablate.command, options, catch_exceptions=False)
    assert third.stdout == second.stdout
    assert [path.stat().st_mtime_ns for path in files] == stamps
    with pytest.raises(UsageError, match="another recipe"):
        runner.invoke(ablate.command, [*options, "--steps", "3"], catch_exceptions=False)

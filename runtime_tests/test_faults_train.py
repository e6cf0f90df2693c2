"""Training and freezing, killed again and again: what has a final name is whole, and the last bytes are the same."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from exporters.check_folder import check_folder
from l4q.train_state import is_intact, list_states
from runtime_tests.fault_checks import ROUNDS, hidden, moments, tree
from runtime_tests.fault_hooks import Fault
from runtime_tests.fault_worker import FaultWorker, wait_until_stopped
from runtime_tests.reliability import record
from runtime_tests.train_runs import metrics, write_pairs

STEPS = 6
TRAIN_KILLS, FREEZE_KILLS = 14, 6


class Runs:
    """Command lines of a short run, and the run that nobody disturbed."""

    def __init__(self, folder: Path, glassllm_dir: Path, worker: FaultWorker) -> None:
        self.worker = worker
        self.whole = folder / "whole"
        self._model = glassllm_dir
        self._data = write_pairs(glassllm_dir, folder / "pairs.jsonl")
        outcome = worker.run(self.train(self.whole), self.whole)
        assert outcome.status == 0, outcome.text
        self.changes = outcome.changes

    def train(self, out: Path, *options: str) -> list[str]:
        """A run of 6 steps with a saved state after every second."""
        command = ["l4q-train", str(self._model), "--data", str(self._data), "--out", str(out), "--leave-dense"]
        command += ["--steps", str(STEPS), "--save-every", "2", "--rank", "4", "--dropout", "0.1", "--max-length", "32"]
        return [*command, "--batch-size", "2", "--kernels", "eager", *options]

    def freeze(self, out: Path, *options: str) -> list[str]:
        """The same run's last state onto a grid with integer zero-points."""
        return ["l4q-freeze", str(self.whole), "--out", str(out), *options]


@pytest.fixture(scope="module")
def runs(glassllm_dir: Path, fault_worker: FaultWorker, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One undisturbed run for all tests."""
    return Runs(tmp_path_factory.mktemp("runs"), glassllm_dir, fault_worker)


def results(run: Path) -> tuple[dict[str, str], dict[str, str], list[float]]:
    """What must not depend on interruptions: the checkpoint's and the last state's bytes, and the losses.

    The Trainer's own log, and the manifest with its hash, hold seconds.
    """
    timed = ("trainer_state.json", "state.json")
    state = {name: digest for name, digest in tree(run / f"state-{STEPS}").items() if name not in timed}
    return tree(run / "checkpoint"), state, [line["loss"] for line in metrics(run)]


def require_whole(run: Path) -> None:
    """Whatever has its final name is complete."""
    assert all(is_intact(folder) for _, folder in list_states(run)) if run.exists() else True
    if (run / "checkpoint").exists():
        assert check_folder(run / "checkpoint").passed


def test_killed_training_ends_with_the_same_bytes(runs: Runs, tmp_path: Path) -> None:
    """A run killed at random changes, resumed, and killed again, ends with the undisturbed run's files and losses."""
    generator, kills, number = random.Random("train"), 0, 0
    while kills < TRAIN_KILLS * ROUNDS:
        out, status = tmp_path / str(number), -9
        while status == -9:
            fault = Fault(at=generator.randint(1, runs.changes * 2 // 3) if kills < TRAIN_KILLS * ROUNDS else 0)
            ended = runs.worker.run(runs.train(out, "--resume"), out, fault)
            status = ended.status
            kills += status == -9
            require_whole(out)
        assert status == 0, ended.text
        assert results(out) == results(runs.whole)
        assert not hidden(out)
        assert not hidden(tmp_path)
        number += 1
    outcome = "saved states whole; resumed, final checkpoint, state and losses equal an undisturbed run's"
    record("train", "SIGKILL before the n-th change of the run folder, several times a run", kills, outcome)


def test_other_steps_are_other_bytes(runs: Runs, tmp_path: Path) -> None:
    """The twin: the comparison notices a run with another seed."""
    assert runs.worker.run(runs.train(tmp_path / "run", "--seed", "1"), tmp_path).status == 0
    different = [one != other for one, other in zip(results(tmp_path / "run"), results(runs.whole), strict=True)]
    assert different == [True, True, True]


def test_killed_freeze_is_complete_or_absent(runs: Runs, tmp_path: Path) -> None:
    """As for exports: the target is as it was or complete after a kill, and the next freeze gives the same bytes."""
    undisturbed = runs.worker.run(runs.freeze(tmp_path / "whole"), tmp_path)
    assert undisturbed.status == 0, undisturbed.text
    whole, count = tree(tmp_path / "whole"), FREEZE_KILLS * ROUNDS
    for number, moment in enumerate(moments("freeze", undisturbed.changes, count)):
        out = tmp_path / f"{number}" / "frozen"
        if number % 2:
            shutil.copytree(runs.whole / "checkpoint", out)
            (out / "LICENSE").write_text("of the old one")
        before = tree(out)
        killed = runs.worker.run(runs.freeze(out, "--overwrite"), tmp_path, Fault(at=moment))
        assert killed.status == -9, killed.text
        assert tree(out) in (before, whole)
        again = runs.worker.run(runs.freeze(out, "--overwrite"), tmp_path)
        assert again.status == 0, again.text
        assert tree(out) == whole
        assert not hidden(out.parent)
    outcome = "target as it was or complete; the next run's bytes equal an undisturbed one's; nothing left over"
    record("freeze", "SIGKILL before the n-th change of its folder", count, outcome)


@pytest.mark.parametrize(("action", "status"), [("terminate", 143), ("interrupt", 130), ("disk full", 74)])
def test_interrupted_training_can_be_resumed(action: str, status: int, runs: Runs, tmp_path: Path) -> None:
    """A signal or a full disk in mid-run ends it with one message; the run goes on to the same bytes."""
    out = tmp_path / "run"
    ended = runs.worker.run(runs.train(out), out, Fault(at=runs.changes // 2, action=action))
    assert (ended.status, "Traceback" in ended.text) == (status, False), ended.text
    assert not hidden(tmp_path)
    require_whole(out)
    assert runs.worker.run(runs.train(out, "--resume"), out).status == 0
    assert results(out) == results(runs.whole)
    record("train", f"{action} in mid-run", 1, f"exit code {status}, one message; resumed to the same bytes")


def test_one_training_per_run_folder(runs: Runs, tmp_path: Path) -> None:
    """A second training into a run folder is refused with the first one's process id, and does not disturb it."""
    out = tmp_path / "run"
    first = runs.worker.start(runs.train(out), out, Fault(at=runs.changes // 2, action="stop"))
    wait_until_stopped(first[0])
    for option in ("--resume", "--overwrite"):
        second = runs.worker.run(runs.train(out, option), out)
        assert second.status == 75, second.text
        assert f"process {first[0]} on" in second.text
    runs.worker.go_on(first)
    ended = runs.worker.wait(first)
    assert ended.status == 0, ended.text
    assert results(out) == results(runs.whole)
    record("train", "second training into the same run folder", 2, "refused with exit code 75; the first undisturbed")

"""Files from strangers: every attack ends in one clear error, in bounded time and memory, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.attacks.bases import build_bases, copy_base
from runtime_tests.attacks.catalog import ATTACKS, GOOD, Attack
from runtime_tests.attacks.runner import GROWTH
from runtime_tests.reliability import record

PROJECT = Path(__file__).resolve().parent.parent
LONGEST_MESSAGE = 6000
SLOW = ("train", "train hub id", "data")
"""Entries that load transformers' machinery, some tenths of a second each."""

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good folders of every kind."""
    return build_bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def ask(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Run an entry on a folder in a forked process of one warm runner."""
    scratch, number = tmp_path_factory.mktemp("scratch"), 0
    command = [sys.executable, "-m", "runtime_tests.attacks.runner"]
    places = json.dumps({name: str(path) for name, path in bases.items()})
    with subprocess.Popen([*command, places], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def run(entry: str, folder: Path, flags: tuple[str, ...] = ()) -> dict[str, Any]:
            nonlocal number
            number += 1
            asked = {"entry": entry, "folder": str(folder), "scratch": str(scratch / str(number)), "flags": flags}
            stdin.write(json.dumps(asked).encode() + b"\n")
            stdin.flush()
            return dict(json.loads(stdout.readline()))

        yield run
        stdin.close()


@pytest.fixture(scope="module")
def tally() -> Iterator[Counter[str]]:
    """Attacks that were refused by all their entries, per area; recorded once all of an area were."""
    refused: Counter[str] = Counter()
    yield refused
    whole = Counter(attack.area for attack in ATTACKS)
    for area, count in refused.items():
        if count == whole[area]:
            outcome = "one clear error, nothing written, bounded memory and time"
            record("hostile input", f"attack: {area}", count, outcome)


def chosen(attack: Attack) -> tuple[str, ...]:
    """The entries to run: all with L4Q_ATTACKS=all; else one in turns, a quick one if there is any."""
    number = ATTACKS.index(attack)
    quick = [entry for entry in attack.entries if entry not in SLOW]
    if os.environ.get("L4Q_ATTACKS") == "all":
        return attack.entries
    turn = quick or attack.entries
    return (turn[number % len(turn)],)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.label)
def test_an_attack_is_refused(
    attack: Attack, bases: dict[str, Path], ask: Ask, tally: Counter[str], tmp_path: Path
) -> None:
    """The damaged folder ends every command and reader that reads it with one message and l4q's exit codes."""
    folder = copy_base(bases[attack.base], tmp_path / "model")
    attack.change(folder)
    for entry in chosen(attack):
        answer = ask(entry, folder, attack.flags)
        message = answer["stderr"]
        assert answer["outcome"] == "refused", (entry, answer)
        assert message.count("error: ") == 1, (entry, message)
        assert "Traceback" not in message
        assert all(sign.isprintable() or sign in "\n\r\t\x1b" for sign in message.partition("error: ")[2])
        assert len(message) < LONGEST_MESSAGE
        assert answer["grown"] < GROWTH, (entry, answer["grown"])
    tally[attack.area] += 1


@pytest.mark.parametrize(("base", "entry"), GOOD)
def test_what_is_not_damaged_is_accepted(base: str, entry: str, bases: dict[str, Path], ask: Ask) -> None:
    """The twin of the attacks: the same entries take the folders they were made from."""
    answer = ask(entry, bases[base])
    assert answer["outcome"] == "accepted", answer
    assert answer["grown"] < GROWTH


def test_there_are_enough_attacks() -> None:
    """More than a hundred distinct ones, each under a name of its own."""
    assert len({attack.label for attack in ATTACKS}) == len(ATTACKS) > 300


def test_the_runner_tells_what_goes_wrong(ask: Ask, tmp_path: Path) -> None:
    """The twin of the runner: an entry that does not exist is no refusal, so a crash cannot pass for one."""
    answer = ask("no such entry", tmp_path)
    assert answer["outcome"] == "unexpected"
    assert "KeyError" in answer["stderr"]

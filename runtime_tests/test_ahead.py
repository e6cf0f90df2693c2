"""What another thread makes ahead of a loop arrives whole and in order; errors on either side end both."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from l4q import prefix_hash
from l4q.ahead import BATCH_BYTES, made_ahead
from l4q.journal import Journal


def numbers(count: int, made: list[int]) -> Iterator[int]:
    """0, 1, ...; what was made so far is in `made`."""
    for number in range(count):
        made.append(number)
        yield number


def collect(source: Iterator[int], seen: list[int], room: int = 10) -> None:
    """Keep what comes, one item a batch, while there is room."""
    with made_ahead(source, lambda item: BATCH_BYTES) as items:
        for item in items:
            if len(seen) == room:
                raise OSError("no space")
            seen.append(item)


@pytest.mark.parametrize("nbytes", [1, BATCH_BYTES // 3, BATCH_BYTES])
def test_everything_arrives_in_order(nbytes: int) -> None:
    """Whether items are handed over one by one or in batches, the loop sees what it would have seen without."""
    with made_ahead(numbers(50, []), lambda item: nbytes) as items:
        assert list(items) == list(range(50))


def test_little_is_made_ahead() -> None:
    """One item waits and one is being made: memory does not depend on how much there is to make."""
    made: list[int] = []
    with made_ahead(numbers(50, made), lambda item: BATCH_BYTES) as items:
        for item in items:
            assert len(made) <= item + 3


def test_an_error_comes_behind_what_was_made() -> None:
    """The loop gets what was made before, then the error itself, with its traceback."""

    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise KeyError("the third")

    seen: list[int] = []
    with pytest.raises(KeyError, match="the third"):
        collect(broken(), seen)
    assert seen == [1, 2]


def test_a_loop_that_is_left_leaves_no_thread() -> None:
    """An error in the loop ends the making, though much is left to make."""
    made: list[int] = []
    with pytest.raises(OSError, match="no space"):
        collect(numbers(10**9, made), [], room=1)
    assert not [thread for thread in threading.enumerate() if thread.name == "l4q-ahead"]
    assert len(made) < 10


@pytest.mark.parametrize("held", [0, 1 << 30])
def test_pieces_at_hand_are_hashed_like_pieces_read_back(
    held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of which the hashing thread gets the memory, some in order and some not, give the hash of the file."""
    monkeypatch.setattr(prefix_hash, "_STEP_BYTES", 100)
    monkeypatch.setattr(prefix_hash, "_HELD_BYTES", held)
    monkeypatch.setattr(prefix_hash, "_PATIENCE", 0.01)
    rng = np.random.default_rng(0)
    busy = threading.Event()
    journal = Journal.open(tmp_path, lambda: {"work": str(busy.wait(0.2))})  # the thread has something else to do
    path = tmp_path / "data"
    with path.open("wb", buffering=0) as file:
        advance = journal.follow(path, path.name)
        for number in range(60):
            start, data = file.tell(), rng.integers(0, 256, 37, dtype=np.uint8)
            file.write(data.tobytes() + bytes(number % 3))
            if number % 5:
                advance(file.tell(), start, data)
            elif number % 10:
                advance(file.tell())
    journal.add(path)
    facts = journal.table()["data"]
    journal.stop()
    assert facts == {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size}

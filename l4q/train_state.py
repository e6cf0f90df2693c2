"""Saved training states: everything needed to continue a run bit for bit, in safetensors and JSON only.

    state-<step>/
      trainable.safetensors            A, B, s, b by parameter name
      optimizer.safetensors            moments by "<parameter>/<key>"
      optimizer.json                   the parameter groups
      scheduler.json                   learning-rate schedule
      rng-<rank>.safetensors, .json    torch generators, and those of Python and NumPy, of every process
      trainer_state.json               transformers' step counters and log
      state.json                       step, format version and the sha256 of every file above

A sharded model's tensors stand in one file per process instead, trainable-00001-of-00002.safetensors and so on: each
holds the rows its process keeps, and "rows" in its metadata says which. `saved_tensors` reads both.

A state is written under another name and renamed last; it is trusted only if every hash in state.json matches.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from l4q.durable import sync_file, write_atomic
from l4q.errors import UsageError
from l4q.files import discard
from l4q.state_tensors import load_tensors, save_sharded, save_tensors, saved_tensors

if TYPE_CHECKING:
    import torch

STATE_FORMAT = 1
MANIFEST = "state.json"
TRAINABLE = "trainable.safetensors"
OPTIMIZER = "optimizer.safetensors"
_FOLDER = re.compile(r"state-(\d+)")


def state_folder(run: Path, step: int) -> Path:
    """Where the state after `step` optimizer steps lies."""
    return run / f"state-{step}"


def list_states(run: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every state folder that has its final name, oldest first; contents are not checked."""
    matches = [(_FOLDER.fullmatch(path.name), path) for path in run.iterdir() if path.is_dir()]
    return sorted((int(match.group(1)), path) for match, path in matches if match)


def newest_state(run: Path) -> tuple[int, Path] | None:
    """The newest state whose files are all there and unchanged, or None."""
    return next(((step, path) for step, path in reversed(list_states(run)) if is_intact(path)), None)


def is_intact(folder: Path) -> bool:
    """Whether the manifest is readable and every file it lists has the hash it lists."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        return manifest["format_version"] == STATE_FORMAT and all(
            _sha256(folder / name) == digest for name, digest in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def seal_state(folder: Path, step: int) -> None:
    """Hash and flush every file of a state, then write its manifest."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    for path in paths:
        sync_file(path)
    files = {path.name: _sha256(path) for path in paths}
    write_json(folder / MANIFEST, {"format_version": STATE_FORMAT, "step": step, "files": files})


def prune_states(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` states."""
    for _, path in list_states(run)[:-keep]:
        discard(path)


def save_optimizer(folder: Path, optimizer: Any, names: Mapping[torch.Tensor, str]) -> None:
    """Write an optimizer's moments and groups; called by every process of the run.

    Args:
        folder: A state folder, the same for all processes.
        optimizer: A torch optimizer; its per-parameter state may hold tensors and JSON numbers.
        names: The name of every parameter it updates.
    """
    import torch

    from l4q.distributed import is_main

    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, Any] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups.append({**group, "params": [names[parameter] for parameter in group["params"]]})
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                target: dict[str, Any] = tensors if isinstance(value, torch.Tensor) else numbers
                target[f"{names[parameter]}/{key}"] = value
    save_sharded(folder / OPTIMIZER, tensors)
    if is_main():
        write_json(folder / "optimizer.json", {"groups": groups, "numbers": numbers})


def load_optimizer(folder: Path, optimizer: Any, names: Mapping[torch.Tensor, str]) -> None:
    """Restore what `save_optimizer` wrote.

    Raises:
        UsageError: The state was saved for other parameters or other groups.
    """
    record = read_json(folder / "optimizer.json")
    current = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in record["groups"]]
    if saved != current:
        odd = sorted({name for group in saved for name in group} ^ {name for group in current for name in group})
        raise UsageError(
            "the saved optimizer belongs to other parameters",
            where=folder,
            got=odd[:5] or "the same parameters in another order",
            expected="the model, target modules and zero_point the state was saved with",
        )
    order = [name for group in current for name in group]
    parameters = {names[parameter]: parameter for group in optimizer.param_groups for parameter in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    saved_values = saved_tensors(folder / OPTIMIZER)
    index_of = {name: index for index, name in enumerate(order)}
    for entry in [*saved_values, *record["numbers"]]:
        name, _, key = entry.rpartition("/")
        value = saved_values.part(entry, parameters[name]) if entry in saved_values else record["numbers"][entry]
        state.setdefault(index_of[name], {})[key] = value
    groups = [
        {
            **{key: _tuples(value) for key, value in group.items()},
            "params": [index_of[name] for name in group["params"]],
        }
        for group in record["groups"]
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def save_rng(folder: Path, rank: int) -> None:
    """Write the random generators of this process: Python, NumPy, torch and every CUDA device it sees."""
    import torch

    version, key, gauss = random.getstate()
    algorithm, words, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [algorithm, [int(word) for word in words], position, has_gauss, cached]
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    save_tensors(folder / f"rng-{rank}.safetensors", tensors)
    write_json(folder / f"rng-{rank}.json", {"python": [version, list(key), gauss], "numpy": numpy_state})


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote.

    Raises:
        UsageError: The state was saved by fewer processes.
    """
    import torch

    path = folder / f"rng-{rank}.json"
    if not path.is_file():
        raise UsageError(
            "the state was saved by fewer processes",
            where=path,
            got=f"no generator state for process {rank}",
            remedy="resume with as many processes as the run was started with",
        )
    record = read_json(path)
    version, key, gauss = record["python"]
    random.setstate((version, tuple(key), gauss))
    algorithm, words, position, has_gauss, cached = record["numpy"]
    np.random.set_state((algorithm, np.array(words, dtype=np.uint32), position, has_gauss, cached))
    tensors = load_tensors(folder / f"rng-{rank}.safetensors")
    torch.set_rng_state(tensors.pop("cpu"))
    for name, state in tensors.items():
        index = int(name.removeprefix("cuda."))
        if torch.cuda.is_available() and index < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, index)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either old or new, never half, also after a power cut."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

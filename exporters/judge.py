"""Dense 3-bit words need compressed-tensors 0.18 or later as their judge, and vLLM 0.32 pins 0.17.

0.17 packs ten 3-bit values a word with two bits to spare; since 0.18 the words are dense, as in GPTQ and in vLLM's own
loader. Where the installed one is too old, a newer one in a folder of its own (L4Q_JUDGES) reads in another process:
two versions of a package do not live in one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import IO, cast

import numpy as np

from exporters.environment import minimal_environment
from exporters.words import WORD_BITS
from l4q.errors import L4QError, UnsupportedError, UsageError, VerificationError
from l4q.weight import F32

JUDGES_VARIABLE = "L4Q_JUDGES"
"""Environment variable: the folder that `pip install --target` filled."""
JUDGE = "compressed-tensors"
DENSE_SINCE = (0, 18)
PROJECT = Path(__file__).resolve().parent.parent
ERRORS = {kind.__name__: kind for kind in (L4QError, UnsupportedError, UsageError, VerificationError)}
TAIL_CHARS = 2000
ONLY = "only.json"
"""In the other process's scratch folder: the modules to read, all if it is missing."""


def needs_newer_judge(bits: int) -> bool:
    """Whether the installed compressed-tensors reads fields of `bits` bits in words other than ours.

    Raises:
        UsageError: It is not installed.
    """
    if WORD_BITS % bits == 0:
        return False
    try:
        found = version(JUDGE)
    except PackageNotFoundError as error:
        raise UsageError(
            f"verifying {bits}-bit fields needs the compressed-tensors package, whose decoder judges the bits",
            got=error,
            remedy="pip install 'compressed-tensors>=0.18', or export with --no-verify",
        ) from error
    return _is_old(found)


def read_elsewhere(name: str, folder: Path, only: Collection[str] | None = None) -> Iterator[tuple[str, F32]]:
    """What `read_back(folder, only)` of the format yields, from a process that imports the reader from L4Q_JUDGES.

    Raises:
        UsageError: The variable is unset, or its folder holds no such package.
        L4QError: Of the class that the other process raised.
    """
    judges = _judges()
    paths = [str(judges), str(PROJECT), os.environ.get("PYTHONPATH", "")]
    environment = {**minimal_environment(), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with tempfile.TemporaryDirectory(prefix="l4q-judge-") as scratch, open(Path(scratch) / "log", "w+b") as log:
        command = [sys.executable, "-m", "exporters.judge_child", name, str(folder), scratch]
        if only is not None:
            (Path(scratch) / ONLY).write_text(json.dumps(sorted(only)), encoding="utf-8")
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
        )
        try:
            yield from _answers(process, Path(scratch))
        finally:
            process.kill()
            process.communicate()


def _answers(process: subprocess.Popen[str], scratch: Path) -> Iterator[tuple[str, F32]]:
    questions, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)  # both are pipes
    for line in answers:
        answer = json.loads(line)
        if "error" in answer:
            raise ERRORS.get(answer["error"], L4QError)(answer["message"])
        if "end" in answer:
            return
        yield answer["module"], np.load(scratch / answer["array"], allow_pickle=False)
        questions.write("next\n")
        questions.flush()
    code = process.wait()  # only then is the log complete
    log = (scratch / "log").read_text(encoding="utf-8", errors="replace")[-TAIL_CHARS:]
    raise VerificationError("the reader in another process died", got=log.strip() or f"exit code {code}")


def _judges() -> Path:
    value = os.environ.get(JUDGES_VARIABLE)
    found = [dist.version for dist in distributions(name=JUDGE, path=[value])] if value else []
    if value and found and not _is_old(found[0]):
        return Path(value).resolve()
    raise UsageError(
        "verifying dense 3-bit fields needs compressed-tensors 0.18 or later; the installed one packs ten a word",
        where=JUDGES_VARIABLE,
        got=f"{value}: {f'version {found[0]}' if found else 'no such package'}" if value else "not set",
        expected="a folder with compressed-tensors 0.18 or later",
        remedy=f"pip install --no-deps --target JUDGES 'compressed-tensors>=0.18' and set {JUDGES_VARIABLE}=JUDGES; "
        "or export with --no-verify; or leave --container-bits out",
    )


def _is_old(found: str) -> bool:
    return tuple(int(part) for part in found.split(".")[:2]) < DENSE_SINCE

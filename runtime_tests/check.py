"""`parity`: exported folders against their checkpoint on a text, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from runtime_tests.parity_runs import ParityOptions, ParityReport, assert_parity, run_parity
from runtime_tests.run import read_windows
from runtime_tests.targets import detect


def parity(
    checkpoint: str | Path,
    exports: Iterable[str | Path],
    *,
    text: str | Path,
    windows: int = 4,
    window: int = 512,
    options: ParityOptions | None = None,
) -> ParityReport:
    """Run every export in its runtime on the same tokens as torch on the checkpoint, and insist that they agree.

    Args:
        checkpoint: L4Q checkpoint folder.
        exports: Folders written by l4q-export.
        text: UTF-8 file of held-out text.
        windows: Windows from the text's middle.
        window: Tokens per window.
        options: Threads, time limits, interpreters; without a prompt, generation continues the first window.

    Raises:
        UsageError: A folder or the text cannot be read.
        VerificationError: A runtime differs by more than `runtime_tests.thresholds` allows, or failed.
    """
    targets = [target for folder in exports for target in detect(folder)]
    ids, prompt = read_windows(Path(checkpoint), Path(text), windows, window)
    options = options or ParityOptions()
    report = run_parity(checkpoint, targets, ids, replace(options, prompt=tuple(options.prompt) or tuple(prompt)))
    assert_parity(report)
    return report

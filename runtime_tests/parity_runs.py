"""`run_parity`: the same token ids through every runtime, each against the torch float32 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporters.driver import EXPORTERS, get_exporter
from exporters.verify import verify
from l4q.checkpoint import L4QCheckpoint
from l4q.errors import L4QError, VerificationError
from runtime_tests.compare import F32, LogprobComparison, ParityStats, TokenTrace
from runtime_tests.engines.host import RemoteEngine
from runtime_tests.targets import ParityTarget
from runtime_tests.thresholds import CheckResult, limits_for

Progress = Callable[[str, int, int], None]
"""Called as progress(label, done, total) while a target runs."""


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """How the runtimes are run."""

    prompt: Sequence[int] = ()
    """Token ids that greedy generation continues; empty skips generation."""
    new_tokens: int = 48
    timeout_s: float = 900.0
    threads: int = 2
    pythons: dict[str, str] = field(default_factory=dict)
    """engine -> interpreter that has it; the current one otherwise."""
    check_bits: bool = True
    """Also decode each export with foreign decoders."""


@dataclass(frozen=True, kw_only=True)
class ParityRow:
    """One engine's result."""

    target: ParityTarget
    info: dict[str, Any] = field(default_factory=dict)
    stats: ParityStats | None = None
    trace: TokenTrace | None = None
    """Token by token, for the report's charts; not part of `to_dict`."""
    checks: tuple[CheckResult, ...] = ()
    exact: int | None = None
    """Tensors a foreign decoder finds bit-identical; None if that was not checked."""
    total: int = 0
    tokens_per_s: float | None = None
    """Greedy decode, batch 1."""
    greedy_match: tuple[int, int] | None = None
    """Leading generated tokens equal to the oracle's, of how many."""
    error: str | None = None
    skipped: str | None = None
    """Why the runtime was not started; its bits are judged all the same."""

    @property
    def passed(self) -> bool:
        """Every bound held, every tensor was exact, the engine ran or is known not to load such a folder."""
        exact = self.exact is None or self.exact == self.total
        ran = bool(self.checks) and all(check.passed for check in self.checks)
        return self.error is None and exact and (ran or self.skipped is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        target = self.target
        return {
            "runtime": target.engine,
            "format": target.format,
            "variant": target.variant,
            "folder": str(target.folder),
            "bytes": target.nbytes,
            "bits_per_weight": target.bits_per_weight,
            "bit_exact": self.exact,
            "quantized_tensors": self.total,
            **(self.stats.to_dict() if self.stats else {}),
            "tokens_per_s": self.tokens_per_s,
            "greedy_match": list(self.greedy_match) if self.greedy_match else None,
            "checks": [check.to_dict() for check in self.checks],
            "info": self.info,
            "error": self.error,
            "skipped": self.skipped,
            "passed": self.passed,
        }


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """All rows, with the oracle's own figures."""

    checkpoint: Path
    tokens: int
    oracle_perplexity: float
    oracle_tokens_per_s: float | None
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        """Whether a runtime was compared and every row passed."""
        return any(row.skipped is None for row in self.rows) and all(row.passed for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "checkpoint": str(self.checkpoint),
            "tokens": self.tokens,
            "oracle": {"perplexity": self.oracle_perplexity, "tokens_per_s": self.oracle_tokens_per_s},
            "passed": self.passed,
            "rows": [row.to_dict() for row in self.rows],
        }


@dataclass(frozen=True, kw_only=True)
class Oracle:
    """The reference answers, computed once."""

    windows: tuple[list[int], ...]
    logprobs: tuple[F32, ...]
    stats: ParityStats
    greedy: list[int]
    tokens_per_s: float | None


def run_oracle(
    checkpoint: str | Path, windows: Sequence[list[int]], options: ParityOptions, progress: Progress = lambda *_: None
) -> Oracle:
    """Run torch float32 on the dequantized checkpoint.

    Raises:
        EngineError: torch could not load or run it.
    """
    comparison = LogprobComparison()
    answers: list[F32] = []
    target = ParityTarget(format="l4q", engine="torch", variant="", folder=Path(checkpoint))
    with _engine(target, options, _longest(windows, options)) as engine:
        for number, window in enumerate(windows):
            answers.append(engine.prompt_logprobs(window))
            comparison.add(window, answers[-1], answers[-1])
            progress("oracle", number + 1, len(windows))
        greedy, speed = _generate(engine, options)
    return Oracle(
        windows=tuple(windows), logprobs=tuple(answers), stats=comparison.stats, greedy=greedy, tokens_per_s=speed
    )


def run_target(
    checkpoint: L4QCheckpoint,
    target: ParityTarget,
    oracle: Oracle,
    options: ParityOptions,
    progress: Progress = lambda *_: None,
) -> ParityRow:
    """Run one engine and judge it; whatever goes wrong inside it becomes the row's error.

    A runtime that is known not to load the folder (`target.refused`) is not started: its row says so.
    """
    exact, problem = _exact_tensors(checkpoint, target) if options.check_bits else (None, None)
    total = len(checkpoint.modules)
    if target.refused:
        return ParityRow(target=target, exact=exact, total=total, error=problem, skipped=target.refused)
    comparison = LogprobComparison()
    try:
        with _engine(target, options, _longest(oracle.windows, options)) as engine:
            for number, (window, expected) in enumerate(zip(oracle.windows, oracle.logprobs, strict=True)):
                comparison.add(window, expected, engine.prompt_logprobs(window))
                progress(target.label, number + 1, len(oracle.windows))
            generated, speed = _generate(engine, options)
            info = engine.info()
    except L4QError as error:
        return ParityRow(target=target, exact=exact, total=total, error=str(error))
    stats = comparison.stats
    return ParityRow(
        target=target,
        info=info,
        stats=stats,
        trace=comparison.trace,
        checks=tuple(limit.check(stats) for limit in limits_for(target.format, target.variant)),
        exact=exact,
        total=total,
        tokens_per_s=speed,
        greedy_match=(_common_prefix(generated, oracle.greedy), len(oracle.greedy)) if oracle.greedy else None,
        error=problem,
    )


def run_parity(
    checkpoint: str | Path,
    targets: Sequence[ParityTarget],
    windows: Sequence[list[int]],
    options: ParityOptions | None = None,
    progress: Progress = lambda *_: None,
) -> ParityReport:
    """Compare every target with the oracle on the same windows.

    Raises:
        UsageError: The checkpoint is not one.
        EngineError: The oracle itself failed; a failing target is a row, not an exception.
    """
    options = options or ParityOptions()
    opened = L4QCheckpoint.open(checkpoint)
    oracle = run_oracle(checkpoint, windows, options, progress)
    rows = [run_target(opened, target, oracle, options, progress) for target in targets]
    return ParityReport(
        checkpoint=Path(checkpoint),
        tokens=oracle.stats.tokens,
        oracle_perplexity=oracle.stats.oracle_perplexity,
        oracle_tokens_per_s=oracle.tokens_per_s,
        rows=tuple(rows),
    )


def assert_parity(report: ParityReport) -> None:
    """Raise if any row failed.

    Raises:
        VerificationError: Names every failed row and bound.
    """
    if report.passed:
        return
    problems = []
    if all(row.skipped for row in report.rows):
        reasons = dict.fromkeys(f"{row.target.label}: not run, as {row.skipped}" for row in report.rows)
        problems.append("; ".join(["no runtime was compared", *reasons]))
    for row in report.rows:
        if row.error:
            problems.append(f"{row.target.label}: {row.error}")
        if row.exact is not None and row.exact != row.total:
            problems.append(f"{row.target.label}: {row.exact} of {row.total} tensors bit-exact")
        failed = [check.to_dict() for check in row.checks if not check.passed]
        problems += [f"{row.target.label}: {c['figure']} {c['value']:.6g}, allowed {c['allowed']}" for c in failed]
    raise VerificationError("parity failed", got="; ".join(problems))


def _longest(windows: Sequence[list[int]], options: ParityOptions) -> int:
    """Tokens of the longest sequence an engine is given or makes."""
    generated = len(options.prompt) + options.new_tokens if options.prompt else 0
    return max([generated, *map(len, windows)])


def _engine(target: ParityTarget, options: ParityOptions, tokens: int) -> RemoteEngine:
    return RemoteEngine(
        target.engine,
        target.folder,
        python=options.pythons.get(target.engine),
        timeout_s=options.timeout_s,
        threads=options.threads,
        **target.engine_options(tokens),
    )


def _generate(engine: RemoteEngine, options: ParityOptions) -> tuple[list[int], float | None]:
    if not options.prompt:
        return [], None
    tokens, seconds = engine.generate(list(options.prompt), options.new_tokens)
    return tokens, (len(tokens) - 1) / seconds if seconds > 0 and len(tokens) > 1 else None


def _exact_tensors(checkpoint: L4QCheckpoint, target: ParityTarget) -> tuple[int | None, str | None]:
    if target.format not in EXPORTERS:
        return None, None
    try:
        report = verify(checkpoint, get_exporter(target.format), target.folder)
    except L4QError as error:
        return 0, str(error)
    return report.exact, "; ".join(report.differing[:2]) or None


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))

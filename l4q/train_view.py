"""What a training run shows while it runs: a live panel on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
RECENT = 32
"""Losses the panel draws."""
LINES = 100
"""About how many plain lines a run prints."""


class View(Protocol):
    """Shows the figures of a step, as `l4q.train_callbacks.StepReport` writes them to metrics.jsonl."""

    def show(self, figures: Mapping[str, Any], total: int) -> None:
        """A step was logged; `total` is the last step's number."""

    def close(self) -> None:
        """Leave the screen in order; safe to call again."""


def choose_view(console: Console) -> View:
    """The panel on a terminal that can move its cursor, else lines; nothing on a quiet console."""
    if console.quiet:
        return Nothing()
    return Panel(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


class Nothing:
    """Shows nothing."""

    def show(self, figures: Mapping[str, Any], total: int) -> None:
        """Not even this."""

    def close(self) -> None:
        """Nothing to do."""


class Lines:
    """One line for about every hundredth of the run, and for every held-out perplexity."""

    def __init__(self, console: Console) -> None:
        """Print to this console, unwrapped."""
        self._console = console
        self._first = True

    def show(self, figures: Mapping[str, Any], total: int) -> None:
        """Print the step if its turn has come."""
        step = figures["step"]
        due = step % max(1, total // LINES) == 0 or step == total or "held_out_perplexity" in figures
        if due or self._first:
            words = [f"step {step}/{total}", *(f"{key}={value}" for key, value in words_of(figures).items())]
            self._console.print(" ".join(words), soft_wrap=True, markup=False, highlight=False)
        self._first = False

    def close(self) -> None:
        """Nothing is open."""


class Panel:
    """Progress bar, the course of the loss, and the figures of the last step, redrawn in place."""

    def __init__(self, console: Console) -> None:
        """Nothing appears before the first step."""
        self._console = console
        self._live: Live | None = None
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._held_out = ""

    def show(self, figures: Mapping[str, Any], total: int) -> None:
        """Redraw."""
        self._losses.append(figures["loss"])
        if "held_out_perplexity" in figures:
            self._held_out = f"{figures['held_out_perplexity']:.3f} (step {figures['step']})"
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(self._draw(figures, total), refresh=True)

    def close(self) -> None:
        """Leave the last picture standing and give the cursor back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self, figures: Mapping[str, Any], total: int) -> Group:
        step = figures["step"]
        words = words_of(figures)
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=total, completed=step, width=28)
        head.add_row(f"step {step}/{total}", bar, f"{100 * step // total} %", f"eta {words['eta']}")
        rows = [
            (("loss", words["loss"]), (sparkline(list(self._losses)), "")),
            (("held out", self._held_out or "not measured yet"), ("grad norm", words.get("grad", "–"))),
            (("lr", words["lr"]), ("tok/s", words["tok/s"])),
            (("scale drift", words.get("drift", "–")), ("memory", words["mem"])),
            (("clipped", words.get("clipped", "–")), ("zero-point moves", words.get("moves", "–"))),
        ]
        body = Table.grid(padding=(0, 1))
        for left, right in rows:
            body.add_row(*(Text(part, style=style) for part, style in zip((*left, *right), STYLES, strict=True)))
        return Group(head, body)


STYLES = ("dim", "bold", "dim", "bold")


def words_of(figures: Mapping[str, Any]) -> dict[str, str]:
    """The figures as short words; what was not measured is left out."""
    rates = [figures[f"lr_{name}"] for name in ("lora", "scales", "offsets") if f"lr_{name}" in figures]
    words = {"loss": f"{figures['loss']:.4f}"}
    if "held_out_perplexity" in figures:
        words["ppl"] = f"{figures['held_out_perplexity']:.3f}"
    words["lr"] = "/".join(f"{rate:.1e}" for rate in rates)
    if figures.get("grad_norm") is not None:
        words["grad"] = f"{figures['grad_norm']:.3g}"
    for key, word in (("scale_drift", "drift"), ("clipped", "clipped"), ("zero_point_moves", "moves")):
        if key in figures:
            words[word] = f"{100 * figures[key]:.2f}%"
    words["tok/s"] = f"{figures['tokens_per_s']:.0f}"
    words["mem"] = f"{figures['memory_mb']:.0f}MB"
    words["eta"] = str(timedelta(seconds=round(figures["eta_s"])))
    return words


def sparkline(values: list[float]) -> str:
    """The course of some values in as many block characters, lowest to highest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BARS[int((value - low) / span * (len(BARS) - 1))] for value in values)

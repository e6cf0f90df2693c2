"""What a command is made of: `command_line` with the options, the help and the behaviour that all commands share."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l4q.cli_common import NOTHING_LEFT
from l4q.errors import L4QError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem
    from rich.console import Console

# keys of click's Context.meta
QUIET, VERBOSE, STDOUT, OPEN = "l4q.quiet", "l4q.verbose", "l4q.stdout", "l4q.open"
HUB_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


class SuggestingChoice(click.Choice):  # type: ignore[type-arg]  # generic since click 8.2 only
    """A choice whose refusal names the value that was probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click's; the error says what is near."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = did_you_mean(str(value), [str(choice) for choice in self.choices])
            raise click.BadParameter(error.message + near, ctx, param) from None


class CommandLine(click.Command):
    """A command with the shared options, whose repeatable options also take several values at once.

    `--to gptq gguf` is `--to gptq --to gguf`. Only words that the option accepts belong to it (a choice it offers, or a
    file that exists), so that an argument after them is not swallowed.
    """

    examples: tuple[str, ...] = ()
    interrupted = NOTHING_LEFT
    """What is said when a signal ends it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each further value, then parse as usual."""
        spread = {name: p for p in self.params if isinstance(p, click.Option) and p.multiple for name in p.opts}
        words: list[str] = []
        current: str | None = None
        for word in args:
            if word.startswith("-"):
                current = word if word in spread else None
            elif current is not None and words[-1] != current:
                if _accepts(spread[current], word):
                    words.append(current)
                else:
                    current = None
            words.append(word)
        ctx.meta[OPEN] = spread.get(current or "")
        return super().parse_args(ctx, words)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """As click's, and further values of an option that takes several and stands last."""
        option: click.Option | None = ctx.meta.get(OPEN)
        more = option.shell_complete(ctx, incomplete) if option and not incomplete.startswith("-") else []
        return more + super().shell_complete(ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; with --json whatever else is printed goes to stderr."""
        try:
            with self._only_json(ctx):
                return super().invoke(ctx)
        except L4QError:
            if ctx.meta.get(VERBOSE):
                traceback.print_exc()
            raise
        except KeyboardInterrupt:
            raise KeyboardInterrupt(self.interrupted) from None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, one a line and unbroken, to be copied."""
        with formatter.section("Examples"):
            indent = " " * formatter.current_indent
            for example in self.examples:
                formatter.write(indent + example.replace("\n", f"\n{indent}    ") + "\n")

    @contextmanager
    def _only_json(self, ctx: click.Context) -> Iterator[None]:
        if not ctx.params.get("as_json"):
            yield
            return
        ctx.meta[STDOUT] = sys.stdout
        with redirect_stdout(sys.stderr):
            yield


def command_line(
    name: str,
    *,
    examples: Sequence[str],
    interrupted: str = CommandLine.interrupted,
    cls: type[CommandLine] = CommandLine,
) -> Callable[[Callable[..., None]], CommandLine]:
    """Decorator: `click.command` with the options, the help and the behaviour of all commands.

    The function gets `as_json`; with it, its result goes through `print_json`.

    Args:
        name: Of the subcommand of `l4q`.
        examples: Command lines for the end of --help.
        interrupted: What is said when a signal ends it.
        cls: Class of the command.
    """

    def decorate(function: Callable[..., None]) -> CommandLine:
        settings = {"help_option_names": ["-h", "--help"], "show_default": True}
        made = click.command(name=name, cls=cls, context_settings=settings)(function)
        made.examples, made.interrupted = tuple(examples), interrupted
        made.params += shared_options()
        for parameter in made.params:
            if type(parameter.type) is click.Choice:
                parameter.type = SuggestingChoice(parameter.type.choices)
        return made

    return decorate


def shared_options() -> list[click.Option]:
    """The options that every command has, in the order of its help."""
    file = click.Path(path_type=Path, dir_okay=False, exists=True)
    return [
        click.Option(
            ["--config", "config_file"], type=file, expose_value=False, is_eager=True, callback=_use_config,
            metavar="FILE", help="YAML or TOML file with values for any of these options; the command line wins.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the result as JSON, and nothing else on stdout."),
        click.Option(
            ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_be_quiet,
            help="No progress and no log but warnings.",
        ),
        click.Option(
            ["-v", "--verbose"], is_flag=True, expose_value=False, callback=_be_verbose,
            help="Also the libraries' logs, and where an error came from.",
        ),
    ]  # fmt: skip


def print_json(value: Any) -> None:
    """Print the result of a command that was given --json."""
    context = click.get_current_context(silent=True)
    click.echo(json.dumps(value, indent=2), file=context.meta.get(STDOUT) if context else None)


def is_quiet() -> bool:
    """Whether the command that is running was given --quiet."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def progress_console() -> Console:
    """Where progress is shown: stderr, or nowhere with --quiet."""
    from rich.console import Console

    return Console(stderr=True, quiet=is_quiet())


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A sentence that begins with a space and names the nearest of the known words; empty if none is near."""
    near = get_close_matches(word, known, n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


def _accepts(option: click.Option, word: str) -> bool:
    if isinstance(option.type, click.Choice):
        return word in option.type.choices
    return isinstance(option.type, click.Path) and Path(word).is_file()


def _use_config(ctx: click.Context, _option: click.Parameter, path: Path | None) -> None:
    if path is not None:
        from l4q.cli_config import read_config

        ctx.default_map = read_config(path, ctx.command)


def _be_quiet(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    ctx.meta[QUIET] = asked
    if asked:
        _set_level(ctx, "l4q", logging.WARNING)
        if os.environ.setdefault(HUB_BARS, "1") == "1":  # read as the libraries load, also by engines' processes
            ctx.call_on_close(lambda: os.environ.pop(HUB_BARS, None))


def _be_verbose(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    ctx.meta[VERBOSE] = asked
    if asked and ctx.meta.get(QUIET):
        raise click.UsageError("--quiet and --verbose exclude each other.", ctx)
    if asked:
        _set_level(ctx, "", logging.INFO)
        _set_level(ctx, "l4q", logging.DEBUG)


def _set_level(ctx: click.Context, name: str, level: int) -> None:
    """Change a logger's level until the command ends; processes of a launcher that are silent stay so."""
    logger = logging.getLogger(name)
    if os.environ.get("RANK", "0") == "0":
        ctx.call_on_close(partial(logger.setLevel, logger.level))
        logger.setLevel(level)

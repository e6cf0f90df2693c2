"""`python -m tools.cli_docs` writes docs/cli.md from the commands themselves; a test fails if it is out of date."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import click

from l4q.cli import SUBCOMMANDS
from l4q.cli_command import CommandLine, shared_options
from l4q.cli_common import EXIT_CODES, run

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
HEAD = """# The command line

Generated from the commands by `python -m tools.cli_docs`. `l4q` has all commands as subcommands; those with a name of
their own, like `l4q-train`, are the same commands.

## What all of them share

- stdout is the result, stderr the log and the progress. With `--json`, stdout is one JSON document and nothing else;
  `l4q-parity` prints it also when parity fails.
- Colour and live displays appear on a terminal only; `NO_COLOR=1` takes the colour away. Elsewhere progress is plain
  lines, and tables are as wide as `COLUMNS`, 80 by default.
- An option that can be repeated also takes several values at once: `--to gptq gguf`.
- A misspelt option, choice, command or key of a configuration file is answered with the nearest one.
- Ctrl-C ends with one line and exit code 130, after cleaning up, and so do SIGTERM and a closed terminal with theirs.
  What was being written does not appear under its final name; `l4q-train --resume` continues from the newest saved
  state, and `l4q-export --resume` with the files that are complete.

"""
CONFIG = """
### Configuration files

`--config FILE` reads options from YAML or TOML; what is on the command line wins. Keys are the options without their
dashes, arguments have their name from the help in lower case, flags are `true` or `false`, and options that can be
repeated take lists. An unknown key is refused. Relative paths start at the working directory. One file may serve
several commands, with a table for each:

```toml
# run.toml:  l4q-train --config run.toml && l4q-export --config run.toml
[train]
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
data = ["my_texts.txt"]
bits = 4
out = "RUN"

[export]
checkpoint = "RUN/checkpoint"
to = ["gptq", "gguf", "onnx"]
out = "exports"
```

### Completion

`l4q completion` prints click's completion for `l4q` and every `l4q-` command, of options, choices and files:

```
echo 'eval "$(l4q completion bash)"' >> ~/.bashrc            # bash 4.4 or later
echo 'eval "$(l4q completion zsh)"' >> ~/.zshrc              # after compinit
l4q completion fish > ~/.config/fish/conf.d/l4q.fish         # completions/ would be read for `l4q` alone
```

The tests complete in bash and speak the other shells' protocols; in zsh 5.9 and fish 3.6.0 it was tried by hand.

### Exit codes

| code | meaning |
|---|---|
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _table(shared_options()), CONFIG]
    parts += [f"| {code} | {meaning} |\n" for code, meaning in EXIT_CODES.items()]
    parts += [_section(name) for name in SUBCOMMANDS]
    return "".join(parts)


def _section(name: str) -> str:
    """One command: what it does, its arguments and options, its examples."""
    command: CommandLine = import_module(SUBCOMMANDS[name].module).command
    shared = {option.name for option in shared_options()}
    own = [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]
    arguments = " ".join(p.make_metavar(_context(command)) for p in command.params if isinstance(p, click.Argument))
    called = f"l4q {name}" if SUBCOMMANDS[name].script is None else str(SUBCOMMANDS[name].script)
    text = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    examples = "\n".join(example.replace("\n", "\n    ") for example in command.examples)
    usage = f"{called} {arguments}".rstrip()
    return f"\n## {called}\n\n`{usage}`: {text}\n\n```\n{examples}\n```\n\n" + (_table(own) if own else "")


def _table(options: list[click.Option]) -> str:
    rows = "".join(map(_row, options))
    return f"| option | what it does | default |\n|---|---|---|\n{rows}"


def _row(option: click.Option) -> str:
    """A default that the help text spells out itself moves to its own column."""
    text, _, spelled = (option.help or "").partition("  [default: ")
    return f"| {_names(option)} | {_cell(text)} | {_cell(spelled.rstrip(']') or _default(option))} |\n"


def _names(option: click.Option) -> str:
    names = ", ".join([*option.opts, *(f"/ {name}" for name in option.secondary_opts)])
    value = "" if option.is_flag else " " + option.make_metavar(_context(None))
    return f"`{_cell(names.replace(', /', ' /') + value)}`"


def _default(option: click.Option) -> str:
    """As the help says it; one that depends on something else stands in the help text."""
    if option.required:
        return "required"
    extra = option.get_help_extra(_context(None)).get("default", "")
    return "" if extra.lower() == "false" else extra


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _context(command: click.Command | None) -> click.Context:
    return click.Context(command or click.Command("l4q"), show_default=True)


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 if the page is out of date.")
def main(check: bool) -> None:
    """Write docs/cli.md."""
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        raise click.ClickException(f"{PAGE.name} is out of date: run python -m tools.cli_docs")


if __name__ == "__main__":
    run(main)

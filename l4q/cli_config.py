"""`--config FILE`: options of a command out of a YAML or TOML file, with what is not understood refused by name.

    bits: 3                        # RUN.yaml: the options of one command, as on the command line without the dashes
    data: [a.jsonl, b.jsonl]

    [train]                        # or one file for several commands: a table per command
    bits = 3
    [export]
    to = ["gptq", "gguf"]

Arguments are named as in the help, in lower case ("model"). Relative paths start at the working directory.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import click

from l4q.cli_command import did_you_mean
from l4q.errors import UsageError

NOT_IN_FILES = ("config", "help")


def read_config(path: Path, command: click.Command) -> dict[str, Any]:
    """The values a file gives to a command's parameters, by the parameters' names in Python, for click to convert.

    Raises:
        UsageError: The file cannot be read, names something the command does not have, or nests values.
    """
    values = _own_table(path, _load(path), str(command.name))
    known = {_key(parameter): parameter for parameter in command.params}
    known = {key: parameter for key, parameter in known.items() if key not in NOT_IN_FILES}
    found: dict[str, Any] = {}
    for written, value in values.items():
        key = str(written).replace("_", "-")
        if key not in known:
            raise UsageError(
                "the configuration file names an option that the command does not have",
                where=path,
                got=f"{written}.{did_you_mean(key, list(known))}" if did_you_mean(key, list(known)) else written,
                expected=f"options of {command.name}: {', '.join(sorted(known))}",
            )
        if value is not None:
            found[str(known[key].name)] = _plain(path, written, value, known[key])
    return found


def _key(parameter: click.Parameter) -> str:
    """--group-size -> group-size; the argument MODEL -> model."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name.lower().strip("[].")
    return max(parameter.opts, key=len).lstrip("-")


def _load(path: Path) -> dict[str, Any]:
    readers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml}
    if path.suffix.lower() not in readers:
        raise UsageError(
            "the kind of the configuration file is unknown", where=path, got=path.suffix, expected=list(readers)
        )
    try:
        content = readers[path.suffix.lower()](path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError("the configuration file cannot be read", where=path, got=error) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            "the configuration file does not hold options",
            where=path,
            got=type(content).__name__,
            expected="key: value",
        )
    return content


def _toml(text: str) -> Any:
    return tomllib.loads(text)


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _own_table(path: Path, content: dict[str, Any], name: str) -> dict[str, Any]:
    """The command's own table of a file for several commands, else the whole file."""
    from l4q.cli import SUBCOMMANDS

    if not content or not all(isinstance(value, dict) for value in content.values()):
        return content
    odd = [str(key) for key in content if key not in SUBCOMMANDS]
    if odd:
        raise UsageError(
            "the configuration file has a table for an unknown command",
            where=path,
            got=f"{odd[0]}.{did_you_mean(odd[0], list(SUBCOMMANDS))}",
            expected=f"commands: {', '.join(SUBCOMMANDS)}",
        )
    own: dict[str, Any] = content.get(name, {})
    return own


def _plain(path: Path, written: object, value: Any, parameter: click.Parameter) -> Any:
    """A value as the command line would have it: text, a truth value for a flag, or a list of texts."""
    many = getattr(parameter, "multiple", False) or parameter.nargs != 1
    if isinstance(value, (list, tuple)) and many:
        return [_scalar(path, written, item) for item in value]
    plain = _scalar(path, written, value)
    return [plain] if many else plain


def _scalar(path: Path, written: object, value: Any) -> Any:
    if isinstance(value, (dict, list, tuple)):
        raise UsageError(
            "an option of the configuration file has no plain value", where=f"{path}, {written}", got=value,
            expected="one value; or a list, for an option that can be repeated",
        )  # fmt: skip
    return value if isinstance(value, bool) else str(value)

"""The commands of docs/serving.md, so that tests run what readers are told to type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
NOT_RUN = "not-run"


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: ```LANGUAGE run=NAME, or ```LANGUAGE not-run."""

    language: str
    mark: str
    """`run=NAME` or `not-run`; empty if the block has neither."""
    text: str


def blocks(page: Path = PAGE) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = re.findall(r"^```(\w*) *(.*?)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [Block(language=language, mark=mark.strip(), text=text) for language, mark, text in found]


def block(name: str, page: Path = PAGE) -> str:
    """The text of the one block marked `run=NAME`.

    Raises:
        KeyError: There is none, or more than one.
    """
    found = [one.text for one in blocks(page) if one.mark == f"run={name}"]
    if len(found) != 1:
        raise KeyError(f"{len(found)} blocks marked run={name} in {page.name}")
    return found[0]


def server_script(name: str, port: int) -> str:
    """A block that ends in a server's command, on another port, with the shell replaced by the server.

    As typed in a terminal, the server would be the shell's child and Ctrl-C would reach both.

    Raises:
        KeyError: The block has no port or no command to replace.
    """
    text, ports = re.subn(r"--port \d+", f"--port {port}", block(name))
    text, commands = re.subn(r"^python ", "exec python ", text, flags=re.M)
    if (ports, commands) != (1, 1):
        raise KeyError(f"run={name}: {ports} ports and {commands} python commands, expected one of each")
    return text

"""A chat template taken apart: what it writes around each message, found by rendering it.

Jinja templates are programs. Those of most models do nothing more than put fixed text around each message; such a
template is found by rendering a few conversations, and believed only if its parts reproduce others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

Messages = Sequence[Mapping[str, str]]
Render = Callable[[Messages, bool], str]
"""(messages, add_generation_prompt) -> text. Raises whatever the template raises."""


@dataclass(frozen=True, kw_only=True)
class Around:
    """Text before and after a message's content."""

    before: str
    after: str

    def write(self, content: str) -> str:
        """The message as the template writes it."""
        return f"{self.before}{content}{self.after}"


@dataclass(frozen=True, kw_only=True)
class ChatParts:
    """A template that writes fixed text around each message."""

    head: str
    """Written first when the conversation has no system message, a default one included."""
    roles: Mapping[str, Around]
    """By "system" (absent if the template refuses it), "user" and "assistant"."""
    prompt: str
    """Asks for an answer."""

    def render(self, messages: Messages) -> str:
        """The conversation and the request for an answer."""
        head = "" if messages[0]["role"] == "system" else self.head
        parts = (self.roles[message["role"]].write(message["content"]) for message in messages)
        return "".join(chain([head], parts, [self.prompt]))


def take_apart(render: Render) -> ChatParts | None:
    """The parts of a template, or None if it is not of that kind."""
    try:
        parts = _parts(render)
        if parts is not None and all(parts.render(talk) == render(talk, True) for talk in _conversations(parts)):
            return parts
    except Exception:  # a template may raise anything for a conversation it does not want
        return None
    return None


def _parts(render: Render) -> ChatParts | None:
    question, answer, again, system = ("\x01question\x01", "\x01answer\x01", "\x01again\x01", "\x01system\x01")
    talk = _talk(("user", question), ("assistant", answer), ("user", again))
    first, second, third = (render(talk[:count], False) for count in (1, 2, 3))
    asked = render(talk[:1], True)
    if not (asked.startswith(first) and second.startswith(first) and third.startswith(second)):
        return None
    user, assistant = _split(third[len(second) :], again), _split(second[len(first) :], answer)
    whole = user.write(question)
    if not first.endswith(whole):
        return None
    roles = {"user": user, "assistant": assistant}
    try:
        with_system = render(_talk(("system", system), ("user", question)), False)
    except Exception:  # no system role
        with_system = ""
    if system in with_system:
        if not with_system.endswith(whole):
            return None
        roles["system"] = _split(with_system[: -len(whole)], system)
    return ChatParts(head=first[: -len(whole)], roles=roles, prompt=asked[len(first) :])


def _split(text: str, content: str) -> Around:
    before, found, after = text.partition(content)
    if not found or content in after:
        raise ValueError("the message is not written once")
    return Around(before=before, after=after)


def _conversations(parts: ChatParts) -> list[list[dict[str, str]]]:
    """Talks that the parts were not taken from."""
    turns = [("user", "Hi there."), ("assistant", "Yes?"), ("user", "A\nB"), ("assistant", "{c}"), ("user", "Why")]
    plain = [_talk(*turns[:count]) for count in (1, 3, 5)]
    return plain + ([_talk(("system", "Be brief."), *turns)] if "system" in parts.roles else [])


def _talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]

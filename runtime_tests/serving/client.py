"""The real openai client on a local server: chat, streaming, logprobs, several requests at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import openai

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One greedy chat completion."""

    text: str
    token_ids: tuple[int, ...]
    """Generated ids, the stop token included."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each of them."""
    stopped: bool
    """Whether the model ended the answer itself, not the limit of tokens."""
    chunks: tuple[str, ...] = ()
    """The pieces of text as they came, if streamed."""


class Client:
    """Requests to one server.

    Args:
        url: Base address without /v1.
        fields: What requests say beyond OpenAI's own fields.
        timeout_s: Longest wait for one answer, in seconds.
    """

    def __init__(self, url: str, *, fields: Mapping[str, Any] | None = None, timeout_s: float = 300.0) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._fields = dict(fields or {})
        self._api = openai.OpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            timeout=timeout_s,
            max_retries=0,  # retries would hide a server that drops requests
            http_client=openai.DefaultHttpxClient(trust_env=False),  # no proxy on the way
        )

    def models(self) -> list[str]:
        """Ids of GET /v1/models."""
        return [model.id for model in self._api.models.list()]

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids the server makes of a chat: its template and its tokenizer.

        vLLM's /tokenize takes messages; llama.cpp's takes text, which its /apply-template makes.
        """
        model = self.models()[0]
        reply = self._post("tokenize", model=model, messages=list(messages), add_generation_prompt=True)
        if not reply.get("tokens"):
            prompt = self._post("apply-template", messages=list(messages))["prompt"]
            reply = self._post("tokenize", content=prompt, add_special=True, parse_special=True)
        return [int(token) for token in reply["tokens"]]

    def chat(self, messages: Messages, max_tokens: int) -> Answer:
        """One greedy completion, in one piece."""
        reply = self._create(messages, max_tokens, stream=False)
        choice = reply.choices[0]
        entries = choice.logprobs.content
        return Answer(
            text=choice.message.content or "",
            token_ids=_ids(choice, entries),
            logprobs=tuple(float(entry.logprob) for entry in entries),
            stopped=choice.finish_reason == "stop",
        )

    def stream(self, messages: Messages, max_tokens: int) -> Answer:
        """The same, chunk by chunk; llama.cpp leaves the stop token out of the ids."""
        chunks: list[str] = []
        ids: list[int] = []
        logprobs: list[float] = []
        reason = None
        for part in self._create(messages, max_tokens, stream=True):
            for choice in part.choices:
                chunks.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
                entries = choice.logprobs.content if choice.logprobs else []
                ids += _ids(choice, entries)
                logprobs += [float(entry.logprob) for entry in entries]
        return Answer(
            text="".join(chunks),
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            stopped=reason == "stop",
            chunks=tuple(chunks),
        )

    def chat_together(self, chats: Sequence[Messages], max_tokens: int) -> list[Answer]:
        """Completions of all chats, requested at the same moment from one thread each."""
        barrier = Barrier(len(chats))

        def ask(messages: Messages) -> Answer:
            barrier.wait(self._timeout_s)
            return self.chat(messages, max_tokens)

        with ThreadPoolExecutor(len(chats)) as pool:
            return list(pool.map(ask, chats))

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def _create(self, messages: Messages, max_tokens: int, *, stream: bool) -> Any:
        arguments: dict[str, Any] = {"messages": list(messages), "model": self.models()[0]}
        return self._api.chat.completions.create(
            **arguments,
            max_tokens=max_tokens,
            temperature=0.0,
            logprobs=True,
            top_logprobs=1,
            stream=stream,
            extra_body=self._fields,
        )

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        # cast_to=object leaves the JSON as it is
        return dict(self._api.post(f"{self.url}/{path}", cast_to=object, body=body))  # type: ignore[call-overload]


def _ids(choice: Any, entries: Sequence[Any]) -> tuple[int, ...]:
    """vLLM puts a choice's ids beside it (return_token_ids), llama.cpp each into its logprob entry."""
    beside = (choice.model_extra or {}).get("token_ids")
    found = beside if beside is not None else [entry.model_extra["id"] for entry in entries]
    return tuple(int(token) for token in found)

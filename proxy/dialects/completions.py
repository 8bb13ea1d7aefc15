"""`completions`: the legacy text interface, which vLLM and training code still like."""

from typing import Any

import orjson

from proxy.dialects.base import Json, Prompt, Reading, StreamParser, Summary, as_users, dicts, integer, string
from proxy.dialects.chat import finish, merge_head
from proxy.sse import Event


class Completions:
    """The dialect. A prompt is the agent's whole input, so it counts as the first user message."""

    operation = "text_completion"
    service = "openai"
    usage_option = True
    marks: tuple[bytes, ...] = (b"[DONE]",)

    def read(self, body: Json) -> Reading:
        """There is no conversation, so no turns."""
        prompt = body.get("prompt")
        prompts = [Prompt("user", prompt, ("prompt",))] if isinstance(prompt, str) else []
        return Reading(string(body.get("model")), body.get("stream") is True, prompts)

    def messages(self, body: Json) -> list[Json]:
        """One user message a prompt; token ids stay a list."""
        return as_users(body.get("prompt"))

    def ends(self, event: Event) -> bool:
        """`[DONE]` is the last event."""
        return event.data == b"[DONE]"

    def parser(self) -> StreamParser:
        """A parser for one stream."""
        return CompletionsStream()

    def summarise(self, reply: Json) -> Summary:
        """All choices, in order."""
        stream = CompletionsStream()
        stream.take(reply)
        return stream.summary()


class CompletionsStream(StreamParser):
    """Joins the texts of each choice."""

    def __init__(self) -> None:
        self._summary = Summary()
        self._choices: dict[int, Json] = {}
        self._prompt_ids: Any = None

    def feed(self, event: Event) -> None:
        """Takes the next event; what isn't a JSON object is no chunk."""
        try:
            chunk = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            return
        if isinstance(chunk, dict):
            self.take(chunk)

    def take(self, chunk: Json) -> None:
        """Takes a chunk, or a whole answer, which has the same shape."""
        merge_head(self._summary, chunk)
        for choice in dicts(chunk.get("choices")):
            held = self._choices.setdefault(integer(choice.get("index")) or 0, {"text": [], "logprobs": []})
            held["text"].append(string(choice.get("text")) or "")
            held["finish_reason"] = choice.get("finish_reason") or held.get("finish_reason")
            if choice.get("logprobs") is not None:
                held["logprobs"].append(choice["logprobs"])
            if isinstance(choice.get("token_ids"), list):
                held["token_ids"] = (held.get("token_ids") or []) + choice["token_ids"]
            # vLLM tells them per choice here, and at the top in chat.
            self._prompt_ids = self._prompt_ids or choice.get("prompt_token_ids")

    def summary(self) -> Summary:
        """What is known so far."""
        choices = [self._choices[index] for index in sorted(self._choices)]
        self._summary.output_messages = [
            {"role": "assistant", "content": "".join(held["text"]), "finish_reason": held.get("finish_reason")}
            for held in choices
        ]
        logprobs = [
            (held["logprobs"][0] if len(held["logprobs"]) == 1 else held["logprobs"] or None) for held in choices
        ]
        finish(self._summary, choices, self._prompt_ids, [held.get("token_ids") for held in choices], logprobs)
        return self._summary

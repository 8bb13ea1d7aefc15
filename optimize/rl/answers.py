"""Answers in the OpenAI dialects: whole objects and stream chunks, from what the rows of a call produced."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from optimize.rl.batcher import Delta
from optimize.rl.sample import Picked
from optimize.rl.text import Vocabulary
from optimize.rl.wire import Call


@dataclass
class Choice:
    """What one row has produced so far, and how much of its text is behind `offset`."""

    prompt: Sequence[int]
    text: str = ""
    picked: list[Picked] = field(default_factory=list)
    finish: str | None = None
    cached: int = 0
    offset: int = 0

    def add(self, delta: Delta) -> None:
        """Take one step in."""
        self.text += delta.text
        self.picked.append(delta.picked)
        self.finish = delta.finish
        self.cached = delta.cached


class Answer:
    """Renders one call: the same id, model and time in everything it returns. Choice i belongs to prompt i // n."""

    def __init__(self, call: Call, prompts: Sequence[Sequence[int]], vocabulary: Vocabulary) -> None:
        self._call, self._prompts, self._vocabulary = call, prompts, vocabulary
        self._id = f"{'chatcmpl' if call.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self.choices = [Choice(prompt) for prompt in prompts for _ in range(call.n)]

    def whole(self) -> dict[str, Any]:
        """The JSON answer, when every choice has finished."""
        made = [self._choice(index, choice) for index, choice in enumerate(self.choices)]
        body = self._envelope("chat.completion" if self._call.chat else "text_completion", made)
        if self._call.chat and self._call.token_ids:
            body["prompt_token_ids"] = list(self._prompts[0])
        body["usage"] = self.usage()
        return body

    def opening(self) -> list[dict[str, Any]]:
        """The chunks before any token: for chat, each choice's role."""
        if not self._call.chat:
            return []
        role = {"role": "assistant", "content": ""}
        chunks = [self._chunk({"index": index, "delta": role}) for index in range(len(self.choices))]
        if self._call.token_ids:
            chunks[0]["prompt_token_ids"] = list(self._prompts[0])
        return chunks

    def chunk(self, index: int, fresh: Sequence[Delta]) -> list[dict[str, Any]]:
        """The chunks for a choice's new steps: its text, and after the last step its finish reason."""
        choice = self.choices[index]
        first = not choice.picked
        for delta in fresh:
            choice.add(delta)
        text = "".join(delta.text for delta in fresh)
        picked = [delta.picked for delta in fresh]
        body = {"index": index, **({"delta": {"content": text}} if self._call.chat else {"text": text})}
        body |= self._details(choice, picked)
        if first and self._call.token_ids and not self._call.chat:
            body["prompt_token_ids"] = list(choice.prompt)
        silent = not text and not self._call.token_ids and self._call.logprobs is None
        chunks = [] if silent else [self._chunk(body)]
        if choice.finish is not None:
            empty: dict[str, Any] = {"delta": {}} if self._call.chat else {"text": ""}
            chunks.append(self._chunk({"index": index, **empty, "logprobs": None}, choice.finish))
        return chunks

    def closing(self) -> list[dict[str, Any]]:
        """The usage chunk, where asked for."""
        if not self._call.include_usage:
            return []
        return [self._envelope(self._chunk_kind, []) | {"usage": self.usage()}]

    def usage(self) -> dict[str, Any]:
        """Exact token counts; a prompt counts once whatever `n` is."""
        prompt = sum(len(ids) for ids in self._prompts)
        completion = sum(len(choice.picked) for choice in self.choices)
        cached = sum(choice.cached for choice in self.choices[:: self._call.n])
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._call.chat else "text_completion"

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._call.model,
            "choices": choices,
        }

    def _chunk(self, choice: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        body = self._envelope(self._chunk_kind, [choice | {"finish_reason": finish}])
        return body | {"usage": None} if self._call.include_usage else body

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text: dict[str, Any] = {"text": choice.text}
        if self._call.chat:
            text = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        body = {"index": index, **text, **self._details(choice, choice.picked), "finish_reason": choice.finish}
        if self._call.token_ids and not self._call.chat:
            body["prompt_token_ids"] = list(choice.prompt)
        return body

    def _details(self, choice: Choice, picked: Sequence[Picked]) -> dict[str, Any]:
        """The log-probabilities and token ids of some steps, where asked for."""
        details: dict[str, Any] = {"logprobs": None}
        if self._call.logprobs is not None:
            details["logprobs"] = self._chat_logprobs(picked) if self._call.chat else self._logprobs(choice, picked)
        if self._call.token_ids:
            details["token_ids"] = [step.token for step in picked]
        return details

    def _chat_logprobs(self, picked: Sequence[Picked]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            text, utf8 = self._vocabulary.token(token)
            return {"token": text, "logprob": logprob, "bytes": utf8}

        content = [
            entry(step.token, step.logprob) | {"top_logprobs": [entry(*pair) for pair in step.top]} for step in picked
        ]
        return {"content": content, "refusal": None}

    def _logprobs(self, choice: Choice, picked: Sequence[Picked]) -> dict[str, Any]:
        tokens = [self._vocabulary.token(step.token)[0] for step in picked]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [step.logprob for step in picked],
            "top_logprobs": [
                {self._vocabulary.token(token)[0]: logprob for token, logprob in step.top} for step in picked
            ],
            "text_offset": offsets,
        }

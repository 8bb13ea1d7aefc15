"""The user's own OpenAI client, sync or async, as the optimizer's model; each call leaves a span."""

import asyncio
import inspect
import time
from typing import Any

from optimize.llm import Ask, ModelError, Reply
from optimize.spans import SpanWriter


def asker(client: Any, model: str, spans: SpanWriter, episode: str, seconds: float = 180.0) -> Ask:
    """A function from chat messages to the reply through `client.chat.completions.create`.

    It raises ModelError. No sampling parameter is sent: newer models refuse some of them.
    """

    async def ask(messages: list[dict[str, str]]) -> Reply:
        start_ns = time.time_ns()
        try:
            async with asyncio.timeout(seconds):
                answer = await asyncio.to_thread(client.chat.completions.create, model=model, messages=messages)
                answer = await answer if inspect.isawaitable(answer) else answer
            reply = Reply(str(answer.choices[0].message.content or ""), _count(answer, "total_tokens"))
        except Exception as error:  # boundary: a foreign client may raise anything
            name = type(error).__name__
            await spans.call(episode, model, messages, start_ns, status="error", error_type=name)
            raise ModelError(f"{model} did not answer: {name}: {error}") from error
        said = [{"role": "assistant", "content": reply.text}]
        await spans.call(
            episode,
            model,
            messages,
            start_ns,
            status="ok",
            input_tokens=_count(answer, "prompt_tokens"),
            output_tokens=_count(answer, "completion_tokens"),
            response_model=_text(answer, "model"),
            response_id=_text(answer, "id"),
            output_messages=_json(said),
        )
        return reply

    return ask


def _count(answer: Any, name: str) -> int | None:
    found = getattr(getattr(answer, "usage", None), name, None)
    return found if isinstance(found, int) else None


def _text(answer: Any, name: str) -> str | None:
    found = getattr(answer, name, None)
    return found if isinstance(found, str) else None


def _json(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)

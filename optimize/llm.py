"""The optimizer's own calls to a language model: chat messages in, the reply's text and what it cost out."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from collector.errors import RatchetError

SECONDS = 180.0


class ModelError(RatchetError):
    """The optimizer's model gave no answer."""

    code = "model_failed"


@dataclass(frozen=True)
class Reply:
    """What the model said. `tokens`, in and out together, and `cost_usd` are None where nobody told."""

    text: str
    tokens: int | None = None
    cost_usd: float | None = None


Ask = Callable[[list[dict[str, str]]], Awaitable[Reply]]


def completer(base: str, model: str, key: str | None) -> Ask:
    """A function from chat messages to the reply, asking `model` at the OpenAI-compatible `base`.

    It raises ModelError. No sampling parameter is sent: newer models refuse some of them.
    """

    async def ask(messages: list[dict[str, str]]) -> Reply:
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                body = {"model": model, "messages": messages}
                reply = await client.post(f"{base.rstrip('/')}/chat/completions", json=body, headers=headers)
            reply.raise_for_status()
            return read(reply.json())
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{model} did not answer: {error}") from None

    return ask


def read(answer: dict[str, Any]) -> Reply:
    """The first choice of a chat completion. Raises LookupError or TypeError where it is none."""
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return Reply(str(answer["choices"][0]["message"]["content"] or ""), total if isinstance(total, int) else None)

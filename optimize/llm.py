"""The optimizer's own calls to a language model: one chat completion over HTTP."""

from collections.abc import Awaitable, Callable

from collector.errors import RatchetError

SECONDS = 180.0


class ModelError(RatchetError):
    """The optimizer's model gave no answer."""

    code = "model_failed"


def completer(base: str, model: str, key: str | None) -> Callable[[list[dict[str, str]]], Awaitable[str]]:
    """A function from chat messages to the reply's text, asking `model` at the OpenAI-compatible `base`.

    It raises ModelError. No sampling parameter is sent: newer models refuse some of them.
    """

    async def complete(messages: list[dict[str, str]]) -> str:
        import httpx

        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            async with httpx.AsyncClient(timeout=SECONDS) as client:
                body = {"model": model, "messages": messages}
                reply = await client.post(f"{base.rstrip('/')}/chat/completions", json=body, headers=headers)
            reply.raise_for_status()
            return str(reply.json()["choices"][0]["message"]["content"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise ModelError(f"{model} did not answer: {error}") from None

    return complete

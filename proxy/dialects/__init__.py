"""One wire format a file; `base` holds what they share, `KNOWN` finds them by path."""

from proxy.dialects import chat, completions, embeddings, messages, other, responses
from proxy.dialects.base import Dialect

KNOWN: dict[str, Dialect] = {
    "chat/completions": chat.Chat(),
    "completions": completions.Completions(),
    "responses": responses.Responses(),
    "embeddings": embeddings.Embeddings(),
    "messages": messages.Messages(),
}
OTHER: Dialect = other.Other()

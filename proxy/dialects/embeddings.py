"""`embeddings`: texts in, vectors out. The vectors aren't recorded."""

from proxy.dialects.base import Json, Reading, StreamParser, Summary, as_users, string
from proxy.dialects.chat import head
from proxy.dialects.other import Silent
from proxy.sse import Event


class Embeddings:
    """The dialect: no prompts, no conversation, no stream."""

    operation = "embeddings"
    service = "openai"
    usage_option = False
    marks: tuple[bytes, ...] = ()

    def read(self, body: Json) -> Reading:
        """Only the model."""
        return Reading(string(body.get("model")))

    def messages(self, body: Json) -> list[Json]:
        """One user message a text."""
        return as_users(body.get("input"))

    def ends(self, event: Event) -> bool:
        """There is no stream to end."""
        return False

    def parser(self) -> StreamParser:
        """Nothing is read of a stream."""
        return Silent()

    def summarise(self, reply: Json) -> Summary:
        """Model and usage."""
        return head(reply)

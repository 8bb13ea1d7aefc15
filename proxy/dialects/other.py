"""Everything else under /v1 (audio, images, files, batches ...): relayed as it is, recorded with sizes only."""

from proxy.dialects.base import Json, Reading, StreamParser, Summary, error_of, string
from proxy.sse import Event


class Other:
    """The dialect that reads nothing but the model, which decides the upstream."""

    operation = "other"
    service = "openai"
    usage_option = False
    marks: tuple[bytes, ...] = ()

    def read(self, body: Json) -> Reading:
        """Only the model."""
        return Reading(string(body.get("model")))

    def messages(self, body: Json) -> list[Json]:
        """None are recorded."""
        return []

    def ends(self, event: Event) -> bool:
        """No event is known to be the last."""
        return False

    def parser(self) -> StreamParser:
        """Nothing is read of a stream."""
        return Silent()

    def summarise(self, reply: Json) -> Summary:
        """Only an error's type."""
        return Summary(error_type=error_of(reply))


class Silent(StreamParser):
    """Reads nothing."""

    def feed(self, event: Event) -> None:
        """Ignores it."""

    def take(self, value: Json) -> None:
        """Ignores it."""

    def summary(self) -> Summary:
        """Nothing is known."""
        return Summary()

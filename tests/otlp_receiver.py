"""An OTLP/HTTP receiver for tests: decodes what it gets by the official messages, and answers what it is told to."""

import gzip
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

Answer = Callable[[str, Any], int]


class Receiver:
    """`url` is its base; `spans` and `logs` hold what was taken, by its status. `answer(path, request)` is the status
    of each request."""

    def __init__(self, answer: Answer = lambda _path, _request: 200) -> None:
        self.answer = answer
        self.spans: list[Any] = []
        self.logs: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.requests = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: TracebackType | type[BaseException] | BaseException | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def attributes(self, item: Any) -> dict[str, Any]:
        """The attributes of a span or a record."""
        return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in item.attributes}

    def _take(self, path: str, body: bytes, headers: dict[str, str]) -> int:
        self.requests += 1
        self.headers.append(headers)
        if headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        kind = ExportLogsServiceRequest if path == "/v1/logs" else ExportTraceServiceRequest
        request: Any = kind.FromString(body)
        status = self.answer(path, request)
        if status == 200 and path == "/v1/logs":
            self.logs += [one for res in request.resource_logs for sc in res.scope_logs for one in sc.log_records]
        elif status == 200:
            self.spans += [one for res in request.resource_spans for sc in res.scope_spans for one in sc.spans]
        return status

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(receiver._take(self.path, body, headers))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        return Handler

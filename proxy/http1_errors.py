"""What can go wrong between the proxy and an upstream.

TransportError               root; `bytes_seen` counts the bytes of the answer that had come
+-- InvalidRequest           refused before anything was sent: a name, value or path that would break the framing
+-- ConnectFailed            no connection, nothing was sent: trying again is safe
|   +-- TlsFailed            the handshake failed: certificate, host name, protocol
|   +-- ConnectTimeout       name, address and handshake together took too long
+-- ReadTimeout              the answer stood still for too long
+-- ProtocolError            what came is not an answer, or is over a limit
+-- ClosedEarly              the connection ended before the answer was whole
"""


class TransportError(Exception):
    """Root of the tree. `bytes_seen` is 0 when nothing of an answer had arrived."""

    def __init__(self, message: str, bytes_seen: int = 0) -> None:
        super().__init__(message)
        self.bytes_seen = bytes_seen


class InvalidRequest(TransportError):
    """The request would not be one request on the wire; nothing was sent."""


class ConnectFailed(TransportError):
    """There is no connection; nothing was sent."""


class TlsFailed(ConnectFailed):
    """The TLS handshake failed; nothing was sent."""


class ConnectTimeout(ConnectFailed):
    """Connecting took too long; nothing was sent."""


class ReadTimeout(TransportError):
    """The answer made no progress for `read_timeout` seconds."""


class ProtocolError(TransportError):
    """The answer is malformed, ambiguous or over a limit."""


class ClosedEarly(TransportError):
    """The connection ended before the answer was whole.

    `stale` says that a kept connection ended at once, before any byte: the server had given it up while idle.
    """

    def __init__(self, message: str, bytes_seen: int = 0, *, stale: bool = False) -> None:
        super().__init__(message, bytes_seen)
        self.stale = stale

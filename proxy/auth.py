"""Who may call: the Host header of a loopback server, and Ratchet keys where they are configured."""

from collections.abc import Mapping
from hashlib import sha256

from collector.settings import LOOPBACK, Key, Server
from proxy.errors import Forbidden, Unauthorized

_REMEMBERED = 4096


class Guard:
    """The rules of one server. Without configured keys everyone who reaches it may call."""

    def __init__(self, server: Server) -> None:
        self._keys = {_digest(key): key for key in server.keys}
        self._seen: dict[bytes, Key] = {}
        # Off loopback every Host is served, unless some are named: then those, and this machine's own.
        allowed = (*LOOPBACK, server.host, *server.allowed_hosts) if server.loopback or server.allowed_hosts else ()
        self._hosts = frozenset(host.lower() for host in allowed)

    @property
    def keyed(self) -> bool:
        """Whether `Authorization` carries a Ratchet key, which then never goes upstream."""
        return bool(self._keys)

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Forbidden for a foreign Host: a page on the web must not reach a loopback server by DNS rebinding."""
        if self._hosts and _hostname(headers.get(b"host", b"")) not in self._hosts:
            raise Forbidden("this Host isn't served here; add it to server.allowed_hosts", param="host")

    def authorise(self, headers: Mapping[bytes, bytes], scope: str) -> str | None:
        """The name of the key, None where no keys are configured. The scope `admin` includes the others.

        The key is in `Authorization: Bearer` or, as Anthropic's clients send it, in `x-api-key`. Raises Unauthorized.
        """
        if not self._keys:
            return None
        given = headers.get(b"authorization") or headers.get(b"x-api-key", b"")
        key = self._seen.get(given) or self._look_up(given)
        if key is None:
            raise Unauthorized("a Ratchet key is needed: none was given, or it isn't known", param="authorization")
        if scope not in key.scopes and "admin" not in key.scopes:
            message = f"the key `{key.name}` lacks the scope `{scope}`"
            raise Forbidden(message, param="authorization", code="insufficient_scope")
        return key.name

    def _look_up(self, given: bytes) -> Key | None:
        """Compares digests, so that timing tells nothing about a key. Only good headers are remembered, and few."""
        token = (given[7:] if given[:7].lower() == b"bearer " else given).strip()
        key = self._keys.get(sha256(token).hexdigest()) if token else None
        if key is not None and len(self._seen) < _REMEMBERED:
            self._seen[given] = key
        return key


def _digest(key: Key) -> str:
    return key.key_sha256.lower() if key.key_sha256 else sha256((key.key or "").encode()).hexdigest()


def _hostname(host: bytes) -> str:
    """Without port and brackets, in lower case."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text

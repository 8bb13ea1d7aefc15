"""Who may call: the Host header of a loopback server, and Ratchet keys where there are any.

Keys come from the configuration (`server.keys`) and from `ratchet keys create`; the latter arrive with the deployments
and go with them, so that a revoked key is refused within a second. On loopback, `admin` stays open until a key with
that scope exists: whoever makes a first key for an agent doesn't lock itself out.
"""

from collections.abc import Mapping
from hashlib import sha256

from collector.settings import LOOPBACK, Key, Server
from proxy.errors import Forbidden, Unauthorized
from proxy.versions import Grant, Snapshot, Versions

_REMEMBERED = 4096


class Guard:
    """The rules of one server. Without any key everyone who reaches it may call."""

    def __init__(self, server: Server, versions: Versions | None = None) -> None:
        self._configured = {grant.key_sha256: grant for grant in map(_grant, server.keys)}
        self._versions = versions
        self._loopback = server.loopback
        self._adopt(Snapshot() if versions is None else versions.current)
        # Off loopback every Host is served, unless some are named: then those, and this machine's own.
        allowed = (*LOOPBACK, server.host, *server.allowed_hosts) if server.loopback or server.allowed_hosts else ()
        self._hosts = frozenset(host.lower() for host in allowed)
        self._known: set[bytes | None] = set()  # Host headers found to be ours

    @property
    def keyed(self) -> bool:
        """Whether `Authorization` carries a Ratchet key, which then never goes upstream."""
        self._refresh()
        return self._required

    def limits(self, ident: str | None) -> Mapping[str, float] | None:
        """What a key may use; None: as much as it likes."""
        return self._limits.get(ident) if ident is not None else None

    def check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises Forbidden for a foreign Host: a page on the web must not reach a loopback server by DNS rebinding."""
        if self._hosts and headers.get(b"host") not in self._known and not self._is_ours(headers.get(b"host", b"")):
            raise Forbidden("this Host isn't served here; add it to server.allowed_hosts", param="host")

    def _is_ours(self, host: bytes) -> bool:
        ours = _hostname(host) in self._hosts
        if ours and len(self._known) < _REMEMBERED:
            self._known.add(host)
        return ours

    def authorise(self, headers: Mapping[bytes, bytes], scope: str) -> str | None:
        """What spans call the key, None where none is asked for. The scope `admin` includes the others.

        The key is in `Authorization: Bearer` or, as Anthropic's clients send it, in `x-api-key`. Raises Unauthorized.
        """
        self._refresh()
        if not self._required or (scope == "admin" and self._open_admin):
            return None
        given = headers.get(b"authorization") or headers.get(b"x-api-key", b"")
        key = self._seen.get(given) or self._look_up(given)
        if key is None:
            raise Unauthorized("a Ratchet key is needed: none was given, or it isn't known", param="authorization")
        if scope not in key.scopes and "admin" not in key.scopes:
            message = f"the key `{key.name}` lacks the scope `{scope}`"
            raise Forbidden(message, param="authorization", code="insufficient_scope")
        return key.ident

    def _refresh(self) -> None:
        """Takes over keys that were made or revoked: snapshots are swapped whole, so a look at the identity tells."""
        if self._versions is not None and self._versions.current is not self._adopted:
            self._adopt(self._versions.current)

    def _adopt(self, snapshot: Snapshot) -> None:
        self._adopted = snapshot
        self._keys = {grant.key_sha256: grant for grant in snapshot.keys} | self._configured
        self._required = snapshot.keyed or bool(self._configured)
        admin = any("admin" in grant.scopes for grant in snapshot.keys)
        self._open_admin = self._loopback and not self._configured and not admin
        self._limits = {grant.ident: dict(grant.limits) for grant in self._keys.values() if grant.limits}
        self._seen: dict[bytes, Grant] = {}

    def _look_up(self, given: bytes) -> Grant | None:
        """Compares digests, so that timing tells nothing about a key. Only good headers are remembered, and few."""
        token = (given[7:] if given[:7].lower() == b"bearer " else given).strip()
        key = self._keys.get(sha256(token).hexdigest()) if token else None
        if key is not None and len(self._seen) < _REMEMBERED:
            self._seen[given] = key
        return key


def _grant(key: Key) -> Grant:
    digest = key.key_sha256.lower() if key.key_sha256 else sha256((key.key or "").encode()).hexdigest()
    limits = tuple((name, float(value)) for name, value in key.limits.model_dump().items() if value is not None)
    return Grant(key.name, key.name, digest, frozenset(key.scopes), limits)


def _hostname(host: bytes) -> str:
    """Without port and brackets, in lower case."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text

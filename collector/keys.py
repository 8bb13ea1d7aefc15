"""Keys that are made and revoked while the server runs: a fold of `key` events.

A secret is made here, told once, and forgotten: only its sha256 is journalled. Commands are pure, as in `registry.py`.
"""

import hashlib
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from collector.errors import BadInput, Conflict, NotFound

SCOPES = ("agent", "reward", "admin")
DEFAULT_SCOPES = ("agent", "reward")
LIMITS = ("requests_per_minute", "concurrent", "tokens_per_day", "tokens_total", "usd_per_day", "usd_total")
_WHOLE = ("requests_per_minute", "concurrent", "tokens_per_day", "tokens_total")
_NAME = re.compile(r"[A-Za-z0-9_.@ -]{1,64}")
Event = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key as it is known after it was told: everything but the secret. `limits` holds only those that are set."""

    key_id: str  # key-<8 hex digits>; what spans carry
    name: str
    key_sha256: str
    scopes: tuple[str, ...]
    limits: Mapping[str, float]
    created_ns: int
    revoked_ns: int | None = None


class Keys:
    """All keys that were ever made. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._keys: dict[str, ApiKey] = {}

    def create(
        self, name: str, scopes: tuple[str, ...], limits: Mapping[str, float | None], now_ns: int
    ) -> tuple[str, ApiKey, list[Event]]:
        """`(secret, key, events)` of a new key. Raises BadInput that names the field, Conflict for a name in use."""
        if not _NAME.fullmatch(name):
            raise BadInput("name: use 1 to 64 letters, digits, spaces or any of _ . @ -", param="name")
        if any(key.name == name and key.revoked_ns is None for key in self._keys.values()):
            raise Conflict(f"there is a key `{name}` already; revoke it, or choose another name", param="name")
        checked = tuple(scope for scope in SCOPES if scope in scopes)
        if not checked or set(scopes) - set(SCOPES):
            raise BadInput(f"scopes: give one or more of {', '.join(SCOPES)}", param="scopes")
        secret = "sk-rt-" + secrets.token_hex(32)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        key = ApiKey(f"key-{secrets.token_hex(4)}", name, digest, checked, check_limits(limits), now_ns)
        return secret, key, [("key", {**_fields(key), "action": "create", "ts_ns": now_ns})]

    def revoke(self, key: str, now_ns: int) -> tuple[ApiKey, list[Event]]:
        """The key of that id or name, and the event; none for one that is revoked already. Raises NotFound."""
        found = self._keys.get(key) or self._named(key)
        if found is None:
            raise NotFound(f"there is no key `{key}`; `ratchet keys list` shows them", param="key")
        if found.revoked_ns is not None:
            return found, []
        return found, [("key", {**_fields(found), "action": "revoke", "ts_ns": now_ns})]

    def _named(self, name: str) -> ApiKey | None:
        """By name: the one in force, else the last that was."""
        named = [key for key in self._keys.values() if key.name == name]
        return next((key for key in named if key.revoked_ns is None), named[-1] if named else None)

    def apply(self, fields: Mapping[str, Any]) -> None:
        """Folds one stored event; one that was folded before changes nothing."""
        known = self._keys.get(fields["key_id"])
        if known is not None and known.revoked_ns is not None:
            return
        revoked = fields["ts_ns"] if fields["action"] == "revoke" else None
        created = known.created_ns if known is not None else fields["ts_ns"]
        scopes, limits = tuple(fields["scopes"]), dict(fields["limits"])
        sha = fields["key_sha256"]
        self._keys[fields["key_id"]] = ApiKey(fields["key_id"], fields["name"], sha, scopes, limits, created, revoked)

    def get(self, key_id: str) -> ApiKey:
        """One key. Raises NotFound."""
        if key_id not in self._keys:
            raise NotFound(f"there is no key `{key_id}`", param="key")
        return self._keys[key_id]

    def listed(self) -> list[dict[str, Any]]:
        """Every key, oldest first, without its digest."""
        return [shown(key) for key in self._keys.values()]

    def in_force(self) -> list[dict[str, Any]]:
        """What a proxy needs to know of the keys that may be used."""
        names = ("key_id", "name", "key_sha256", "scopes", "limits")
        live = [asdict(key) for key in self._keys.values() if key.revoked_ns is None]
        return [{name: key[name] for name in names} for key in live]

    @property
    def any(self) -> bool:
        """Whether a key was ever made. From then on keys are asked for: revoking the last one opens nothing."""
        return bool(self._keys)


def shown(key: ApiKey) -> dict[str, Any]:
    """A key as it may be shown."""
    known = {name: value for name, value in asdict(key).items() if name != "key_sha256"}
    return {**known, "scopes": list(key.scopes)}


def check_limits(limits: Mapping[str, float | None]) -> dict[str, float]:
    """The limits that are given. Raises BadInput for an unknown name, or a value that is no positive number."""
    checked: dict[str, float] = {}
    for name, value in limits.items():
        if value is None:
            continue
        if name not in LIMITS:
            raise BadInput(f"limits.{name}: unknown; known are {', '.join(LIMITS)}", param=f"limits.{name}")
        sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not sound or (name in _WHOLE and value != int(value)):
            kind = "a whole number above 0" if name in _WHOLE else "a number above 0"
            raise BadInput(f"limits.{name}: must be {kind}", param=f"limits.{name}")
        checked[name] = int(value) if name in _WHOLE else float(value)
    return checked


def _fields(key: ApiKey) -> dict[str, Any]:
    return {
        "key_id": key.key_id,
        "name": key.name,
        "key_sha256": key.key_sha256,
        "scopes": list(key.scopes),
        "limits": dict(key.limits),
    }

"""What a URL asks for: scope, dialect, and the path upstream."""

from functools import lru_cache
from typing import NamedTuple
from urllib.parse import unquote

from proxy.dialects import KNOWN, OTHER
from proxy.dialects.base import Dialect
from proxy.errors import BadRequest

_COLD = frozenset(("models", "reward", "traces", "logs"))  # under /v1, but not relayed


class Route(NamedTuple):
    """A parsed path. `dialect` is None for what the relay doesn't serve; `tail` is what follows /v1/."""

    dialect: Dialect | None
    tail: str
    path: str  # without scope, with at most one /v1
    episode: str | None = None
    pins: str | None = None


@lru_cache(maxsize=2048)
def parse(method: str, raw_path: str) -> Route:
    """The route of a path as it came over the wire (still percent-encoded). Raises BadRequest for `..` in it."""
    parts = raw_path.removeprefix("/").split("/")
    if any(unquote(part) in (".", "..") for part in parts):
        raise BadRequest("the path must not contain `.` or `..`", param="path")
    episode, pins = None, None
    if len(parts) >= 2 and parts[0] == "e":
        episode, parts = unquote(parts[1]), parts[2:]
        if len(parts) >= 2 and parts[0] == "with":
            pins, parts = unquote(parts[1]), parts[2:]
    versioned = parts[:1] == ["v1"]
    while parts[:1] == ["v1"]:
        parts = parts[1:]
    plain = [part for part in parts if part]
    if "/".join(plain) in KNOWN:
        parts = plain  # a base URL that ends in a slash: the prompt is found all the same
    tail = "/".join(parts)
    path = ("/v1/" if versioned else "/") + tail
    return Route(_dialect(method, tail, parts, versioned), tail, path, episode, pins)


def _dialect(method: str, tail: str, parts: list[str], versioned: bool) -> Dialect | None:
    if method == "POST" and tail in KNOWN:
        return KNOWN[tail]
    if not tail or parts[0] in _COLD or not (versioned or _belongs(tail)):
        return None
    return OTHER


def _belongs(tail: str) -> bool:
    """Whether a path without /v1 is about what a known one made: a stored response or completion, a token count."""
    return any(tail == known or tail.startswith(f"{known}/") for known in KNOWN)


def pinned(pins: str | None) -> dict[str, str]:
    """The versions that a URL pins: slot -> "3" or "c-…". Raises BadRequest."""
    found: dict[str, str] = {}
    for pin in pins.split(",") if pins is not None else ():
        slot, at, version = pin.rpartition("@")
        number = version.isascii() and version.isdigit() and len(version) < 10
        if not at or not slot or not (number or version.startswith("c-")):
            raise BadRequest(f"`{pin[:200]}` pins nothing; write slot@3 or slot@c-0123456789ab", param="with")
        found[slot] = version
    return found

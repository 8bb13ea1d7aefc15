"""Errors a user can act on.

    RatchetError                 root; `status` is the HTTP status it maps to
    +-- BadInput                 422  a field is wrong: `param` names it, the message says how to mend it
    |   +-- ConfigError          the configuration file or environment is wrong
    |   +-- QueryError           400  SQL that is not one read-only statement, or failed
    +-- NotFound                 404  no such slot, version, episode, job
    +-- Conflict                 409  the state does not allow it (nothing to roll back to, store in use)
    +-- Unavailable              503  the collector or the disk cannot take it now; nothing was stored
    +-- BadRows                       lines of the journal that the store's tables refuse

Exit codes of the command line: 0 done, 1 not done (`RatchetError`), 2 bad input (`BadInput`).
"""

import contextlib
from typing import Any

import orjson

from collector import redact


class RatchetError(Exception):
    """Root of the tree. `message` is for people, `code` for programs, `param` names the offending field."""

    status = 500
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code

    def envelope(self) -> dict[str, Any]:
        """OpenAI's error envelope, so that any OpenAI client shows the message. What it quotes may hold a secret."""
        message, _ = redact.text(self.message)
        return {"error": {"message": message, "type": "ratchet_error", "param": self.param, "code": self.code}}


class BadInput(RatchetError):
    """A field is wrong; nothing was stored."""

    status = 422
    code = "invalid_input"


class ConfigError(BadInput):
    """The configuration is wrong."""

    code = "invalid_config"


class QueryError(BadInput):
    """SQL that is not one read-only statement, or that failed."""

    status = 400
    code = "invalid_query"


class NotFound(RatchetError):
    """There is no such thing."""

    status = 404
    code = "not_found"


class Conflict(RatchetError):
    """The present state does not allow it."""

    status = 409
    code = "conflict"


class BadRows(RatchetError):
    """Lines of the journal that the store's tables refuse: the loader sets them aside."""

    code = "bad_rows"


class Unavailable(RatchetError):
    """Cannot be taken now; nothing was stored; try again."""

    status = 503
    code = "unavailable"


def told(body: bytes) -> tuple[str, str | None]:
    """Message and code of an envelope; ("", None) where the body is none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = orjson.loads(body)["error"]
        return str(error["message"]), error.get("code")
    return "", None

"""Answers of a server as values, or as the errors that they carry."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from collector.errors import BadInput, Conflict, NotFound, QueryError, RatchetError, Unavailable

if TYPE_CHECKING:
    import httpx

_ERRORS: dict[int, type[RatchetError]] = {
    400: QueryError,
    404: NotFound,
    409: Conflict,
    413: BadInput,
    422: BadInput,
    503: Unavailable,
}


def read(answer: "httpx.Response", url: str) -> Any:
    """The JSON of an answer, or the error that it carries, as the class that the server raised."""
    try:
        value = answer.json()
    except ValueError:
        raise Unavailable(f"{url} answered {answer.status_code} without JSON: is it a Ratchet server?") from None
    if answer.is_success:
        return value
    error = value.get("error") if isinstance(value, dict) else None
    if not isinstance(error, dict):
        raise Unavailable(f"{url} answered {answer.status_code}: is it a Ratchet server?")
    kind = _ERRORS.get(answer.status_code, RatchetError)
    raise kind(str(error.get("message")), param=error.get("param"), code=error.get("code"))


def joined(first: dict[str, Any], more: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """All pages of a query as one."""
    rows, page = list(first["rows"]), first
    while "next" in page:
        page = more(page["next"])
        rows += page["rows"]
    return {"columns": first["columns"], "rows": rows, "truncated": page["truncated"]}


def as_dict(value: Any) -> dict[str, Any]:
    """An answer that must be an object."""
    if not isinstance(value, dict):
        raise Unavailable("the server answered something else than an object")
    return value


def as_list(value: Any, key: str) -> list[dict[str, Any]]:
    """The list under a key of the answer."""
    return list(as_dict(value)[key])

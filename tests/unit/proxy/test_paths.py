"""What a URL asks for, with and without /v1."""

import pytest

from proxy.dialects import KNOWN, OTHER
from proxy.paths import parse


@pytest.mark.parametrize("scope", ["", "/v1", "/e/task-1", "/e/task-1/v1", "/e/task-1/with/a@1"])
@pytest.mark.parametrize(
    ("method", "tail"),
    [
        ("GET", "responses/resp_1"),
        ("DELETE", "responses/resp_1"),
        ("POST", "responses/resp_1/cancel"),
        ("GET", "chat/completions"),
        ("POST", "messages/count_tokens"),
    ],
)
def test_what_a_call_made_is_reached_with_and_without_v1(scope: str, method: str, tail: str) -> None:
    route = parse(method, f"{scope}/{tail}")
    assert route.dialect is OTHER
    assert route.tail == tail


@pytest.mark.parametrize("tail", list(KNOWN))
def test_a_known_path_has_its_dialect_with_and_without_v1(tail: str) -> None:
    assert parse("POST", f"/{tail}").dialect is parse("POST", f"/v1/{tail}").dialect is KNOWN[tail]


@pytest.mark.parametrize("path", ["/response", "/responsesx", "/chat", "/files", "/", "/v1", "/models", "/v1/models/a"])
def test_a_path_that_only_looks_like_a_known_one_is_not_relayed(path: str) -> None:
    assert parse("GET", path).dialect is None


@pytest.mark.parametrize("path", ["/v1//chat/completions", "/v1/chat/completions/"])
def test_a_slash_too_many_in_the_base_url_changes_nothing(path: str) -> None:
    assert parse("POST", path).tail == "chat/completions"
    assert parse("POST", path).dialect is parse("POST", "/v1/chat/completions").dialect

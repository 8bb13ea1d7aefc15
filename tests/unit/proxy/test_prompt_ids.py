"""`prompt_id` and `prompt_variables`: the prompt that a call asks for by name, in every dialect that has prompts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fake_upstream import FakeUpstream
from tests.unit.proxy.harness import Registry, Worker, worker

ASKED = {"prompt_id": "geo", "prompt_variables": {"country": "France", "words": 1}}
TEXT = "Name the capital of France in 1 word."


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def proxy(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    registry = Registry()
    registry.add("geo", "Name the capital of {country} in {words} word.", "{country}: its capital, {words} word.")
    registry.add("old", "{gone} and {kept}", "{kept}")
    with worker(tmp_path_factory.mktemp("ids"), upstream.url, registry) as running:
        yield running


def call(proxy: Worker, upstream: FakeUpstream, body: Any, path: str = "chat/completions") -> httpx.Response:
    upstream.forget()
    proxy.spans.clear()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return proxy.client.post(f"{proxy.url}/{path}", content=raw)


USER = {"role": "user", "content": "Please."}


@pytest.mark.parametrize(
    ("path", "given", "sent"),
    [
        ("chat/completions", {"messages": [USER]}, {"messages": [{"role": "system", "content": TEXT}, USER]}),
        (
            "chat/completions",
            {"messages": [{"role": "developer", "content": "own"}, USER]},
            {"messages": [{"role": "developer", "content": TEXT}, USER]},
        ),
        ("chat/completions", {}, {"messages": [{"role": "system", "content": TEXT}]}),
        ("responses", {"input": "Please."}, {"instructions": TEXT, "input": "Please."}),
        ("completions", {"max_tokens": 3}, {"prompt": TEXT, "max_tokens": 3}),
        ("messages", {"messages": [USER], "system": "own"}, {"messages": [USER], "system": TEXT}),
    ],
)
def test_the_slots_prompt_takes_its_place_and_the_two_members_stay_here(
    proxy: Worker, upstream: FakeUpstream, path: str, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    reply = call(proxy, upstream, {"model": "m", **ASKED, **given}, path)
    assert reply.status_code == 200
    assert upstream.requests[0].json == {"model": "m", **sent}
    assert reply.headers["x-ratchet-versions"] == "geo@1"
    span = proxy.span(count=1)
    assert (span["prompt_slot"], span["prompt_version"], span["propensity"]) == ("geo", 1, 1.0)
    assert json.loads(span["attributes"])["variables"] == {"country": "France", "words": "1"}


def test_every_other_byte_of_the_body_stays_as_it_was(proxy: Worker, upstream: FakeUpstream) -> None:
    head = (
        b'{ "seed" : 12345678901234567890123, "prompt_id":"geo","prompt_variables": {"country":"France","words":"1"}, '
    )
    call(proxy, upstream, head + b'"x":1e2,"messages":[{"role":"user","content":"\\u00e9"}]}')
    put = b'"messages":[{"role":"system","content":"' + TEXT.encode() + b'"},{"role":"user","content":"\\u00e9"}]}'
    assert upstream.requests[0].body == b'{ "seed" : 12345678901234567890123, "x":1e2,' + put


@pytest.mark.parametrize(
    ("asked", "status", "param", "says"),
    [
        ({"prompt_id": "geo"}, 400, "prompt_variables.country", "needs `country`, `words`"),
        ({"prompt_id": "geo", "prompt_variables": {"country": "x"}}, 400, "prompt_variables.words", "needs `words`"),
        ({**ASKED, "prompt_variables": {**ASKED["prompt_variables"], "z": "1"}}, 400, "prompt_variables.z", "`z`"),  # type: ignore[dict-item]
        ({"prompt_id": "geo", "prompt_variables": {"country": None}}, 400, "prompt_variables.country", "string"),
        ({"prompt_id": "geo", "prompt_variables": ["x"]}, 400, "prompt_variables", "object"),
        ({"prompt_id": 7}, 400, "prompt_id", "name of a slot"),
        ({"prompt_id": "nope"}, 404, "prompt_id", "`nope`"),
    ],
)
def test_what_is_wrong_is_named_recorded_and_never_sent(
    proxy: Worker, upstream: FakeUpstream, asked: dict[str, Any], status: int, param: str, says: str
) -> None:
    reply = call(proxy, upstream, {"model": "m", "messages": [USER], **asked})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["type"]) == (status, param, "ratchet_error")
    assert says in error["message"]
    assert upstream.requests == []
    assert proxy.span(count=1)["http_status"] == status


def test_a_variable_that_only_another_version_has_is_no_mistake(proxy: Worker, upstream: FakeUpstream) -> None:
    proxy.registry.promote("old", {"2": 1.0})
    proxy.catch_up()
    body = {"model": "m", "messages": [], "prompt_id": "old", "prompt_variables": {"gone": "a", "kept": "{gone}"}}
    assert call(proxy, upstream, body).headers["x-ratchet-versions"] == "old@2"
    assert upstream.requests[0].json["messages"] == [{"role": "system", "content": "{gone}"}]


def test_a_pin_decides_the_version(proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.forget()
    url = f"{proxy.root}/e/pinned/with/geo@2/v1/chat/completions"
    reply = proxy.client.post(url, json={"model": "m", "messages": [], **ASKED})
    assert reply.headers["x-ratchet-versions"] == "geo@2"
    assert upstream.requests[0].json["messages"][0]["content"] == "France: its capital, 1 word."


def test_a_conversation_that_asks_each_time_is_one_episode(proxy: Worker, upstream: FakeUpstream) -> None:
    begin = {"role": "user", "content": "Something nobody else says."}
    first = call(proxy, upstream, {"model": "m", "messages": [begin], **ASKED})
    reply = first.json()["choices"][0]["message"]
    more = [begin, reply, {"role": "user", "content": "And now?"}]
    second = call(proxy, upstream, {"model": "m", "messages": more, **ASKED})
    assert second.headers["x-ratchet-episode"] == first.headers["x-ratchet-episode"]


def test_other_paths_may_use_the_name_for_themselves(proxy: Worker, upstream: FakeUpstream, tmp_path: Path) -> None:
    assert call(proxy, upstream, {"prompt_id": "anything"}, "images/generations").status_code == 200
    assert upstream.requests[0].json == {"prompt_id": "anything"}

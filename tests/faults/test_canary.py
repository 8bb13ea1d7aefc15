"""Keys planted wherever a client may put one are found in no file, log, answer or metric.

RATCHET_CANARIES sets the number of requests; `make faults` sends a thousand.
"""

import concurrent.futures
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.fake_upstream import FakeUpstream, Received, Reply, chat, chat_events, error_reply, sse_reply
from tests.served import Served, run_ratchet, served

REQUESTS = int(os.environ.get("RATCHET_CANARIES", "60"))
TRANSLATED = 4  # of them: LiteLLM is slow to import, and is only needed for some
CLIENT = "sk-proj-canary0123456789abcdefCLIENT"  # an agent's own key, of the kinds that agents have
ENTRY = "sk-canary-entry-0123456789abcdefghij"  # of the configuration
TOKEN = "ghp_canary0123456789abcdefghijABCDEF"
BEARER = "canary.bearer-0123456789abcdef/xyz+A=="
PLANTED = (CLIENT, ENTRY, TOKEN, BEARER)

Send = Callable[[httpx.Client, str, dict[str, str]], httpx.Response]


def answer(request: Received) -> Reply:
    """Paris, a stream of it, an error, or a broken connection, as the message says."""
    if request.path.endswith("/messages"):
        return error_reply(500, "overloaded")
    try:
        text = str(request.json["messages"][-1]["content"])
    except (ValueError, KeyError, TypeError):
        return error_reply(400, "could not be parsed", "invalid_request_error")
    if "fail" in text:
        return error_reply(401, "Incorrect API key provided", "invalid_api_key")
    if "break" in text:
        return Reply(end="reset")
    if request.json.get("stream"):
        cut = chat_events()[:3] if "cut" in text else chat_events()
        return sse_reply(cut, end="reset" if "cut" in text else "clean")
    return chat("Paris")


def body(text: str = "Capital?", **more: Any) -> dict[str, Any]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": text}], **more}


def chat_call(given: Any, query: str = "", **headers: str) -> Send:
    content = given if isinstance(given, bytes) else json.dumps(given).encode()

    def send(client: httpx.Client, url: str, own: dict[str, str]) -> httpx.Response:
        return client.post(f"{url}/v1/chat/completions{query}", content=content, headers={**own, **headers})

    return send


KINDS: tuple[Send, ...] = (
    chat_call(body(f"my key is {CLIENT}, keep it")),
    chat_call(body(f"{TOKEN}\nBearer {BEARER}", stream=True)),
    chat_call(body(f"fail with {CLIENT}")),
    chat_call(body(f"break {CLIENT}")),
    chat_call(body(f"cut {CLIENT}", stream=True)),
    chat_call(body(user=CLIENT, metadata={"token": TOKEN, "auth": f"Bearer {BEARER}"})),
    chat_call(body(tools=[{"type": "function", "function": {"name": "f", "description": CLIENT}}])),
    chat_call(body(), f"?api_key={CLIENT}&token={TOKEN}"),
    chat_call(body(model=CLIENT)),
    chat_call(b'{"model": "' + CLIENT.encode()),
    chat_call(b"\x00" + CLIENT.encode(), **{"content-encoding": "gzip"}),
    chat_call({**body(), "prompt_id": CLIENT}),
    chat_call(
        body(), **{"api-key": CLIENT, "cookie": f"session={TOKEN}", "x-custom": BEARER, "x-ratchet-slot": CLIENT}
    ),
    chat_call(body(), host=f"{CLIENT}.example"),
    chat_call(body(), **{"x-ratchet-episode": f"bad id {CLIENT}"}),
    lambda client, url, own: client.get(f"{url}/v1/files/{CLIENT}/content", headers=own),
    lambda client, url, own: client.get(f"{url}/v1/models/{CLIENT}", headers=own),
    lambda client, url, own: client.post(f"{url}/v1/messages", json=body(), headers={"x-api-key": CLIENT}),
    lambda client, url, own: client.post(f"{url}/reward", json={"episode_id": "e", "value": CLIENT}, headers=own),
    lambda client, url, own: client.get(f"{url}/nothing/{CLIENT}?k={TOKEN}", headers=own),
)
_CLAUDE = body(f"fail, my key is {CLIENT}", api_base=f"http://{CLIENT}.example", api_key=CLIENT) | {"model": "claude"}
TRANSLATE: tuple[Send, ...] = (chat_call(_CLAUDE), chat_call(body(f"key {CLIENT}") | {"model": "claude"}))


def make(server: Served, sends: list[Send]) -> list[httpx.Response]:
    """All of them, some at a time; answers that were cut are left out, and so are those that quote what was sent."""
    own = {"authorization": f"Bearer {CLIENT}"}
    done: list[httpx.Response] = []

    def one(send: Send) -> None:
        with httpx.Client(timeout=60) as client:
            try:
                done.append(send(client, server.url, own))
            except httpx.RemoteProtocolError:
                return

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(one, sends))
    return done


def leaks(what: bytes) -> list[str]:
    return [secret for secret in PLANTED if secret.encode() in what]


@pytest.mark.timeout(600)
def test_planted_keys_are_found_in_no_file_log_answer_or_metric(tmp_path: Path) -> None:
    with FakeUpstream(answer) as upstream:
        base = upstream.url.removesuffix("/v1")
        entry = {"model": "anthropic/claude-haiku-4-5", "api_key": ENTRY, "api_base": base}
        raw = {"model": "openai/gpt-x", "api_key": ENTRY, "api_base": upstream.url}
        models = [{"model_name": "claude", "litellm_params": entry}, {"model_name": "gpt", "litellm_params": raw}]
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump({"model_list": models, "upstream": {"anthropic": upstream.url}}))
        with served(tmp_path / "data", upstream.url, "--workers", "2", config=config) as server:
            sends = [KINDS[number % len(KINDS)] for number in range(REQUESTS - TRANSLATED)]
            sends += [chat_call(body() | {"model": "gpt"}), *(TRANSLATE * (TRANSLATED // 2))]
            random.Random(1).shuffle(sends)
            answers = make(server, sends)
            made = json.loads(run_ratchet("keys", "create", "bot", "--json", "--url", server.url).stdout)["key"]
            answers += make_with(server, made)
            server.client.flush()
            told = [
                httpx.get(f"{server.url}{path}").content
                for path in ("/metrics", "/api/stats", "/api/spans", "/api/keys")
            ]
            told += [server.client.query("SELECT * FROM spans_v", limit=10_000).__repr__().encode()]
        assert len(answers) > REQUESTS * 3 // 4
        assert {one.status_code for one in answers} >= {200, 400, 401, 403, 404, 422, 500, 502}
        sent = b"".join(b"%b %r" % (one.body, one.headers) for one in upstream.requests)
        assert CLIENT.encode() in sent, "the upstream was to get the client's key"
        secrets = (*PLANTED, made)
        everything = {"answer": b"\n".join(_answer(one) for one in answers), "told": b"\n".join(told)}
        everything |= {
            str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != config
        }
        found = {(where, secret) for where, what in everything.items() for secret in secrets if secret.encode() in what}
        assert found == set()
        assert any(name.endswith(".ndjson") for name in everything)
        assert any(name.endswith(".log") for name in everything)


def make_with(server: Served, key: str) -> list[httpx.Response]:
    """Some calls with a Ratchet key, good and bad."""
    calls = []
    with httpx.Client(timeout=60) as client:
        for given in (key, key[:-1], CLIENT):
            headers = {"authorization": f"Bearer {given}"}
            calls.append(client.post(f"{server.url}/v1/chat/completions", json=body(f"I am {key}"), headers=headers))
    return calls


def _answer(response: httpx.Response) -> bytes:
    return repr(response.headers).encode() + response.content

"""Who gets in, where calls go, and what of a client's credentials goes along."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from collector.settings import Settings
from proxy import limits
from proxy.auth import Guard
from proxy.errors import BadRequest, Forbidden, HeadersTooLarge, Overloaded, Unauthorized
from proxy.limits import Calls
from proxy.upstream import Upstream, headers_for
from proxy.versions import Grant, Snapshot, Versions
from tests.fake_upstream import FakeUpstream, json_reply
from tests.unit.proxy.harness import Registry, worker

KEYS = [
    {"name": "bot", "key": "rk-agent"},
    {"name": "boss", "key_sha256": sha256(b"rk-admin").hexdigest().upper(), "scopes": ["admin"]},
]
BODY = b'{"model":"m","messages":[]}'


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


def guard(**server: Any) -> Guard:
    return Guard(Settings.model_validate({"server": server}).server)


SERVED = ["127.0.0.1", "127.0.0.1:4000", "localhost:1", "LOCALHOST", "[::1]:4000", "[::1]", "ok.example"]
REFUSED = ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:4000", "127.0.0.2", "[::2]", "::1"]


@pytest.mark.parametrize("host", SERVED)
def test_hosts_of_this_machine_and_allowed_ones_are_served(host: str) -> None:
    guard(allowed_hosts=["ok.example"]).check_host({b"host": host.encode()})


@pytest.mark.parametrize("host", REFUSED)
def test_any_other_host_is_refused_on_loopback(host: str) -> None:
    with pytest.raises(Forbidden):
        guard().check_host({b"host": host.encode()})


def test_off_loopback_any_host_is_served_unless_some_are_named() -> None:
    guard(host="0.0.0.0", keys=KEYS).check_host({b"host": b"any.example"})
    with pytest.raises(Forbidden):
        guard(host="0.0.0.0", keys=KEYS, allowed_hosts=["ok.example"]).check_host({b"host": b"any.example"})
    for host in (b"ok.example", b"10.0.0.7:4000", b"localhost:4000"):
        guard(host="10.0.0.7", keys=KEYS, allowed_hosts=["ok.example"]).check_host({b"host": host})


def test_keys_are_checked_with_their_scopes() -> None:
    keyed = guard(keys=KEYS)
    assert keyed.authorise({b"authorization": b"Bearer rk-agent"}, "agent") == "bot"
    assert keyed.authorise({b"authorization": b"bearer rk-agent"}, "agent") == "bot"
    assert keyed.authorise({b"x-api-key": b"rk-agent"}, "agent") == "bot"
    assert keyed.authorise({b"authorization": b"Bearer rk-admin"}, "reward") == "boss"
    with pytest.raises(Forbidden, match="lacks the scope `admin`"):
        keyed.authorise({b"authorization": b"Bearer rk-agent"}, "admin")
    for bad in ({}, {b"authorization": b"Bearer rk-agenT"}, {b"authorization": b"Bearer "}, {b"authorization": b"rk"}):
        with pytest.raises(Unauthorized, match="a Ratchet key is needed"):
            keyed.authorise(bad, "agent")
    assert guard().authorise({}, "admin") is None


def made(ident: str, secret: bytes, *scopes: str) -> Grant:
    return Grant(ident, ident, sha256(secret).hexdigest(), frozenset(scopes))


def test_keys_that_are_made_and_revoked_count_from_the_snapshot_that_says_so() -> None:
    versions = Versions(Registry().fetch, Path("unused"))
    watched = Guard(Settings().server, versions)
    assert watched.authorise({}, "agent") is None
    assert not watched.keyed
    versions.current = Snapshot(1, keys=(made("key-1", b"one", "agent"),), keyed=True)
    assert watched.keyed
    assert watched.authorise({b"authorization": b"Bearer one"}, "agent") == "key-1"
    with pytest.raises(Unauthorized):
        watched.authorise({}, "agent")
    versions.current = Snapshot(2, keyed=True)
    with pytest.raises(Unauthorized):
        watched.authorise({b"authorization": b"Bearer one"}, "agent")


def test_on_loopback_admin_stays_open_until_a_key_may_do_it() -> None:
    versions = Versions(Registry().fetch, Path("unused"))
    versions.current = Snapshot(1, keys=(made("key-1", b"one", "agent"),), keyed=True)
    assert Guard(Settings().server, versions).authorise({}, "admin") is None
    outside = Settings.model_validate({"server": {"host": "0.0.0.0", "keys": KEYS[:1]}}).server
    with pytest.raises(Unauthorized):
        Guard(outside, versions).authorise({}, "admin")
    versions.current = Snapshot(2, keys=(made("key-2", b"two", "admin"),), keyed=True)
    boss = Guard(Settings().server, versions)
    with pytest.raises(Unauthorized):
        boss.authorise({}, "admin")
    assert boss.authorise({b"authorization": b"Bearer two"}, "admin") == "key-2"


def test_configured_keys_keep_working_beside_made_ones() -> None:
    versions = Versions(Registry().fetch, Path("unused"))
    versions.current = Snapshot(1, keys=(made("key-1", b"one", "agent"),), keyed=True)
    both = Guard(Settings.model_validate({"server": {"keys": KEYS}}).server, versions)
    assert both.authorise({b"authorization": b"Bearer one"}, "agent") == "key-1"
    assert both.authorise({b"authorization": b"Bearer rk-agent"}, "agent") == "bot"


@pytest.mark.parametrize("given", [{}, {b"authorization": b""}, {b"authorization": b"Bearer "}, {b"x-api-key": b" "}])
def test_no_key_is_never_a_key(given: dict[bytes, bytes]) -> None:
    of_nothing = {"name": "unset", "key_sha256": sha256(b"").hexdigest(), "scopes": ["admin"]}
    with pytest.raises(Unauthorized):
        guard(keys=[of_nothing]).authorise(given, "agent")


def test_only_good_headers_are_remembered() -> None:
    keyed = guard(keys=KEYS)
    for n in range(100):
        with pytest.raises(Unauthorized):
            keyed.authorise({b"authorization": b"Bearer %d" % n}, "agent")
    keyed.authorise({b"authorization": b"Bearer rk-agent"}, "agent")
    assert list(keyed._seen) == [b"Bearer rk-agent"]


def test_too_many_header_bytes_are_refused() -> None:
    limits.check_headers([(b"a", b"b" * 60_000)])
    with pytest.raises(HeadersTooLarge):
        limits.check_headers([(b"a", b"b" * 40_000), (b"c", b"d" * 40_000)])


def test_calls_over_the_cap_are_refused_until_one_ends() -> None:
    calls = Calls(most=1)
    with calls:
        with pytest.raises(Overloaded), calls:
            pass
        assert calls.running == 1
    with calls:
        assert calls.running == 1


def test_with_keys_a_ratchet_key_never_leaves_and_the_servers_own_goes(upstream: FakeUpstream, tmp_path: Path) -> None:
    environ = {"OPENAI_API_KEY": "sk-server"}
    with worker(tmp_path, upstream.url, environ=environ, server={"keys": KEYS}) as proxy:
        upstream.forget()
        refused = proxy.client.post(proxy.url + "/chat/completions", content=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        assert proxy.spans == upstream.requests == []
        given = {"authorization": "Bearer rk-agent", "x-api-key": "rk-agent"}
        assert proxy.client.post(proxy.url + "/chat/completions", content=BODY, headers=given).status_code == 200
        assert upstream.requests[0].headers["authorization"] == "Bearer sk-server"
        assert "rk-agent" not in json.dumps(upstream.requests[0].headers)
        span = json.dumps(proxy.span(count=1))
        assert "rk-agent" not in span
        assert "sk-server" not in span
        assert json.loads(proxy.span()["attributes"]) == {"key": "bot"}


def test_a_foreign_host_gets_nothing_at_all(upstream: FakeUpstream, tmp_path: Path) -> None:
    with worker(tmp_path, upstream.url) as proxy:
        for path in ("/v1/chat/completions", "/v1/models", "/healthz"):
            reply = proxy.client.post(proxy.root + path, content=BODY, headers={"host": "evil.example"})
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "host_not_allowed")
        assert proxy.spans == []


def routed(entry: dict[str, Any], service: str = "openai", **environ: str) -> Any:
    settings = Settings.model_validate({"model_list": [{"model_name": "m", "litellm_params": entry}]})
    return Upstream(settings, environ).route(service, "m")


def test_openai_compatible_entries_are_relayed_raw_with_their_own_key() -> None:
    target = routed({"model": "hosted_vllm/qwen", "api_base": "http://gpu:8000/v1/", "api_key": "k"})
    assert (target.base, target.model, target.params) == ("http://gpu:8000/v1", "qwen", None)
    assert target.headers == (("authorization", "Bearer k"),)
    target = routed({"model": "openai/gpt-5"}, OPENAI_API_KEY="sk-env")
    assert (target.base, target.headers) == ("https://api.openai.com/v1", (("authorization", "Bearer sk-env"),))
    assert routed({"model": "openai/a/b", "api_base": "http://x/v1"}).model == "a/b"


def test_other_providers_are_translated_except_for_their_own_dialect() -> None:
    entry = {"model": "anthropic/claude-x", "api_key": "sk-ant", "api_base": "http://claude"}
    assert routed(entry).params == entry
    raw = routed(entry, "anthropic")
    assert (raw.params, raw.base, raw.model) == (None, "http://claude/v1", "claude-x")
    assert raw.headers == (("x-api-key", "sk-ant"),)
    with pytest.raises(BadRequest, match="does not speak"):
        routed({"model": "openai/gpt-5"}, "anthropic")


def test_an_unknown_model_goes_to_the_default_with_the_clients_key() -> None:
    upstream = Upstream(Settings(), {"OPENAI_API_KEY": "sk-env"})
    target = upstream.route("openai", "anything")
    sent = headers_for(target, [(b"authorization", b"Bearer sk-mine")], keyed=False, unpacked=False)
    assert (target.base, target.provider) == ("https://api.openai.com/v1", "openai")
    assert dict(sent)[b"authorization"] == b"Bearer sk-mine"
    assert upstream.route("anthropic", None).provider == "anthropic"


def test_a_clients_key_does_not_go_to_an_entry_of_the_config(upstream: FakeUpstream, tmp_path: Path) -> None:
    entry = {"model_name": "local", "litellm_params": {"model": "hosted_vllm/qwen", "api_base": upstream.url}}
    with worker(tmp_path, "http://127.0.0.1:9/v1", model_list=[entry]) as proxy:
        upstream.forget()
        body = b'{"messages":[{"role":"user","content":"local"}], "model" : "local","seed":12345678901234567890123}'
        given = {"authorization": "Bearer sk-mine"}
        reply = proxy.client.post(proxy.url + "/chat/completions", content=body, headers=given)
        assert reply.json()["model"] == "qwen"
        assert upstream.requests[0].body == body.replace(b'"model" : "local"', b'"model" : "qwen"')
        assert "authorization" not in upstream.requests[0].headers
        span = proxy.span(count=1)
        assert (span["request_model"], span["provider"]) == ("local", "hosted_vllm")


def test_messages_paths_go_to_anthropic(upstream: FakeUpstream, tmp_path: Path) -> None:
    with worker(tmp_path, "http://127.0.0.1:9/v1", upstream={"anthropic": upstream.url}) as proxy:
        upstream.forget()
        upstream.reply(json_reply({"type": "message", "id": "msg_1", "content": [{"type": "text", "text": "Hi"}]}))
        given = {"x-api-key": "sk-ant", "anthropic-version": "2023-06-01"}
        proxy.client.post(proxy.url + "/messages", content=b'{"model":"c","messages":[]}', headers=given)
        upstream.reply(json_reply({"input_tokens": 3}))
        proxy.client.post(proxy.url + "/messages/count_tokens", content=b'{"model":"c","messages":[]}', headers=given)
        assert [r.path for r in upstream.requests] == ["/v1/messages", "/v1/messages/count_tokens"]
        assert upstream.requests[0].headers["x-api-key"] == "sk-ant"
        assert [span["operation"] for span in proxy.spans] == ["messages", "other"]

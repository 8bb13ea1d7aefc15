"""A beginning that was seen before is served as the same body is by the functions that any call goes through."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import metrics
from proxy.dialects import KNOWN
from proxy.identity import NO_TRACE, Identity
from proxy.openings import Openings, opened
from proxy.paths import parse as route_of
from proxy.prepare import Body, Prompts
from proxy.record import Call
from proxy.table import Table
from proxy.versions import Snapshot, Versions, build

CHAT = KNOWN["chat/completions"]
TEXT, NEW = "Be brief, {friend}.", "Be “very” brief."
FIRST = {"role": "system", "content": "Be brief."}


def snapshot(*texts: str, live: dict[str, float] | None = None, match: dict[str, str] | None = None) -> Snapshot:
    versions = [{"version": at, "template": text, "hash": f"{at:012x}"} for at, text in enumerate(texts, 1)]
    log = [{"revision": 1, "slot": "s", "action": "promote", "arms": live or {str(len(texts)): 1.0}, "ts_ns": 1}]
    return build(
        {"revision": 1, "slots": {"s": {"kind": "prompt", "match": match or {}, "versions": versions}}, "log": log}
    )


class Served:
    """What becomes of bodies under one state of deployments."""

    def __init__(self, folder: Path, now: Snapshot, dialect: str = "chat/completions") -> None:
        self.dialect = KNOWN[dialect]
        self.table = Table(folder / "t", slots=64)
        self.versions = Versions(None, folder / "d", None)  # type: ignore[arg-type]  # nothing is fetched
        self.versions.current = now
        self.prompts = Prompts(self.versions, self.table)
        self.openings = Openings()

    def call(self, raw: bytes, short: bool) -> tuple[Any, Any, list[str]]:
        """The body as it goes upstream, the same for the record, and the versions served."""
        body = Body(raw)
        parsed = body.parsed
        assert parsed is not None
        opening = self.openings.find(raw, parsed.get("model")) if short else None
        reading = (opening and opening.read(parsed)) or self.dialect.read(parsed)
        whole = self.dialect.read(orjson.loads(raw))
        assert (reading.model, reading.stream, reading.prompts, reading.turns) == (
            whole.model,
            whole.stream,
            whole.prompts,
            whole.turns,
        )
        call = Call(route_of("POST", "/v1/chat/completions"), self.dialect, NO_TRACE, None, "")
        call.identity, call.body, call.reading = Identity("ep-1", "url"), parsed, reading
        assert self.prompts.at_once(call, body, opening)
        if short and opening is None:
            self.openings.learn(raw, whole, self.dialect, self.versions.current)
        return json.loads(body.raw), call.body, [one.label for one in call.applied]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = Served(tmp_path_factory.mktemp("served"), snapshot("Be brief.", NEW))
    yield made
    made.table.close()


texts = st.sampled_from(["", "Hi", "Be brief.", NEW, 'a "messages" b', "\\u0041", "é\n\u2028", "}]"])
messages = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts}),
    st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(st.just({"type": "text", "text": "Hi"}))}),
    st.fixed_dictionaries({"content": st.none(), "role": st.just("assistant"), "name": texts}),
    st.sampled_from([{}, {"role": ["user"], "content": 1}, {"role": "user"}]),
)
others = st.dictionaries(
    st.sampled_from(["temperature", "stop", "tools", "stream", "n"]),
    st.sampled_from([0.5, ["x"], [{"a": {}}], True, None, {"messages": []}]),
    max_size=3,
)
dumps = st.sampled_from([json.dumps, lambda body: json.dumps(body, indent=1), lambda body: orjson.dumps(body).decode()])


@settings(max_examples=300, deadline=None)
@given(st.lists(messages, max_size=3), others, others, dumps, st.sampled_from(["m", "other", None]))
def test_a_known_beginning_is_served_as_any_body_is(
    served: Served, rest: list[Any], before: Any, after: Any, dump: Any, model: str | None
) -> None:
    body = {**before, "messages": [FIRST, *rest], **{name: after[name] for name in after if name not in before}}
    raw = dump({**body, **({"model": model} if model else {})}).encode()
    seen = [served.call(raw, short=True) for _ in range(3)]
    assert seen == [served.call(raw, short=False)] * 3


def test_a_beginning_is_known_from_its_second_time_on(served: Served) -> None:
    raw = json.dumps({"model": "x", "messages": [FIRST, {"role": "user", "content": "Hi"}]}).encode()
    served.openings = Openings()
    found = []
    for _ in range(3):
        found.append(served.openings.find(raw, "x") is not None)
        served.call(raw, short=True)
    assert found == [False, False, True]
    assert served.openings.find(raw.replace(b"Hi", b"Hello"), "x") is not None
    assert served.openings.find(raw, "y") is None


@pytest.mark.parametrize("name", [b"messages", b"mess\\u0061ges"])
def test_a_body_that_names_its_messages_twice_goes_the_usual_way(served: Served, name: bytes) -> None:
    once = orjson.dumps({"model": "m", "messages": [FIRST]})
    for _ in range(2):
        served.call(once, short=True)
    twice = once[:-1] + b',"%b":[{"role":"system","content":"Be brief."}]}' % name
    assert served.openings.find(once, "m") is not None
    assert served.call(twice, short=True) == served.call(twice, short=False)


@pytest.mark.parametrize(
    "now",
    [
        snapshot("Be brief.", NEW, live={"1": 0.5, "2": 0.5}),  # an episode's share decides
        snapshot("Be brief.", TEXT),  # a variable that nobody gives
        snapshot("Be brief.", "Be brief, {friend}."),
    ],
)
def test_what_depends_on_more_than_these_bytes_is_not_kept(now: Snapshot) -> None:
    raw = orjson.dumps({"model": "m", "messages": [FIRST]})
    assert opened(raw, CHAT.read(orjson.loads(raw)).prompts[0], "m", now) is None


def test_a_slot_of_another_model_does_not_match(tmp_path: Path) -> None:
    strict = Served(tmp_path, snapshot("Be brief.", NEW, match={"model": "m"}))
    for model, versions in (("m", ["s@2"]), ("other", []), ("m", ["s@2"])):
        raw = orjson.dumps({"messages": [FIRST], "model": model})
        assert [strict.call(raw, short=True)[2] for _ in range(3)] == [versions] * 3
    strict.table.close()


X = b'{"role":"system","content":"Be brief."}'


@pytest.mark.parametrize(
    "odd",
    [
        b'{"messages":[0],"tools":[],"messages":[{"role":"system","content":"Be \\u0062rief.","name":"Be brief."}]}',
        b'{"messages":[{"role":"system","content":"A"}],"tools":[{"name":"Be brief."}],"messages":[%b]}' % X,
        b'{"messages":[{"role":"user","content":null}],"tools":[{"name":"Be brief."}],"messages":[%b]}' % X,
        b'{"messages":[5],"tools":[{"name":"Be brief."}],"messages":[%b]}' % X,
    ],
)
def test_nothing_is_learned_of_a_body_that_names_members_twice(served: Served, odd: bytes) -> None:
    served.openings = Openings()
    for _ in range(3):
        assert served.call(odd, short=True) == served.call(odd, short=False)
    assert served.openings.known == []


def test_what_keeps_a_body_from_fitting_is_not_learned_again_and_again(served: Served) -> None:
    served.openings = Openings()
    raw = orjson.dumps({"model": "m", "messages": [FIRST], "tools": [{"messages": "a property"}]})
    for _ in range(5):
        served.call(raw, short=True)
    assert len(served.openings.known) == 1


def test_a_prompt_that_stands_elsewhere_is_found_beside_a_known_beginning(tmp_path: Path) -> None:
    anthropic = Served(tmp_path, snapshot("Be brief.", NEW), dialect="messages")
    plain = b'{"messages":[{"role":"user","content":"Hi"}],"model":"m"}'
    for _ in range(3):
        anthropic.call(plain, short=True)
    assert anthropic.openings.find(plain, "m") is not None
    body, _, versions = anthropic.call(plain[:-1] + b',"system":"Be brief."}', short=True)
    assert (body["system"], versions) == (NEW, ["s@2"])
    anthropic.table.close()


def test_a_prompt_that_stays_as_it_is_is_not_counted_as_replaced(tmp_path: Path) -> None:
    same = Served(tmp_path, snapshot("Be brief."))
    raw = orjson.dumps({"model": "m", "messages": [FIRST]})
    before = metrics.INJECTED.value
    assert [same.call(raw, short=True)[2] for _ in range(4)] == [["s@1"]] * 4
    assert metrics.INJECTED.value == before
    same.table.close()

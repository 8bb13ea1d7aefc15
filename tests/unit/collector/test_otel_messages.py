import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from collector import openinference, otel, otel_in
from collector.otel_messages import nested, of_parts, to_parts
from tests.unit.collector.rows import call
from tests.unit.collector.test_otel_in import span

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "42", "tool_call_id": "c"},
    {"role": "assistant", "content": "done", "finish_reason": "stop"},
]


def test_openais_messages_are_messages_of_parts_and_come_back() -> None:
    made = [to_parts(message) for message in TALK]
    assert made[2]["parts"] == [{"type": "tool_call", "id": "c", "name": "f", "arguments": {"a": 1}}]
    assert made[3] == {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": "42"}]}
    assert of_parts(json.dumps(made)) == TALK
    assert otel.messages(json.dumps(TALK)) == json.dumps(made, separators=(",", ":"))


def test_what_would_not_come_back_is_exported_as_it_is() -> None:
    for odd in ('[{"role":"user","content":"x","refusal":null}]', '["bare"]', "no json", '{"role":"user"}'):
        assert otel.messages(odd) == odd


texts = st.text(max_size=8)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": st.none() | texts | st.lists(texts)},
    optional={"tool_calls": st.just([CALL]), "extra": texts, "name": texts},
)


@given(st.lists(messages, max_size=4))
def test_an_exported_conversation_reads_as_it_was(talk: list[dict[str, Any]]) -> None:
    assert of_parts(otel.messages(json.dumps(talk))) == (talk or [])


def test_openinferences_names_are_read_as_they_are_written() -> None:
    row = call(1, response_model="m-1", input_messages=json.dumps(TALK[:4]), output_messages=json.dumps(TALK[4:]))
    found = openinference.attributes({name: getattr(row, name) for name in row.__slots__})
    assert (found["openinference.span.kind"], found["llm.model_name"], found["output.value"]) == ("LLM", "m-1", "done")
    back = otel_in.row(span(found))
    assert json.loads(back.input_messages or "") == TALK[:4]
    assert json.loads(back.output_messages or "") == [{"role": "assistant", "content": "done"}]


def test_flattened_names_are_trees_whatever_they_say() -> None:
    assert nested({"a.0.b": 1, "a.1.b": 2, "c.0": 3}, "a") == [{"b": 1}, {"b": 2}]
    assert nested({"a.10": "k", "a.9": "j"}, "a") == ["j", "k"]
    assert nested({"a.b": 1, "a.b.c": 2}, "a") == {"b": 1, "b.": {"c": 2}}
    assert nested({"b.0": 1}, "a") is None
    assert nested({"a" + ".x" * 5000: 1}, "a") is not None


@given(st.dictionaries(st.text("ab01.", max_size=8).map("p.".__add__), st.integers(), max_size=6))
def test_no_set_of_flattened_names_breaks_the_reader(names: dict[str, int]) -> None:
    assert nested(names, "p") is not None or not names

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.dialects import KNOWN, OTHER
from proxy.dialects.base import Summary
from proxy.sse import events
from tests.fake_upstream import data

CHAT = KNOWN["chat/completions"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ("choices", "delta", "message", "messages", "content", "role", "usage", "index", "tool_calls", "function",
             "error", "type", "response", "item", "output", "input", "system", "text", "model", "id", "logprobs",
             "token_ids", "prompt", "finish_reason", "arguments")
        ),
        inner,
        max_size=5,
    ),
    max_leaves=20,
)  # fmt: skip


def streamed(tail: str, *chunks: Any) -> Summary:
    parser = KNOWN[tail].parser()
    for event in events(b"".join(data(chunk) for chunk in chunks)):
        parser.feed(event)
    return parser.summary()


def choice(index: int, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"id": "c", "model": "m", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def test_parallel_tool_calls_split_over_chunks_are_put_together() -> None:
    def part(index: int, **call: Any) -> dict[str, Any]:
        return choice(0, tool_calls=[{"index": index, **call}])

    summary = streamed(
        "chat/completions",
        choice(0, role="assistant", content=None),
        part(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        part(0, function={"arguments": '{"x"'}),
        part(1, id="b", type="function", function={"name": "g", "arguments": "{"}),
        part(0, function={"arguments": ":1}"}),
        part(1, function={"arguments": "}"}),
        choice(0, "tool_calls"),
    )
    assert summary.finish_reason == "tool_calls"
    assert summary.output_messages == [
        {
            "role": "assistant",
            "tool_calls": [
                {"function": {"name": "f", "arguments": '{"x":1}'}, "id": "a", "type": "function"},
                {"function": {"name": "g", "arguments": "{}"}, "id": "b", "type": "function"},
            ],
            "finish_reason": "tool_calls",
        }
    ]


def test_choices_that_interleave_are_kept_apart() -> None:
    parts = [choice(1, content="b"), choice(0, content="a"), choice(1, "length", content="B"), choice(0, "stop")]
    summary = streamed("chat/completions", *parts)
    assert summary.output_messages is not None
    assert [(m["content"], m["finish_reason"]) for m in summary.output_messages] == [("a", "stop"), ("bB", "length")]


def test_token_ids_and_logprobs_of_a_stream_are_joined() -> None:
    first = {**choice(0, content="a"), "prompt_token_ids": [1, 2]}
    first["choices"][0].update(token_ids=[3], logprobs={"content": [{"token": "a", "logprob": -0.1}]})
    second = choice(0, "stop", content="b")
    second["choices"][0].update(token_ids=[4, 5], logprobs={"content": [{"token": "b", "logprob": -0.2}]})
    summary = streamed("chat/completions", first, second)
    assert summary.token_ids == {"prompt": [1, 2], "completion": [[3, 4, 5]]}
    assert [one["token"] for one in summary.logprobs[0]["content"]] == ["a", "b"]


def test_token_ids_of_a_json_answer_are_kept() -> None:
    body = {"prompt_token_ids": [1], "choices": [{"message": {"content": "x"}, "token_ids": [2]}, {"message": {}}]}
    assert CHAT.summarise(body).token_ids == {"prompt": [1], "completion": [[2], None]}
    assert CHAT.summarise({"choices": [{"message": {"content": "x"}}]}).token_ids is None


def test_reasoning_and_refusals_of_a_stream_are_texts_of_their_own() -> None:
    summary = streamed(
        "chat/completions", choice(0, reasoning_content="hm"), choice(0, reasoning_content="m", refusal="no")
    )
    assert summary.output_messages is not None
    assert (summary.output_messages[0]["reasoning_content"], summary.output_messages[0]["refusal"]) == ("hmm", "no")


def test_a_stream_sums_up_as_the_same_answer_in_json() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    message = {"role": "assistant", "content": "ab"}
    whole = {"id": "c", "model": "m", "usage": usage, "choices": [{"message": message, "finish_reason": "stop"}]}
    parts = [choice(0, role="assistant", content="a"), choice(0, "stop", content="b"), {"choices": [], "usage": usage}]
    assert streamed("chat/completions", *parts) == CHAT.summarise(whole)
    assert CHAT.summarise(whole).cached_tokens == 3


deltas = st.sampled_from(
    (
        {"content": "a"},
        {"content": "b"},
        {"content": None},
        {"content": 1},
        {"role": "assistant", "content": "c"},
        {"refusal": "d"},
        {},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
    )
)
extras = st.sampled_from(
    (
        {},
        {},
        {"finish_reason": "stop"},
        {"token_ids": [1]},
        {"logprobs": {"content": [1]}},
        {"index": 1},
        {"index": None},
    )
)
heads = st.sampled_from(
    (
        {"id": "c", "model": "m"},
        {"id": "c", "model": "m"},
        {"id": "c", "model": "n"},
        {"id": "d"},
        {"id": "c", "model": "m", "usage": {"prompt_tokens": 1}},
        {"id": "c", "model": "m", "usage": None},
        {"id": "c", "model": "m", "error": {"type": "e"}},
        {"id": "c", "model": "m", "prompt_token_ids": [7]},
    )
)


@settings(deadline=None)
@given(st.lists(st.tuples(heads, deltas, extras), max_size=8))
def test_chunks_of_nothing_but_text_may_be_read_in_short(parts: list[Any]) -> None:
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, **extra}]} for head, delta, extra in parts]
    short = streamed("chat/completions", *chunks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proxy.dialects.chat._only_text", lambda chunk: None)
        assert streamed("chat/completions", *chunks) == short


def test_completions_are_read_in_json_and_in_a_stream() -> None:
    dialect = KNOWN["completions"]
    body = {"model": "m", "prompt": "Once", "stream": True}
    assert [(p.role, p.text) for p in dialect.read(body).prompts] == [("user", "Once")]
    assert dialect.messages(body) == [{"role": "user", "content": "Once"}]
    assert dialect.messages({"prompt": [1, 2]}) == [{"role": "user", "content": [1, 2]}]
    assert len(dialect.messages({"prompt": ["a", "b"]})) == 2
    parts = [
        {"id": "c", "choices": [{"index": 0, "text": t, "finish_reason": f}]} for t, f in (("a", None), ("b", "stop"))
    ]
    assert streamed("completions", *parts).output_messages == [
        {"role": "assistant", "content": "ab", "finish_reason": "stop"}
    ]
    logprobs = {"tokens": ["x"], "token_logprobs": [-1.0]}
    reply = {"choices": [{"text": "x", "logprobs": logprobs, "token_ids": [9], "prompt_token_ids": [8]}]}
    summary = dialect.summarise(reply)
    assert summary.logprobs == [logprobs]
    assert summary.token_ids == {"prompt": [8], "completion": [[9]]}


def test_embeddings_record_texts_and_usage_but_no_vectors() -> None:
    dialect = KNOWN["embeddings"]
    assert dialect.messages({"input": ["a", "b"]}) == [{"role": "user", "content": t} for t in "ab"]
    summary = dialect.summarise({"model": "e", "data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 4}})
    assert (summary.response_model, summary.input_tokens, summary.output_messages) == ("e", 4, None)


def test_responses_calls_and_instructions_are_recorded_as_messages() -> None:
    dialect = KNOWN["responses"]
    body = {"instructions": "Help.", "input": "Hi"}
    assert dialect.messages(body) == [{"role": "system", "content": "Help."}, {"role": "user", "content": "Hi"}]
    assert [p.path for p in dialect.read(body).prompts] == [("instructions",), ("input",)]
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    summary = dialect.summarise({"id": "r", "status": "completed", "output": [call]})
    assert summary.output_messages is not None
    assert summary.output_messages[0]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    cut = {"id": "r", "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}, "output": []}
    assert dialect.summarise(cut).finish_reason == "max_output_tokens"


def test_a_responses_stream_that_is_cut_keeps_its_text() -> None:
    parts = [
        {"type": "response.created", "response": {"id": "r"}},
        {"type": "response.output_text.delta", "delta": "Hi"},
    ]
    summary = streamed("responses", *parts)
    assert summary.response_id == "r"
    assert summary.output_messages is not None
    assert summary.output_messages[0]["content"] == "Hi"


def test_anthropic_blocks_and_cached_tokens_are_read() -> None:
    summary = streamed(
        "messages",
        {
            "type": "message_start",
            "message": {"id": "msg", "usage": {"input_tokens": 3, "cache_read_input_tokens": 10}},
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {
            "type": "content_block_start",
            "index": 1,
            "content_block": {"type": "tool_use", "id": "t", "name": "f", "input": {}},
        },
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": '{"a"'}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": ":1}"}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 5}},
    )
    assert (summary.input_tokens, summary.cached_tokens, summary.output_tokens) == (13, 10, 5)
    assert summary.finish_reason == "tool_use"
    assert summary.output_messages is not None
    assert summary.output_messages[0]["content"] == [
        {"type": "text", "text": "Hi"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
    ]


@pytest.mark.parametrize("tail", [*KNOWN, "other"])
@given(json_values)
def test_bodies_of_any_shape_are_read_without_an_error(tail: str, value: Any) -> None:
    dialect = KNOWN.get(tail, OTHER)
    parser = dialect.parser()
    for event in events(data(value) + b"data: {\n\n"):
        parser.feed(event)
        dialect.ends(event)
    json.dumps(parser.summary().output_messages)
    if isinstance(value, dict):
        assert all(isinstance(prompt.text, str) for prompt in dialect.read(value).prompts)
        dialect.messages(value)
        dialect.summarise(value)

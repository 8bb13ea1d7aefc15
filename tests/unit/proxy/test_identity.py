from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.dialects import KNOWN
from proxy.dialects.base import Reading
from proxy.errors import BadRequest
from proxy.identity import Identity, Trace, give_back, identify, read_traceparent, remember, trace_of
from proxy.table import Table

TRACE = Trace("ab" * 16, "cd" * 8)
USER = {"role": "user", "content": "weather in Paris?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris","days":1}'}}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    with Table(tmp_path / "t") as table:
        yield table


def call(table: Table, body: dict[str, Any], dialect: str = "chat/completions", tenant: str = "") -> Identity:
    reading = KNOWN[dialect].read(body)
    return identify(None, None, Trace(), body, reading, table, tenant)


def answer(
    table: Table, body: dict[str, Any], reply: dict[str, Any], dialect: str = "chat/completions", tenant: str = ""
) -> Identity:
    """A call and its answer."""
    identity = call(table, body, dialect, tenant)
    summary = KNOWN[dialect].summarise(reply)
    remember(table, tenant, identity, KNOWN[dialect].read(body), summary, dialect == "responses")
    return identity


def said(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}} for message in messages]}


def test_url_goes_before_header_before_trace_before_metadata(table: Table) -> None:
    body = {"metadata": {"episode_id": "from-body"}}
    rows = [
        (("u", "h", TRACE), ("u", "url")),
        ((None, "h", TRACE), ("h", "header")),
        ((None, None, TRACE), ("ab" * 16, "traceparent")),
        ((None, None, Trace()), ("from-body", "metadata")),
    ]
    for (url, header, trace), expected in rows:
        found = identify(url, header, trace, body, Reading(), table, "")
        assert (found.episode_id, found.source) == expected


def test_metadata_goes_before_a_previous_response_and_that_before_the_chain(table: Table) -> None:
    first = answer(table, {"input": "hi"}, {"id": "resp_1", "output": []}, "responses")
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chained = answer(table, {"input": history[:1]}, {"output": [{"type": "message", **history[1]}]}, "responses")
    body = {"previous_response_id": "resp_1", "input": history, "metadata": {"episode_id": "x"}}
    assert call(table, body, "responses").source == "metadata"
    del body["metadata"]
    assert call(table, body, "responses") == Identity(first.episode_id, "response")
    del body["previous_response_id"]
    assert call(table, body, "responses").episode_id == chained.episode_id


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "ä", "../x", 7, {}])
def test_an_episode_id_that_can_not_be_one_is_refused_by_name(table: Table, bad: Any) -> None:
    with pytest.raises(BadRequest, match=r"metadata\.episode_id") as caught:
        identify(None, None, Trace(), {"metadata": {"episode_id": bad}}, Reading(), table, "")
    assert caught.value.status == 400
    assert caught.value.param == "metadata.episode_id"


def test_a_tool_using_conversation_is_one_episode_without_any_header(table: Table) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You help."}, USER]
    reply = {"content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]}
    first = answer(table, {"messages": messages}, said(reply))
    assert first.source == "new"
    # The client sends it back in its own words: no nulls, arguments dumped again, the content as an empty string.
    function = {"name": "weather", "arguments": '{"days": 1, "city": "Paris"}'}
    sent_back = {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": function}]}
    messages = [*messages, sent_back, {"role": "tool", "tool_call_id": "call_1", "content": "20 degrees"}]
    second = answer(table, {"messages": messages}, said({"content": " It is warm.\n"}))
    assert (second.episode_id, second.source) == (first.episode_id, "chain")
    messages = [*messages, {"role": "assistant", "content": "It is warm."}, {"role": "user", "content": "And Rome?"}]
    third = answer(table, {"messages": messages}, said({"content": "Warmer."}))
    assert (third.episode_id, third.source) == (first.episode_id, "chain")


def test_a_conversation_of_response_items_is_one_episode(table: Table) -> None:
    items: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "input_text", "text": "weather?"}]}]
    called = {
        "type": "function_call",
        "call_id": "c1",
        "name": "weather",
        "arguments": "{}",
        "id": "fc_1",
        "status": "x",
    }
    output = [{"type": "reasoning", "id": "rs_1", "summary": []}, called]
    body = {"instructions": "You help.", "input": items}
    first = answer(table, body, {"id": "resp_1", "output": output}, "responses")
    items = [*items, {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}"}]
    items = [*items, {"type": "function_call_output", "call_id": "c1", "output": "20"}]
    second = answer(table, {"instructions": "You help.", "input": items}, {"id": "resp_2", "output": []}, "responses")
    assert (second.episode_id, second.source) == (first.episode_id, "chain")


def test_a_conversation_of_anthropic_blocks_is_one_episode(table: Table) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"b": 1, "a": 2}}
    body: dict[str, Any] = {"system": "You help.", "messages": [USER]}
    reply = {"id": "msg_1", "content": [{"type": "thinking", "thinking": "..."}, {"type": "text", "text": "Ok."}, use]}
    first = answer(table, body, reply, "messages")
    back = {"role": "assistant", "content": [{"type": "text", "text": "Ok."}, {**use, "input": {"a": 2, "b": 1}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "20"}]}
    second = call(table, {"system": "You help.", "messages": [USER, back, result]}, "messages")
    assert (second.episode_id, second.source) == (first.episode_id, "chain")


def test_each_call_is_continued_once_and_a_second_continuation_is_ambiguous(table: Table) -> None:
    first = answer(table, {"messages": [USER]}, said({"content": "Mild."}))
    longer = {"messages": [USER, {"role": "assistant", "content": "Mild."}, {"role": "user", "content": "Sure?"}]}
    assert call(table, longer).episode_id == first.episode_id
    again = call(table, longer)
    assert again.episode_id != first.episode_id
    assert (again.source, again.ambiguous) == ("new", True)


def test_equal_conversations_of_two_episodes_are_continued_by_one_each(table: Table) -> None:
    one, two = (answer(table, {"messages": [USER]}, said({"content": "Mild."})) for _ in range(2))
    longer = {"messages": [USER, {"role": "assistant", "content": "Mild."}, {"role": "user", "content": "Sure?"}]}
    continued = [call(table, longer) for _ in range(2)]
    assert [found.episode_id for found in continued] == [one.episode_id, two.episode_id]
    assert all(found.ambiguous for found in continued)


def test_any_of_several_choices_can_be_continued(table: Table) -> None:
    first = answer(table, {"messages": [USER]}, said({"content": "a"}, {"content": "b"}))
    assert call(table, {"messages": [USER, {"role": "assistant", "content": "b"}]}).episode_id == first.episode_id


def test_a_failed_continuation_can_be_tried_again(table: Table) -> None:
    first = answer(table, {"messages": [USER]}, said({"content": "Mild."}))
    longer = {"messages": [USER, {"role": "assistant", "content": "Mild."}, {"role": "user", "content": "Sure?"}]}
    give_back(table, call(table, longer))
    again = call(table, longer)
    assert (again.episode_id, again.ambiguous) == (first.episode_id, False)


def test_the_conversations_of_different_keys_stay_apart(table: Table) -> None:
    first = answer(table, {"messages": [USER]}, said({"content": "Mild."}), tenant="one")
    longer = {"messages": [USER, {"role": "assistant", "content": "Mild."}, {"role": "user", "content": "Sure?"}]}
    assert call(table, longer, tenant="two").source == "new"
    assert call(table, longer, tenant="one").episode_id == first.episode_id


@pytest.mark.parametrize("given", ["conv_1", {"id": "conv_1"}])
def test_a_conversation_id_is_one_episode_from_its_first_call(table: Table, given: Any) -> None:
    first = call(table, {"input": "a", "conversation": given}, "responses")
    assert call(table, {"input": "b", "conversation": "conv_1"}, "responses").episode_id == first.episode_id


@pytest.mark.parametrize(
    "value",
    [
        None,
        "",
        "junk",
        "00-" + "0" * 32 + "-" + "1" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
        "ff-" + "1" * 32 + "-" + "1" * 16 + "-01",
    ],
)
def test_an_invalid_traceparent_counts_as_absent(value: str | None) -> None:
    assert read_traceparent(value) == Trace()


def test_a_traceparent_gives_trace_and_parent() -> None:
    assert read_traceparent("00-" + "ab" * 16 + "-" + "cd" * 8 + "-01") == TRACE


def test_the_trace_of_an_episode_is_always_the_same() -> None:
    assert trace_of("a") == trace_of("a") != trace_of("b")
    assert len(trace_of("a")) == 32


@pytest.mark.parametrize("messages", [None, "text", [7, None, {}], [{"role": 3, "content": 4, "tool_calls": "x"}]])
def test_messages_of_any_shape_are_survived(table: Table, messages: Any) -> None:
    for dialect in ("chat/completions", "messages"):
        assert call(table, {"messages": messages, "system": messages}, dialect).source == "new"
    assert call(table, {"input": messages, "instructions": messages}, "responses").source == "new"


def test_a_conversation_that_goes_on_from_an_answer_begun_by_the_agent_is_one_episode(table: Table) -> None:
    begun = {"role": "assistant", "content": "It is"}
    first = answer(table, {"messages": [USER, begun]}, said({"content": "mild."}))
    rest = [{"role": "assistant", "content": "mild."}, {"role": "user", "content": "Sure?"}]
    second = call(table, {"messages": [USER, begun, *rest]})
    assert (second.episode_id, second.source) == (first.episode_id, "chain")


def test_a_loop_without_the_users_word_in_between_is_one_episode(table: Table) -> None:
    messages: list[Any] = [USER]
    found = []
    for step in ("one", "two", "three", "four"):
        found.append(answer(table, {"messages": messages}, said({"content": step})))
        messages = [*messages, {"role": "assistant", "content": step}]
    assert len({one.episode_id for one in found}) == 1

import json
from dataclasses import asdict
from typing import Any

import pytest

from collector import otel, otel_in, otlp
from collector.errors import BadInput
from collector.journal import encode
from tests.unit.collector.rows import call

TRACE, SPAN = "5b8efff798038103d269b633813fc60c", "eee19b7ec3c1b174"


def span(attributes: dict[str, Any] | None = None, **fields: Any) -> otlp.Span:
    given: dict[str, Any] = {
        "trace_id": TRACE,
        "span_id": SPAN,
        "parent_span_id": None,
        "name": "a span",
        "start_ns": 10,
        "end_ns": 20,
        "attributes": attributes or {},
        "events": [],
        "failed": False,
        "message": "",
        "resource": {"service.name": "agent"},
        "scope": "lib",
    }
    return otlp.Span(**{**given, **fields})


def test_the_conventions_of_opentelemetry_fill_the_columns() -> None:
    made = otel_in.row(
        span(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "openai",
                "gen_ai.request.model": "gpt",
                "gen_ai.response.model": "gpt-1",
                "gen_ai.response.id": "resp-1",
                "gen_ai.request.temperature": 1,
                "gen_ai.request.max_tokens": 9,
                "gen_ai.usage.input_tokens": 7,
                "gen_ai.usage.output_tokens": 3,
                "gen_ai.response.finish_reasons": ["tool_call"],
                "gen_ai.response.time_to_first_chunk": 0.25,
                "gen_ai.system_instructions": '[{"type": "text", "content": "be brief"}]',
                "gen_ai.input.messages": json.dumps(
                    [
                        {"role": "user", "parts": [{"type": "text", "content": "hi"}]},
                        {
                            "role": "assistant",
                            "parts": [{"type": "tool_call", "id": "c", "name": "f", "arguments": {"a": 1}}],
                        },
                        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c", "response": "42"}]},
                    ]
                ),
                "gen_ai.output.messages": json.dumps(
                    [{"role": "assistant", "parts": [{"type": "text", "content": "ok"}], "finish_reason": "stop"}]
                ),
                "custom": "kept",
            }
        )
    )
    assert (made.operation, made.provider, made.request_model, made.response_model) == (
        "chat",
        "openai",
        "gpt",
        "gpt-1",
    )
    assert (made.response_id, made.temperature, made.max_tokens, made.ttft_ms) == ("resp-1", 1.0, 9, 250.0)
    assert (made.input_tokens, made.output_tokens, made.finish_reason) == (7, 3, "tool_calls")
    assert (made.episode_id, made.episode_source, made.source, made.status) == (TRACE, "trace", "otlp", "ok")
    function = {"name": "f", "arguments": '{"a":1}'}
    assert json.loads(made.input_messages or "") == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": function}]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    assert json.loads(made.output_messages or "") == [{"role": "assistant", "content": "ok", "finish_reason": "stop"}]
    assert json.loads(made.attributes or "")["otel"]["custom"] == "kept"
    assert encode("otlp", made)


def test_openinference_names_fill_them_too() -> None:
    made = otel_in.row(
        span(
            {
                "openinference.span.kind": "LLM",
                "llm.system": "openai",
                "llm.model_name": "gpt-1",
                "llm.invocation_parameters": '{"model": "gpt", "temperature": 0.5, "max_tokens": 9}',
                "output.value": '{"id": "resp-1"}',
                "llm.token_count.prompt": 7,
                "llm.token_count.completion": 3,
                "llm.token_count.prompt_details.cache_read": 2,
                "llm.cost.total": 0.25,
                "llm.finish_reason": "stop",
                "llm.input_messages.0.message.role": "user",
                "llm.input_messages.0.message.contents.0.message_content.type": "text",
                "llm.input_messages.0.message.contents.0.message_content.text": "hi",
                "llm.input_messages.10.message.role": "user",
                "llm.input_messages.10.message.content": "last",
                "llm.input_messages.9.message.role": "assistant",
                "llm.input_messages.9.message.tool_calls.0.tool_call.id": "c",
                "llm.input_messages.9.message.tool_calls.0.tool_call.function.name": "f",
                "llm.output_messages.0.message.role": "assistant",
                "llm.output_messages.0.message.content": "ok",
                "llm.tools.0.tool.json_schema": '{"type": "function"}',
            }
        )
    )
    assert (made.operation, made.provider, made.request_model, made.response_model) == (
        "chat",
        "openai",
        "gpt",
        "gpt-1",
    )
    assert (made.response_id, made.temperature, made.max_tokens, made.cost_usd) == ("resp-1", 0.5, 9, 0.25)
    assert (made.input_tokens, made.output_tokens, made.cached_tokens) == (7, 3, 2)
    messages = json.loads(made.input_messages or "")
    assert [one["role"] for one in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == [{"type": "text", "text": "hi"}]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "f"
    assert json.loads(made.output_messages or "") == [{"role": "assistant", "content": "ok"}]
    assert json.loads(made.tools or "") == [{"type": "function"}]


def test_openllmetrys_flattened_names_fill_them_too() -> None:
    made = otel_in.row(
        span(
            {
                "llm.request.type": "chat",
                "gen_ai.system": "openai",
                "gen_ai.usage.prompt_tokens": 7,
                "gen_ai.usage.completion_tokens": 3,
                "gen_ai.is_streaming": True,
                "gen_ai.prompt.0.role": "user",
                "gen_ai.prompt.0.content": "hi",
                "gen_ai.completion.0.role": "assistant",
                "gen_ai.completion.0.content": "ok",
                "gen_ai.completion.0.finish_reason": "stop",
                "gen_ai.completion.0.tool_calls.0.id": "c",
                "gen_ai.completion.0.tool_calls.0.name": "f",
                "gen_ai.completion.0.tool_calls.0.arguments": "{}",
            }
        )
    )
    assert (made.operation, made.input_tokens, made.output_tokens, made.stream) == ("chat", 7, 3, True)
    assert json.loads(made.input_messages or "") == [{"role": "user", "content": "hi"}]
    (answer,) = json.loads(made.output_messages or "")
    assert (answer["content"], answer["finish_reason"], answer["tool_calls"][0]["id"]) == ("ok", "stop", "c")


@pytest.mark.parametrize(
    ("attributes", "operation"),
    [
        ({"gen_ai.operation.name": "invoke_agent"}, "invoke_agent"),
        ({"openinference.span.kind": "TOOL"}, "execute_tool"),
        ({"openinference.span.kind": "AGENT"}, "invoke_agent"),
        ({"traceloop.span.kind": "tool"}, "execute_tool"),
        ({"openinference.span.kind": "EMBEDDING"}, "embeddings"),
        ({"http.method": "GET"}, "span"),
    ],
)
def test_a_kind_in_any_of_the_families_is_an_operation(attributes: dict[str, Any], operation: str) -> None:
    assert otel_in.row(span(attributes)).operation == operation


def test_an_agents_sum_of_tokens_counts_nothing() -> None:
    agent = otel_in.row(span({"gen_ai.operation.name": "invoke_agent", "gen_ai.usage.input_tokens": 70}))
    assert agent.input_tokens is None
    assert json.loads(agent.attributes or "")["otel"]["gen_ai.usage.input_tokens"] == 70


def test_a_failed_span_says_why() -> None:
    thrown = otlp.Event("exception", 5, {"exception.type": "ValueError"})
    assert otel_in.row(span({"error.type": "timeout"}, failed=True)).error_type == "timeout"
    assert otel_in.row(span(events=[thrown], failed=True)).error_type == "ValueError"
    made = otel_in.row(span(failed=True, message="broke"))
    assert (made.status, made.error_type) == ("error", "broke")


def test_secrets_are_masked_in_names_and_payloads() -> None:
    secret = "sk-abcdefghijklmnop1234567890"
    (made,) = otel_in.rows(
        [span({"gen_ai.tool.name": "t", "gen_ai.tool.call.result": secret, "x": secret}, name=secret)]
    )
    assert secret not in json.dumps(asdict(made))
    assert "[redacted]" in (made.output_messages or "")


def test_our_own_rows_come_back_from_their_spans() -> None:
    row = call(
        1,
        provider="openai",
        input_tokens=5,
        cost_usd=0.5,
        ttft_ms=250.0,
        finish_reason="stop",
        prompt_slot="s",
        prompt_version=2,
        propensity=0.5,
        operation="responses",
        status="cancelled",
        error_type="client",
        attributes='{"metadata":{"a":1}}',
        span_id="00000000000000ab",
    )
    body = otel.request([asdict(row)])
    (seen,) = otlp.read(json.dumps(body).encode(), otlp.JSON, "traces").spans
    made = asdict(otel_in.row(seen))
    same = (
        "span_id",
        "trace_id",
        "episode_id",
        "episode_source",
        "start_ns",
        "end_ns",
        "operation",
        "status",
        "provider",
    )
    same += ("request_model", "response_id", "finish_reason", "input_tokens", "cost_usd", "ttft_ms", "prompt_slot")
    same += ("prompt_version", "propensity", "error_type")
    assert {name: made[name] for name in same} == {name: getattr(row, name) for name in same}
    for name in ("input_messages", "output_messages", "attributes"):
        assert json.loads(made[name]) == json.loads(getattr(row, name))


def result(**attributes: Any) -> otlp.Event:
    given = {"gen_ai.evaluation.name": "good", "gen_ai.evaluation.score.value": 0.5, **attributes}
    return otlp.Event(otel_in.EVALUATION, 7, given, TRACE, SPAN)


def test_an_evaluation_is_a_reward_of_its_response_else_of_its_span() -> None:
    made = otel_in.evaluation(
        result(**{"gen_ai.evaluation.score.label": "fair", "gen_ai.evaluation.explanation": "so"})
    )
    assert (made.target_kind, made.target_id, made.name, made.value) == ("span", SPAN, "good", 0.5)
    assert (made.label, made.explanation, made.ts_ns, made.source) == ("fair", "so", 7, "code")
    assert otel_in.evaluation(result(**{"gen_ai.response.id": "resp-1"})).target_id == "resp-1"
    assert made == otel_in.evaluation(
        result(**{"gen_ai.evaluation.score.label": "fair", "gen_ai.evaluation.explanation": "so"})
    )
    assert made.reward_id != otel_in.evaluation(result(**{"gen_ai.evaluation.score.value": 1})).reward_id


@pytest.mark.parametrize("score", [None, True, "1", float("nan")])
def test_an_evaluation_without_a_score_is_no_reward(score: Any) -> None:
    with pytest.raises(BadInput, match=r"score|value"):
        otel_in.evaluation(result(**{"gen_ai.evaluation.score.value": score}))


def test_rewards_are_found_in_events_and_in_annotations() -> None:
    seen = span(
        {
            "annotations.0.annotation.name": "tone",
            "annotations.0.annotation.score": 1,
            "annotations.0.annotation.annotator_kind": "HUMAN",
        },
        events=[result(), result(**{"gen_ai.evaluation.score.value": "bad"})],
    )
    found, faults = otel_in.rewards([seen])
    assert [(one.name, one.value, one.source, one.target_id) for one in found] == [
        ("good", 0.5, "code", SPAN),
        ("tone", 1.0, "human", SPAN),
    ]
    assert len(faults) == 1

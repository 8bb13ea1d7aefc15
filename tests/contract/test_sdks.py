"""Real SDKs, unmodified, through a worker to a scripted upstream: they get what it said, and it is recorded."""

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai.types.responses import ResponseCompletedEvent, ResponseTextDeltaEvent
from pydantic import BaseModel

from tests.fake_upstream import (
    FakeUpstream,
    chat,
    chat_events,
    chunk,
    completion,
    data,
    error_reply,
    json_reply,
    sse_reply,
    usage_chunk,
)
from tests.unit.proxy.harness import Registry, Worker, worker

OWN, BETTER = "You are a geography helper.", "Answer with the city only."
MESSAGES: Any = [{"role": "system", "content": OWN}, {"role": "user", "content": "Capital of France?"}]
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with FakeUpstream() as fake:
        yield fake


@pytest.fixture(scope="module")
def shared(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    registry = Registry()
    registry.add("geo", OWN, BETTER)
    registry.promote("geo", {"2": 1.0})
    with worker(Path(tmp_path_factory.mktemp("data")), upstream.url, registry) as running:
        yield running


@pytest.fixture
def proxy(shared: Worker, upstream: FakeUpstream) -> Worker:
    shared.spans.clear()
    upstream.forget()
    return shared


@pytest.fixture
def client(proxy: Worker) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=proxy.url, api_key="sk-mine", max_retries=0) as made:
        yield made


def output(proxy: Worker) -> Any:
    return json.loads(proxy.span()["output_messages"])


def test_a_completion(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    reply = client.chat.completions.create(model="m", messages=MESSAGES, temperature=0.3, seed=7, user="u1")
    assert reply.choices[0].message.content == "Paris"
    assert upstream.requests[0].json["messages"][0]["content"] == BETTER
    span = proxy.span(count=1)
    assert (span["temperature"], span["seed"], span["prompt_version"]) == (0.3, 7, 2)


def test_a_stream_with_and_without_usage(client: openai.OpenAI, proxy: Worker) -> None:
    plain = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in plain) == "Paris"
    options: Any = {"include_usage": True}
    asked = list(client.chat.completions.create(model="m", messages=MESSAGES, stream=True, stream_options=options))
    assert asked[-1].usage is not None
    assert asked[-1].usage.total_tokens == 14
    assert [span["output_tokens"] for span in proxy.spans] == [3, 3]


def test_async_calls_at_once(proxy: Worker) -> None:
    async def run() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=proxy.url, api_key="sk-mine") as client:

            async def streamed(n: int) -> str:
                body: Any = [{"role": "user", "content": f"q{n}"}]
                stream = await client.chat.completions.create(model="m", messages=body, stream=True)
                return "".join([part.choices[0].delta.content or "" async for part in stream])

            return await asyncio.gather(*(streamed(n) for n in range(20)))

    assert asyncio.run(run()) == ["Paris"] * 20
    assert len({span["episode_id"] for span in proxy.spans}) == len(proxy.spans) == 20


def test_tools_in_parallel_streamed(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    def part(index: int, **call: Any) -> bytes:
        return chunk({"tool_calls": [{"index": index, **call}]})

    upstream.reply(
        sse_reply(
            [
                part(0, id="a", type="function", function={"name": "weather", "arguments": ""}),
                part(1, id="b", type="function", function={"name": "weather", "arguments": '{"city"'}),
                part(0, function={"arguments": "{}"}),
                part(1, function={"arguments": ':"Rome"}'}),
                chunk({}, "tool_calls"),
                usage_chunk(),
                b"data: [DONE]\n\n",
            ]
        )
    )
    with client.chat.completions.stream(model="m", messages=MESSAGES, tools=[WEATHER]) as stream:
        calls = stream.get_final_completion().choices[0].message.tool_calls
    assert calls is not None
    assert [call.function.arguments for call in calls] == ["{}", '{"city":"Rome"}']
    assert [call["function"]["arguments"] for call in output(proxy)[0]["tool_calls"]] == ["{}", '{"city":"Rome"}']
    assert json.loads(proxy.span(count=1)["tools"]) == [WEATHER]


def test_several_choices_and_logprobs(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    body = completion("a")
    logprobs = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}], "refusal": None}
    body["choices"] = [{**body["choices"][0], "index": n, "logprobs": logprobs} for n in range(2)]
    upstream.reply(json_reply(body))
    reply = client.chat.completions.create(model="m", messages=MESSAGES, n=2, logprobs=True)
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.choices[1].logprobs is not None
    assert reply.choices[1].logprobs.content is not None
    assert len(output(proxy)) == 2
    assert json.loads(proxy.span(count=1)["logprobs"]) == [logprobs, logprobs]


def test_structured_outputs(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    class City(BaseModel):
        name: str

    upstream.reply(chat('{"name":"Paris"}'))
    reply = client.chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
    assert reply.choices[0].message.parsed == City(name="Paris")
    assert upstream.requests[0].json["response_format"]["json_schema"]["name"] == "City"


def test_an_image(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(range(256)) * 400).decode()
    parts = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    message: Any = {"role": "user", "content": parts}
    client.chat.completions.create(model="m", messages=[message])
    assert upstream.requests[0].json["messages"][0] == message
    assert len(proxy.span(count=1)["input_messages"]) < 1000


def test_errors_are_the_sdks_own_and_retries_stay_in_the_episode(proxy: Worker, upstream: FakeUpstream) -> None:
    client = openai.OpenAI(base_url=f"{proxy.root}/e/task/v1", api_key="sk-mine", max_retries=1)
    upstream.reply(error_reply(429, "slow", headers=[("retry-after-ms", "1")]))
    assert client.chat.completions.create(model="m", messages=MESSAGES).choices[0].message.content == "Paris"
    upstream.reply(*[error_reply(400, "bad", "invalid_request_error")] * 2)
    with pytest.raises(openai.BadRequestError, match="bad"):
        client.chat.completions.create(model="m", messages=MESSAGES)
    assert [(span["status"], span["episode_id"]) for span in proxy.spans] == [
        ("error", "task"),
        ("ok", "task"),
        ("error", "task"),
    ]
    client.close()


def test_completions_and_embeddings(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    choice = {"index": 0, "text": " upon", "finish_reason": "stop", "logprobs": None}
    written = {"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    vector = {"object": "embedding", "index": 0, "embedding": base64.b64encode(b"\0\0\x80?").decode()}
    embedded = {"object": "list", "model": "e", "data": [vector], "usage": usage}
    upstream.reply(json_reply(written), json_reply(embedded))
    assert client.completions.create(model="m", prompt="Once").choices[0].text == " upon"
    assert client.embeddings.create(model="e", input=["x"]).data[0].embedding == [1.0]
    assert [span["operation"] for span in proxy.spans] == ["text_completion", "embeddings"]
    assert [span["input_tokens"] for span in proxy.spans] == [2, 2]


def response(status: str = "completed", **more: Any) -> dict[str, Any]:
    text = {"type": "output_text", "text": "Paris", "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [text]}
    usage = {"input_tokens": 11, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 3, "total_tokens": 14}
    usage["output_tokens_details"] = {"reasoning_tokens": 0}
    base = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "output": [item], "status": status}
    fixed = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "usage": usage}
    return {**base, **fixed, **more}


def test_responses_continue_by_the_previous_id(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    upstream.reply(json_reply(response()), json_reply(response(id="resp_2")))
    first = client.responses.create(model="m", instructions=OWN, input="Capital of France?")
    assert first.output_text == "Paris"
    client.responses.create(model="m", input="And of Italy?", previous_response_id=first.id)
    assert upstream.requests[0].json["instructions"] == BETTER
    one, two = proxy.spans
    assert (one["input_tokens"], one["cached_tokens"], one["response_id"]) == (11, 4, "resp_1")
    assert (two["episode_id"], two["episode_source"]) == (one["episode_id"], "response")
    assert json.loads(one["input_messages"])[0] == {"role": "system", "content": BETTER}
    assert output(proxy)[0]["content"] == "Paris"


def test_responses_streamed(client: openai.OpenAI, proxy: Worker, upstream: FakeUpstream) -> None:
    empty = response("in_progress", output=[], usage=None)
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    parts: list[dict[str, Any]] = [
        {"type": "response.created", "response": empty},
        {"type": "response.output_text.delta", **place, "delta": "Par", "logprobs": []},
        {"type": "response.output_text.delta", **place, "delta": "is", "logprobs": []},
        {"type": "response.completed", "response": response()},
    ]
    numbered = [{**part, "sequence_number": number} for number, part in enumerate(parts)]
    upstream.reply(sse_reply([f"event: {part['type']}\n".encode() + data(part) for part in numbered]))
    events = list(client.responses.create(model="m", input="Capital?", stream=True))
    assert "".join(event.delta for event in events if isinstance(event, ResponseTextDeltaEvent)) == "Paris"
    assert isinstance(events[-1], ResponseCompletedEvent)
    span = proxy.span(count=1)
    assert (span["status"], span["stream"], span["output_tokens"]) == ("ok", True, 3)
    assert output(proxy)[0]["content"] == "Paris"


def test_anthropics_own_sdk(proxy: Worker, upstream: FakeUpstream) -> None:
    message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "c", "stop_reason": "end_turn"}
    message |= {"stop_sequence": None, "usage": {"input_tokens": 5, "output_tokens": 2}}
    text = [{"type": "text", "text": "Paris"}]
    begun = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": 5, "output_tokens": 1}}
    parts: list[dict[str, Any]] = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Paris"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    ]
    stream = [f"event: {part['type']}\n".encode() + data(part) for part in parts]
    upstream.reply(json_reply({**message, "content": text}), sse_reply(stream))
    asked: Any = {"model": "c", "max_tokens": 9, "system": OWN, "messages": MESSAGES[1:]}
    with anthropic.Anthropic(base_url=proxy.root, api_key="sk-ant") as client:
        assert client.messages.create(**asked).content[0].to_dict()["text"] == "Paris"
        with client.messages.stream(**asked) as streamed:
            assert streamed.get_final_text() == "Paris"
    assert [request.json["system"] for request in upstream.requests] == [BETTER, BETTER]
    assert [(span["operation"], span["input_tokens"], span["output_tokens"]) for span in proxy.spans] == [
        ("messages", 5, 2),
        ("messages", 5, 2),
    ]


def test_a_langchain_agent_is_one_episode(proxy: Worker, upstream: FakeUpstream) -> None:
    @tool
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"20 degrees in {city}"

    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}
    upstream.reply(chat(None, tool_calls=[call]), sse_reply(chat_events("It is warm.")))
    model = ChatOpenAI(base_url=proxy.url, api_key="sk-mine", model="m").bind_tools([weather])  # type: ignore[arg-type]
    messages: list[Any] = [HumanMessage("Weather in Paris, please")]
    first = model.invoke(messages)
    asked = first.tool_calls[0]
    messages += [first, ToolMessage(weather.invoke(asked["args"]), tool_call_id=asked["id"])]
    assert "".join(str(part.content) for part in model.stream(messages)) == "It is warm."
    one, two = proxy.spans
    assert two["episode_id"] == one["episode_id"]
    assert two["episode_source"] == "chain"
    assert two["output_tokens"] == 3

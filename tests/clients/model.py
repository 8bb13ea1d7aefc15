"""A scripted model: asks for the weather in Paris, then in Rome, one tool call a step, and then answers.

Speaks chat completions, Responses and Anthropic's messages, in JSON and SSE, plus completions and embeddings. What a
request asks for besides (several choices, logprobs, structured output, parallel calls, an image) shows in the answer.
"""

import base64
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.fake_upstream import Received, Reply, data, error_reply, json_reply, sse_reply

CITIES = ("Paris", "Rome")
ANSWER = "It is 18 degrees in Paris and 21 in Rome."
STRUCTURED = '{"city":"Paris","degrees":18}'
IMAGE = "A picture."
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Said:
    """What the model says: a text, or calls as (id, name, arguments)."""

    ident: str
    text: str | None = None
    calls: tuple[tuple[str, str, str], ...] = ()


def model(request: Received) -> Reply:
    """The answer to any request of a client."""
    body = request.json if request.body else {}
    kind = request.path.rpartition("/v1/")[2]
    if kind == "models":
        return json_reply({"object": "list", "data": [{"id": "scripted", "object": "model", "owned_by": "nobody"}]})
    answers = {"chat/completions": _chat, "responses": _responses, "messages": _messages, "embeddings": _embeddings}
    answer = answers.get(kind)
    return answer(body) if answer else error_reply(404, f"no {kind} here", "invalid_request_error")


def say(told: int, tools: list[str], text: str, structured: bool) -> Said:
    """The next words, by how many tool results were told so far and what was asked."""
    ident = f"{next(_numbers):06d}"
    wanted = [(f"call_{ident}_{n}", "weather", json.dumps({"city": city})) for n, city in enumerate(CITIES)]
    if "both" in text and "weather" in tools and not told:
        return Said(ident, None, tuple(wanted))
    if "weather" in tools and told < len(CITIES):
        return Said(ident, None, (wanted[told],))
    if "final_answer" in tools:
        return Said(ident, None, ((f"call_{ident}", "final_answer", json.dumps({"answer": ANSWER})),))
    if "[[ ##" in text:
        return Said(ident, _dspy(text))
    if "image" in text and "base64" in text:
        return Said(ident, IMAGE)
    return Said(ident, STRUCTURED if structured else ANSWER)


def _dspy(text: str) -> str:
    """DSPy's own text protocol: the fields that the prompt asks for."""
    told = len(re.findall(r"\[\[ ## observation_\d+ ## \]\]", text))
    fields = {"reasoning": "Both are known.", "answer": ANSWER}
    if "next_tool_name" in text.rpartition("Respond with")[2]:
        tool, arguments = ("weather", {"city": CITIES[told]}) if told < len(CITIES) else ("finish", {})
        fields = {"next_thought": "I need it.", "next_tool_name": tool, "next_tool_args": json.dumps(arguments)}
    return "\n\n".join(f"[[ ## {name} ## ]]\n{value}" for name, value in {**fields, "completed": ""}.items())


def _chat(body: Any) -> Reply:
    messages = body["messages"]
    told = sum(message["role"] == "tool" for message in messages)
    if not told:  # frameworks that tell results as a user's words
        told = sum(message["role"] == "user" and "Observation:" in str(message["content"]) for message in messages)
    tools = [tool["function"]["name"] for tool in body.get("tools") or ()]
    said = say(told, tools, json.dumps(messages), "response_format" in body)
    calls = [
        {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
        for ident, name, arguments in said.calls
    ]
    message: dict[str, Any] = {"role": "assistant", "content": said.text, "refusal": None}
    message |= {"tool_calls": calls} if calls else {}
    reason = "tool_calls" if calls else "stop"
    head = {"id": f"chatcmpl-{said.ident}", "created": 1, "model": body["model"]}
    logprobs = None
    if body.get("logprobs"):
        part = {"token": "It", "logprob": -0.25, "bytes": [73, 116], "top_logprobs": []}
        logprobs = {"content": [part], "refusal": None}
    if body.get("stream"):
        return sse_reply(_chat_events(head, said, calls, reason, bool(body.get("stream_options") or {})))
    choices = [
        {"index": n, "message": message, "finish_reason": reason, "logprobs": logprobs}
        for n in range(body.get("n") or 1)
    ]
    return json_reply({**head, "object": "chat.completion", "choices": choices, "usage": USAGE})


def _chat_events(head: Any, said: Said, calls: list[Any], reason: str, usage: bool) -> Iterator[bytes]:
    def chunk(delta: Any, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return data({**head, "object": "chat.completion.chunk", "choices": [choice]})

    yield chunk({"role": "assistant", "content": None if calls else ""})
    for n, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        yield chunk({"tool_calls": [{"index": n, **call, "function": {**call["function"], "arguments": ""}}]})
        for half in (arguments[:5], arguments[5:]):
            yield chunk({"tool_calls": [{"index": n, "function": {"arguments": half}}]})
    for word in re.findall(r"\S+\s*", said.text or ""):
        yield chunk({"content": word})
    yield chunk({}, reason)
    if usage:
        yield data({**head, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    yield b"data: [DONE]\n\n"


def _responses(body: Any) -> Reply:
    given = body["input"] if isinstance(body["input"], list) else []
    told = sum(item.get("type") == "function_call_output" for item in given)
    tools = [tool["name"] for tool in body.get("tools") or () if "name" in tool]
    structured = (body.get("text") or {}).get("format", {}).get("type") == "json_schema"
    said = say(told, tools, json.dumps(body["input"]), structured)
    text = {"type": "output_text", "text": said.text, "annotations": [], "logprobs": []}
    items: list[Any] = [
        {"id": f"fc_{ident}", "type": "function_call", "status": "completed", "call_id": ident}
        | {"name": name, "arguments": arguments}
        for ident, name, arguments in said.calls
    ]
    if said.text is not None:
        items = [{"id": f"msg_{said.ident}", "type": "message", "role": "assistant", "status": "completed"}]
        items[0]["content"] = [text]
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    whole = {"id": f"resp_{said.ident}", "object": "response", "created_at": 1, "model": body["model"]}
    whole |= {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "error": None, "metadata": {}}
    whole |= {"incomplete_details": None, "instructions": body.get("instructions"), "temperature": 1.0, "top_p": 1.0}
    done = {**whole, "status": "completed", "output": items}
    done["usage"] = {"input_tokens": 11, "output_tokens": 3, "total_tokens": 14, **details}
    if not body.get("stream"):
        return json_reply(done)
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    return sse_reply(_response_events(begun, items, done))


def _response_events(begun: Any, items: list[Any], done: Any) -> Iterator[bytes]:
    numbers = itertools.count()

    def event(kind: str, **more: Any) -> bytes:
        return f"event: {kind}\n".encode() + data({"type": kind, "sequence_number": next(numbers), **more})

    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    for n, item in enumerate(items):
        place = {"item_id": item["id"], "output_index": n}
        if item["type"] == "function_call":
            yield event(
                "response.output_item.added", output_index=n, item={**item, "arguments": "", "status": "in_progress"}
            )
            yield event("response.function_call_arguments.delta", **place, delta=item["arguments"])
            yield event(
                "response.function_call_arguments.done", **place, arguments=item["arguments"], name=item["name"]
            )
        else:
            (part,) = item["content"]
            inside = {**place, "content_index": 0}
            empty = {**part, "text": ""}
            yield event(
                "response.output_item.added", output_index=n, item={**item, "content": [], "status": "in_progress"}
            )
            yield event("response.content_part.added", **inside, part=empty)
            for word in re.findall(r"\S+\s*", part["text"]):
                yield event("response.output_text.delta", **inside, delta=word, logprobs=[])
            yield event("response.output_text.done", **inside, text=part["text"], logprobs=[])
            yield event("response.content_part.done", **inside, part=part)
        yield event("response.output_item.done", output_index=n, item=item)
    yield event("response.completed", response=done)


def _messages(body: Any) -> Reply:
    blocks = [block for message in body["messages"] for block in message["content"] if isinstance(block, dict)]
    told = sum(block["type"] == "tool_result" for block in blocks)
    tools = [tool["name"] for tool in body.get("tools") or ()]
    said = say(told, tools, json.dumps(body["messages"]), False)
    content: list[Any] = [
        {"type": "tool_use", "id": f"toolu_{ident}", "name": name, "input": json.loads(arguments)}
        for ident, name, arguments in said.calls
    ]
    content = content or [{"type": "text", "text": said.text}]
    message = {"id": f"msg_{said.ident}", "type": "message", "role": "assistant", "model": body["model"]}
    message |= {"stop_reason": "tool_use" if said.calls else "end_turn", "stop_sequence": None}
    usage = {"input_tokens": 11, "output_tokens": 3}
    if not body.get("stream"):
        return json_reply({**message, "content": content, "usage": usage})
    return sse_reply(_message_events(message, content, usage))


def _message_events(message: Any, content: list[Any], usage: Any) -> Iterator[bytes]:
    def event(kind: str, **more: Any) -> bytes:
        return f"event: {kind}\n".encode() + data({"type": kind, **more})

    begun = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield event("message_start", message=begun)
    yield event("ping")
    for n, block in enumerate(content):
        if block["type"] == "tool_use":
            yield event("content_block_start", index=n, content_block={**block, "input": {}})
            text = json.dumps(block["input"])
            for half in (text[:5], text[5:]):
                yield event("content_block_delta", index=n, delta={"type": "input_json_delta", "partial_json": half})
        else:
            yield event("content_block_start", index=n, content_block={"type": "text", "text": ""})
            for word in re.findall(r"\S+\s*", block["text"]):
                yield event("content_block_delta", index=n, delta={"type": "text_delta", "text": word})
        yield event("content_block_stop", index=n)
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield event("message_delta", delta=delta, usage={"output_tokens": 3})
    yield event("message_stop")


def _embeddings(body: Any) -> Reply:
    vector: Any = [0.5, -1.0]
    if body.get("encoding_format") == "base64":
        vector = base64.b64encode(bytes.fromhex("0000003f000080bf")).decode()
    texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
    rows = [{"object": "embedding", "index": n, "embedding": vector} for n, _ in enumerate(texts)]
    return json_reply(
        {"object": "list", "model": body["model"], "data": rows, "usage": {"prompt_tokens": 2, "total_tokens": 2}}
    )

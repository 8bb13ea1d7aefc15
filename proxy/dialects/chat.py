"""`chat/completions`: OpenAI's, and what vLLM, SGLang and others add to it (token ids, reasoning)."""

from itertools import groupby
from typing import Any, NamedTuple

import orjson

from proxy import sse
from proxy.dialects import runs
from proxy.dialects.base import (
    Json,
    Prompt,
    Reading,
    StreamParser,
    Summary,
    Turn,
    dicts,
    error_of,
    integer,
    prompt_at,
    string,
    text_of,
    told,
)
from proxy.sse import Event

# What is told alike by each chunk, or told only where it isn't null.
_PLAIN = {"id", "object", "created", "model", "system_fingerprint", "service_tier", "obfuscation", "choices", "usage"}
_PLAIN_CHOICE = {"index", "delta", "finish_reason", "logprobs"}
_STR = {str}
_FIRST, _SECOND = ("messages", 0, "content"), ("messages", 1, "content")
_PROMPTING = ("system", "developer")  # a role may be anything, also what has no hash
_AGENTS = frozenset(("system", "developer", "user"))
_CALLING = frozenset(("tool_calls", "function_call", "tool_call_id"))
_TEXTS = ("content", "refusal", "reasoning_content", "reasoning")


class Chat:
    """The dialect."""

    operation = "chat"
    service = "openai"
    usage_option = True
    marks: tuple[bytes, ...] = (b"[DONE]",)

    def read(self, body: Json) -> Reading:
        """Prompts are every system and developer message, and the first user message."""
        messages = body.get("messages")
        listed = dicts(messages)
        prompts: list[Prompt] = []
        user = False
        for index, message in enumerate(listed if listed is messages else _holes(messages)):
            role = message.get("role")
            if role == "user":
                if user:
                    continue
                user = True
            elif role not in _PROMPTING:
                continue
            content = message.get("content")
            path = ("messages", index, "content")
            if type(content) is str:
                prompts.append(Prompt(role, content, path))
            else:
                prompts += prompt_at(role, content, path)
        return Reading(string(body.get("model")), body.get("stream") is True, prompts, _turns(listed))

    def messages(self, body: Json) -> list[Json]:
        """As they are."""
        return dicts(body.get("messages"))

    def ends(self, event: Event) -> bool:
        """`[DONE]` is the last event."""
        return event.data == b"[DONE]"

    def parser(self) -> StreamParser:
        """A parser for one stream."""
        return ChatStream()

    def summarise(self, reply: Json) -> Summary:
        """All choices, in order."""
        summary = Summary()
        merge_head(summary, reply)
        choices = dicts(reply.get("choices"))
        messages, replies, ids, logprobs = [], [], [], []
        for choice in choices:
            message = choice.get("message")
            kept = {} if type(message) is not dict else {name: one for name, one in message.items() if one is not None}
            replies.append([_reply(kept)])
            kept["finish_reason"] = choice.get("finish_reason")
            messages.append(kept)
            ids.append(choice.get("token_ids"))
            logprobs.append(choice.get("logprobs"))
        summary.output_messages, summary.replies = messages, replies
        finish(summary, choices, reply.get("prompt_token_ids"), ids, logprobs)
        return summary


class Begun(NamedTuple):
    """The first message of a conversation, the agent's prompt, read once for all that begin with it."""

    prompt: Prompt
    canonical: bytes  # of the first turn, up to the next message

    @classmethod
    def of(cls, message: Json) -> "Begun | None":
        """None where it is no plain text of the agent's."""
        text, role = message.get("content"), message.get("role")
        if len(message) != 2 or type(text) is not str or role not in _PROMPTING:
            return None
        return cls(Prompt(role, text, _FIRST), orjson.dumps([(role, text, (), None)])[:-1] + b",")

    def read(self, body: Json, model: str | None) -> Reading | None:
        """The same as `Chat.read` of a body that goes on with a text of the user's and nothing else; None of others."""
        kinds = [*map(type, body.values())]
        if kinds.count(list) != 1 or dict in kinds:  # there is depth in it to be looked at
            return None
        messages = body["messages"]
        if len(messages) != 2 or type(second := messages[1]) is not dict or len(second) != 2:
            return None
        text = second.get("content")
        if type(text) is not str or second.get("role") != "user":
            return None
        turn = Turn(False, b"%b%b]" % (self.canonical, orjson.dumps(("user", text, (), None))))
        return Reading(model, body.get("stream") is True, [self.prompt, Prompt("user", text, _SECOND)], [turn])


class ChatStream(StreamParser):
    """Puts the chunks of a stream together again."""

    def __init__(self) -> None:
        self._summary = Summary()
        self._choices: dict[int, Json] = {}
        self._prompt_ids: Any = None

    def read(self, stream: bytes) -> None:
        """Takes a whole stream; of a long run of texts, chunk by chunk the same otherwise, only the texts."""
        run = runs.find(stream)
        values = None if run is None else sse.values(run.before + run.after)
        if run is None or values is None or not runs.alike(run, values[1], _with_text):
            super().read(stream)
            return
        first, second, *after = values
        self.take(first)
        text = _only_text(second)
        if text is not None and 0 in self._choices and self._goes_on(second):
            self._choices[0]["texts"].setdefault("content", []).extend((text, *run.texts))
        else:
            self.take(second)
            for text in run.texts:
                self.take(_with_text(second, text))
        for value in after:
            self.take(value)

    def feed(self, event: Event) -> None:
        """Takes the next event; what isn't a JSON object is no chunk."""
        try:
            chunk = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            return
        if isinstance(chunk, dict):
            self.take(chunk)

    def _goes_on(self, chunk: Json) -> bool:
        """Whether its head tells nothing new."""
        known = self._summary
        return bool(chunk.get("id") == known.response_id and chunk.get("model") == known.response_model)

    def take(self, chunk: Json) -> None:
        """Takes the next chunk."""
        known, held, same = self._summary, self._choices.get(0), self._goes_on(chunk)
        text = _only_text(chunk) if same and held is not None else None
        if text is not None and held is not None:
            held["texts"].setdefault("content", []).append(text)
            return
        if not same or chunk.get("usage") is not None or "error" in chunk:  # in most chunks there is nothing new
            merge_head(known, chunk)
        if self._prompt_ids is None:
            self._prompt_ids = chunk.get("prompt_token_ids")
        for choice in dicts(chunk.get("choices")):
            index = choice.get("index")
            if type(index) is not int:
                index = 0
            if index not in self._choices:
                self._choices[index] = {"message": {"role": "assistant"}, "texts": {}}
            _merge_choice(self._choices[index], choice)

    def summary(self) -> Summary:
        """The same shape as of a JSON answer."""
        choices = [_assembled(self._choices[index]) for index in sorted(self._choices)]
        whole = Chat().summarise({"choices": choices, "prompt_token_ids": self._prompt_ids})
        whole.__dict__.update(self._summary.__dict__)  # what heads have told
        return whole


def _only_text(chunk: Json) -> str | None:
    """The text of a chunk that brings nothing else, as most do; None for any other."""
    choices = chunk.get("choices")
    if type(choices) is not list or len(choices) != 1 or type(choice := choices[0]) is not dict:
        return None
    delta = choice.get("delta")
    if type(delta) is not dict or len(delta) != 1 or type(text := delta.get("content")) is not str:
        return None
    if chunk.get("usage") or choice.get("index") != 0 or choice.get("finish_reason") or choice.get("logprobs"):
        return None
    return text if _PLAIN.issuperset(chunk) and _PLAIN_CHOICE.issuperset(choice) else None


def _with_text(chunk: Json, text: str) -> Json:
    """The chunk with another text in its first choice. Raises LookupError, TypeError or ValueError if it has none."""
    choice, *others = chunk["choices"]
    return {**chunk, "choices": [{**choice, "delta": {**choice["delta"], "content": text}}, *others]}


def head(reply: Json) -> Summary:
    """Id, model, usage and error of a completion or a chunk."""
    summary = Summary()
    merge_head(summary, reply)
    return summary


def merge_head(summary: Summary, chunk: Json) -> None:
    """What a later chunk says counts; what it leaves out stays."""
    ident, model, usage = chunk.get("id"), chunk.get("model"), chunk.get("usage")
    if ident and type(ident) is str:
        summary.response_id = ident
    if model and type(model) is str:
        summary.response_model = model
    if "error" in chunk:
        summary.error_type = error_of(chunk) or summary.error_type
    if type(usage) is dict:
        told, answered = usage.get("prompt_tokens"), usage.get("completion_tokens")
        summary.input_tokens = told if type(told) is int else None
        summary.output_tokens = answered if type(answered) is int else None
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if type(details) is dict else None
        summary.cached_tokens = cached if type(cached) is int else None


def finish(
    summary: Summary, choices: list[Json], prompt_ids: Any, completion_ids: list[Any], logprobs: list[Any]
) -> None:
    """Fills in what is told per choice. A stop reason is that of the first choice."""
    if choices:
        summary.finish_reason = string(choices[0].get("finish_reason"))
    if prompt_ids is not None or (completion_ids and completion_ids != [None] * len(completion_ids)):
        summary.token_ids = {"prompt": prompt_ids, "completion": completion_ids}
    if logprobs and logprobs != [None] * len(logprobs):
        summary.logprobs = logprobs


def _holes(messages: Any) -> list[Json]:
    """The messages, what is none as an empty one: prompts keep their places."""
    return [message if type(message) is dict else {} for message in messages] if type(messages) is list else []


def _turns(messages: list[Json]) -> list[Turn]:
    """The messages of one side in a row are one turn."""
    try:
        row: list[Any] = [(message["role"], message["content"], (), None) for message in messages]
        roles = {one[0] for one in row}
    except (KeyError, TypeError):
        row = []
    # As most calls are: texts of one side only.
    if row and _AGENTS.issuperset(roles) and max(map(len, messages)) == 2 and {type(one[1]) for one in row} == _STR:
        return [Turn(False, orjson.dumps(row))]
    turns: list[Turn] = []
    for replying, some in groupby(messages, _replying):
        rows = [_told(message) for message in some]
        turns += [Turn(replying, orjson.dumps(part)) for part in ([[row] for row in rows] if replying else [rows])]
    return turns


def _replying(message: Json) -> bool:
    return message.get("role") == "assistant"


def _reply(message: Json) -> bytes:
    """The canonical turn of one message of the model's."""
    content = message.get("content")
    if type(content) is str and message.get("role", "assistant") == "assistant" and _CALLING.isdisjoint(message):
        return b'[["assistant",%b,[],null]]' % orjson.dumps(content.strip())
    return orjson.dumps([_told({"role": "assistant", **message})])


def _told(message: Json) -> tuple[Any, ...]:
    """A message as it is compared with what a client sends back."""
    role, content = message.get("role"), message.get("content")
    if type(role) is str and type(content) is str and _CALLING.isdisjoint(message):
        return role, content.strip() if role == "assistant" else content, (), None
    role = string(role) or ""
    calls = [
        (call.get("id"), function.get("name"), function.get("arguments") or "")
        for call in dicts(message.get("tool_calls"))
        if isinstance(function := call.get("function"), dict)
    ]
    legacy = message.get("function_call")
    if isinstance(legacy, dict):
        calls.append((None, legacy.get("name"), legacy.get("arguments") or ""))
    return told(role, text_of(content), calls, message.get("tool_call_id"))


def _merge_choice(held: Json, choice: Json) -> None:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        _merge_delta(held, delta)
    if choice.get("finish_reason") is not None:
        held["finish_reason"] = choice["finish_reason"]
    if isinstance(choice.get("token_ids"), list):
        held.setdefault("token_ids", []).extend(choice["token_ids"])
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        kept = held.setdefault("logprobs", {})
        for name, values in logprobs.items():
            if isinstance(values, list):
                kept.setdefault(name, []).extend(values)


def _merge_delta(held: Json, delta: Json) -> None:
    """Texts are collected in lists and joined once at the end: adding strings would copy them at each token."""
    texts = held["texts"]
    for name, value in delta.items():
        if value is None:
            continue
        if name in texts and isinstance(value, str):
            texts[name].append(value)
        elif name in _TEXTS and isinstance(value, str):
            texts[name] = [value]
        elif name == "tool_calls":
            _merge_calls(held.setdefault("calls", {}), dicts(value))
        elif name == "function_call" and isinstance(value, dict):
            _merge_function(held["message"].setdefault("function_call", {}), value)
        else:
            held["message"][name] = value


def _merge_calls(calls: dict[int, Json], deltas: list[Json]) -> None:
    for delta in deltas:
        index = integer(delta.get("index"))
        call = calls.setdefault(len(calls) if index is None else index, {"function": {}})
        for name, value in delta.items():
            if name == "function" and isinstance(value, dict):
                _merge_function(call["function"], value)
            elif name != "index" and value is not None:
                call[name] = value


def _merge_function(function: Json, delta: Json) -> None:
    for name, value in delta.items():
        if name == "arguments" and isinstance(value, str):
            function["arguments"] = function.get("arguments", "") + value
        elif value is not None:
            function[name] = value


def _assembled(held: Json) -> Json:
    message = {**held["message"], **{name: "".join(parts) for name, parts in held["texts"].items()}}
    if "calls" in held:
        message["tool_calls"] = [held["calls"][index] for index in sorted(held["calls"])]
    return {**{name: held.get(name) for name in ("finish_reason", "token_ids", "logprobs")}, "message": message}

"""Messages of spans in the form in which calls are stored: OpenAI's {"role", "content", "tool_calls", ...}.

Three families of names carry them: OTel's `gen_ai.input.messages` (JSON of parts), OpenInference's flattened
`llm.input_messages.{i}.message.*`, and OpenLLMetry's older, flattened `gen_ai.prompt.{i}.*`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

Attributes = Mapping[str, Any]
Messages = list[dict[str, Any]]
_DEEPEST = 16  # levels of a flattened name; what follows stays one name


def input_messages(attributes: Attributes) -> Messages:
    """What the model was given, in whatever names; empty where that was not captured."""
    system = of_parts(attributes.get("gen_ai.system_instructions"), "system")
    asked = of_parts(attributes.get("gen_ai.input.messages"))
    return [*system, *asked] or flattened(attributes, "llm.input_messages", "message") or _prompts(attributes)


def output_messages(attributes: Attributes) -> Messages:
    """What it answered, one message a choice."""
    found = of_parts(attributes.get("gen_ai.output.messages")) or flattened(
        attributes, "llm.output_messages", "message"
    )
    return found or _legacy(attributes, "gen_ai.completion", "assistant") or _texts(attributes, "llm.choices")


def _prompts(attributes: Attributes) -> Messages:
    return _legacy(attributes, "gen_ai.prompt", "user") or _texts(attributes, "llm.prompts", "user")


def parsed(value: Any) -> Any:
    """JSON text as its value; what is no JSON text stays as it is."""
    if not isinstance(value, str) or value[:1] not in ("{", "[", '"'):
        return value
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        return value


def text(value: Any) -> str:
    """A string as it is, anything else as JSON."""
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def of_parts(value: Any, role: str = "user") -> Messages:
    """Messages out of `gen_ai.*.messages` or `gen_ai.system_instructions`, as JSON text or as values."""
    value = parsed(value)
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        return [{"role": role, "content": text(value)}]
    if value and all(isinstance(item, Mapping) and "role" not in item for item in value):
        return [_message({"role": role, "parts": value})]
    return [_message(item) if isinstance(item, Mapping) else {"role": role, "content": text(item)} for item in value]


def _message(item: Mapping[str, Any]) -> dict[str, Any]:
    """One message of parts; a message in OpenAI's own form passes."""
    parts = item.get("parts")
    if not isinstance(parts, list):
        return dict(item)
    found: dict[str, Any] = {"role": item.get("role") or "user", "content": None}
    contents: list[Any] = []
    for part in parts:
        _add(found, contents, part if isinstance(part, Mapping) else {"type": "text", "content": part})
    if all(isinstance(content, str) for content in contents):
        found["content"] = "".join(contents) if contents else found["content"]
    else:
        found["content"] = [{"type": "text", "text": one} if isinstance(one, str) else one for one in contents]
    for name in ("name", "finish_reason"):
        if item.get(name):
            found[name] = item[name]
    if found.get("finish_reason") == "tool_call":
        found["finish_reason"] = "tool_calls"
    return found


def _add(found: dict[str, Any], contents: list[Any], part: Mapping[str, Any]) -> None:
    kind = part.get("type")
    if kind == "text":
        contents.append(text(part.get("content", "")))
    elif kind == "tool_call":
        found.setdefault("tool_calls", []).append(
            _tool_call(part.get("id"), part.get("name"), part.get("arguments", {}))
        )
    elif kind == "tool_call_response":
        found["role"] = "tool"
        found["tool_call_id"] = part.get("id")
        contents.append(text(part.get("response", part.get("result", ""))))
    elif kind in ("reasoning", "thinking"):
        found["reasoning_content"] = text(part.get("content", ""))
    else:
        contents.append(dict(part))


def _tool_call(ident: Any, name: Any, arguments: Any) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": text(arguments)}}


def to_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    """The way back: an OpenAI message as OTel's message of parts."""
    parts: list[dict[str, Any]] = []
    content = message.get("content")
    if message.get("role") == "tool":
        parts.append({"type": "tool_call_response", "id": message.get("tool_call_id"), "response": content})
    elif isinstance(content, str):
        parts.append({"type": "text", "content": content})
    elif isinstance(content, list):
        parts += [_part(item) for item in content]
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        arguments = parsed(function.get("arguments"))
        parts.append({"type": "tool_call", "id": call.get("id"), "name": function.get("name"), "arguments": arguments})
    if message.get("reasoning_content"):
        parts.append({"type": "reasoning", "content": message["reasoning_content"]})
    kept = {name: message[name] for name in ("name", "finish_reason") if message.get(name)}
    return {"role": message.get("role") or "user", "parts": parts, **kept}


def _part(item: Any) -> dict[str, Any]:
    if isinstance(item, Mapping) and item.get("type") in ("text", "input_text", "output_text"):
        return {"type": "text", "content": item.get("text", "")}
    return dict(item) if isinstance(item, Mapping) else {"type": "text", "content": text(item)}


def nested(attributes: Attributes, prefix: str) -> Any:
    """The tree that flattened names spell: `a.0.b` = 1 is {"a": [{"b": 1}]} for the prefix "a". None for nothing."""
    root: dict[str, Any] = {}
    for name, value in attributes.items():
        if not name.startswith(prefix + "."):
            continue
        at = root
        *path, last = name[len(prefix) + 1 :].split(".", _DEEPEST)
        for part in path:
            below = at.setdefault(part, {})
            at = below if isinstance(below, dict) else at.setdefault(part + ".", {})
        at[last] = value
    return _listed(root) if root else None


def _listed(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    held = {name: _listed(value) for name, value in tree.items()}
    if all(name.isdecimal() for name in held):
        return [held[name] for name in sorted(held, key=int)]
    return held


def flattened(attributes: Attributes, prefix: str, wrapper: str) -> Messages:
    """OpenInference: `{prefix}.{i}.{wrapper}.role`, `.content`, `.contents.{j}.message_content.*`, `.tool_calls.{j}.*`
    with the names of the inner objects in between."""
    tree = nested(attributes, prefix)
    found = [item.get(wrapper) for item in tree if isinstance(item, dict)] if isinstance(tree, list) else []
    return [_inferred(item) for item in found if isinstance(item, dict)]


def _inferred(item: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"role": item.get("role") or "user", "content": item.get("content")}
    contents = item.get("contents")
    if isinstance(contents, list):
        found["content"] = [_content(part.get("message_content", part)) for part in contents if isinstance(part, dict)]
    calls = item.get("tool_calls")
    if isinstance(calls, list):
        found["tool_calls"] = [_called(call.get("tool_call", call)) for call in calls if isinstance(call, dict)]
    for name in ("tool_call_id", "name"):
        if item.get(name):
            found[name] = item[name]
    return found


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    return _tool_call(call.get("id"), function.get("name"), function.get("arguments", "{}"))


def _content(part: dict[str, Any]) -> dict[str, Any]:
    if "text" in part:
        return {"type": "text", "text": part["text"]}
    url = ((part.get("image") or {}).get("image") or {}).get("url") if isinstance(part.get("image"), dict) else None
    return {"type": "image_url", "image_url": {"url": url}} if url else part


def _legacy(attributes: Attributes, prefix: str, role: str) -> Messages:
    """OpenLLMetry of old: `gen_ai.prompt.{i}.role`, `.content`, `.tool_calls.{j}.name`, `.finish_reason`."""
    tree = nested(attributes, prefix)
    return [_old(item, role) for item in tree if isinstance(item, dict)] if isinstance(tree, list) else []


def _old(item: dict[str, Any], role: str) -> dict[str, Any]:
    found: dict[str, Any] = {"role": item.get("role") or role, "content": parsed(item.get("content"))}
    if isinstance(found["content"], Mapping):
        found["content"] = item["content"]
    calls = item.get("tool_calls")
    if isinstance(calls, list):
        found["tool_calls"] = [
            _tool_call(call.get("id"), call.get("name"), call.get("arguments", "{}")) for call in calls
        ]
    for name in ("tool_call_id", "finish_reason"):
        if item.get(name):
            found[name] = item[name]
    return found


def _texts(attributes: Attributes, prefix: str, role: str = "assistant") -> Messages:
    """OpenInference's text completions: `llm.prompts.{i}.prompt.text`, `llm.choices.{i}.completion.text`."""
    tree = nested(attributes, prefix)
    items: Sequence[Any] = tree if isinstance(tree, list) else ()
    texts = [
        part.get("text") for item in items if isinstance(item, dict) for part in item.values() if isinstance(part, dict)
    ]
    return [{"role": role, "content": one} for one in texts if isinstance(one, str)]

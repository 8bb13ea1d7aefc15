"""A folder that `datasets.load_dataset` opens and TRL trains on as it is.

    sft                 {"messages"}: a row a conversation; a call that a later one continues is in that
    prompt-completion   {"prompt", "completion"}: a row a call
    preference          {"prompt", "chosen", "rejected"}: calls with one prompt whose episodes earned differently
    trajectory          {"prompt", "completion", "reward", "steps"}: a row an episode, tools' answers included

Source of the columns: TRL's documentation of dataset formats, conversational variants. `tools` and `episode_id` stand
beside them. Only what all chat templates take is kept of a message; a call with images is left out, and counted.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from collector.errors import NotFound
from collector.formats.bundle import span_out
from collector.model import CALLS

Form = Literal["sft", "preference", "prompt-completion", "trajectory"]
FORMS: tuple[Form, ...] = get_args(Form)
Row = dict[str, Any]
_TEXT_PARTS = ("text", "input_text", "output_text")
_MESSAGE = pa.struct(
    [
        ("role", pa.string()),
        ("content", pa.string()),
        (
            "tool_calls",
            pa.list_(
                pa.struct(
                    [
                        ("id", pa.string()),
                        ("type", pa.string()),
                        ("function", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
                    ]
                )
            ),
        ),
        ("tool_call_id", pa.string()),
        ("name", pa.string()),
    ]
)
_PLAIN = pa.struct([("role", pa.string()), ("content", pa.string())])
_MESSAGES = ("messages", "prompt", "completion", "chosen", "rejected")
_TYPES = {"reward": pa.float64(), "reward_chosen": pa.float64(), "reward_rejected": pa.float64()}


class _Unusable(Exception):
    """A message that is no text."""


def write(folder: Path, episodes: Iterable[Mapping[str, Any]], form: Form) -> tuple[int, Counter[str]]:
    """`data/train.parquet` and a card; returns how many rows, and how many calls were left out and why.

    Raises NotFound where there is no row: trainers can't open an empty file.
    """
    left: Counter[str] = Counter()
    rows = list(ROWS[form](episodes, left))
    if not rows:
        why = ", ".join(f"{count} {reason}" for reason, count in left.items())
        raise NotFound(f"nothing to write in the form {form}" + (f"; left out: {why}" if why else ""), param="form")
    target = folder / "data" / "train.parquet"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(".train.parquet.part")
    pq.write_table(_table(rows), part, compression="zstd")
    part.replace(target)
    (folder / "README.md").write_text(_card(form, len(rows)))
    return len(rows), left


def _table(rows: Sequence[Row]) -> pa.Table:
    """Message columns have the full type only where a message calls a tool: plain ones stay {"role", "content"}."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    fields = []
    for name in names:
        if name in _MESSAGES:
            rich = any(set(message) - {"role", "content"} for row in rows for message in row.get(name) or ())
            fields.append((name, pa.list_(_MESSAGE if rich else _PLAIN)))
        else:
            fields.append((name, _TYPES.get(name, pa.string())))
    return pa.Table.from_pylist(rows, pa.schema(fields))


def _calls(episode: Mapping[str, Any], left: Counter[str]) -> Iterator[tuple[list[Row], list[Row], Row]]:
    """`(what went in, what came out, the row)` of an episode's successful calls of text."""
    for span in sorted(episode["spans"], key=lambda span: (span["start_ns"], span["span_id"])):
        row = span_out(span)
        if row["operation"] not in CALLS or row["operation"] == "embeddings":
            continue
        if row["status"] != "ok":
            left["failed"] += 1
            continue
        try:
            given = [_message(one) for one in _listed(row.get("input_messages"))]
            gave = [_message(one) for one in _listed(row.get("output_messages"))[:1]]
        except _Unusable:
            left["not text"] += 1
            continue
        if given and gave:
            yield given, gave, row
        else:
            left["no messages"] += 1


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _message(one: Any) -> Row:
    """A message of {"role", "content", "tool_calls", "tool_call_id", "name"}, content as one text."""
    if not isinstance(one, Mapping):
        raise _Unusable
    content = one.get("content")
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS for part in content):
            raise _Unusable
        content = "".join(str(part.get("text", "")) for part in content)
    found: Row = {"role": {"developer": "system"}.get(str(one.get("role")), one.get("role")), "content": content or ""}
    calls = [call for call in _listed(one.get("tool_calls")) if isinstance(call, Mapping)]
    if calls:
        found["tool_calls"] = [_call(call) for call in calls]
    for name in ("tool_call_id", "name"):
        if isinstance(one.get(name), str):
            found[name] = one[name]
    return found


def _call(call: Mapping[str, Any]) -> Row:
    function = call.get("function")
    function = function if isinstance(function, Mapping) else {}
    arguments = function.get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return {"id": call.get("id"), "type": "function", "function": {"name": function.get("name"), "arguments": text}}


def _beside(row: Row, episode: Mapping[str, Any]) -> Row:
    """The columns beside the messages."""
    found: Row = {"episode_id": episode["episode_id"]}
    if row.get("tools"):
        found["tools"] = orjson.dumps(row["tools"]).decode()
    if episode.get("reward") is not None:
        found["reward"] = float(episode["reward"])
    return found


def _sft(episodes: Iterable[Mapping[str, Any]], left: Counter[str]) -> Iterator[Row]:
    for episode in episodes:
        found = [([*given, *gave], row) for given, gave, row in _calls(episode, left)]
        for index, (messages, row) in enumerate(found):
            size = len(messages)
            if any(len(later) > size and later[:size] == messages for later, _ in found[index + 1 :]):
                continue
            yield {"messages": messages, **_beside(row, episode)}


def _completions(episodes: Iterable[Mapping[str, Any]], left: Counter[str]) -> Iterator[Row]:
    for episode in episodes:
        for given, gave, row in _calls(episode, left):
            yield {"prompt": given, "completion": gave, **_beside(row, episode)}


def _preferences(episodes: Iterable[Mapping[str, Any]], left: Counter[str]) -> Iterator[Row]:
    """Per prompt, the answer of the best episode against that of the worst."""
    tried: dict[bytes, list[tuple[float, str, list[Row], list[Row]]]] = {}
    for episode in episodes:
        if episode.get("reward") is None:
            left["no reward"] += 1
            continue
        for given, gave, _ in _calls(episode, left):
            key = orjson.dumps(given)
            tried.setdefault(key, []).append((float(episode["reward"]), episode["episode_id"], given, gave))
    for attempts in tried.values():
        best = max(attempts, key=lambda attempt: (attempt[0], attempt[1]))
        worst = min(attempts, key=lambda attempt: (attempt[0], attempt[1]))
        if best[0] == worst[0] or best[3] == worst[3]:
            left["no difference"] += 1
            continue
        rewards = {"reward_chosen": best[0], "reward_rejected": worst[0]}
        yield {"prompt": best[2], "chosen": best[3], "rejected": worst[3], **rewards}


def _trajectories(episodes: Iterable[Mapping[str, Any]], left: Counter[str]) -> Iterator[Row]:
    """The first call's prompt; then all that followed: answers, and what the next call added to the conversation."""
    for episode in episodes:
        found = list(_calls(episode, left))
        if not found:
            continue
        prompt, completion, steps = found[0][0], list(found[0][1]), [_step(found[0][2])]
        for given, gave, row in found[1:]:
            told = [*prompt, *completion]
            completion += [*(given[len(told) :] if given[: len(told)] == told else given), *gave]
            steps.append(_step(row))
        beside = _beside(found[0][2], episode)
        yield {"prompt": prompt, "completion": completion, "steps": orjson.dumps(steps).decode(), **beside}


def _step(row: Row) -> Row:
    names = ("span_id", "request_model", "prompt_slot", "prompt_version", "propensity", "input_tokens", "output_tokens")
    return {name: row[name] for name in names if row.get(name) is not None}


ROWS: Mapping[Form, Callable[[Iterable[Mapping[str, Any]], Counter[str]], Iterator[Row]]] = {
    "sft": _sft,
    "preference": _preferences,
    "prompt-completion": _completions,
    "trajectory": _trajectories,
}


def _card(form: Form, rows: int) -> str:
    """A dataset card that tells `load_dataset` where the rows are."""
    return (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train.parquet\n---\n"
        f"# Episodes as {form}\n\n{rows} rows in the form `{form}` of TRL's conversational formats.\n"
    )

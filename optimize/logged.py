"""Tasks out of logged calls: each a request that an agent once sent, with what is known of the right answer to it."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collector.client import Client
from collector.errors import BadInput
from optimize.dataset import Task
from optimize.grade import needs_expected
from optimize.patience import patiently
from optimize.runner import task_part

# Constants, so that no query is made of text. Calls under candidates are a search's own.
CALLS = """
select s.span_id, s.episode_id, e.steps, e.reward, s.prompt_slot, s.request_model, s.temperature, s.top_p, s.max_tokens,
  s.seed, s.tools, s.attributes, s.input_messages, s.output_messages
from spans_v s join episodes_v e using (episode_id)
where s.operation = 'chat' and s.status = 'ok' and s.prompt_slot is not null and s.prompt_candidate is null
order by s.start_ns desc
"""
LABELS = "select episode_id, label from rewards_v where name = 'expected' and label is not null order by ts_ns"
NEWEST = 20_000
FULL = 0.999  # reward from which the logged answer counts as a right one
PARAMETERS = ("temperature", "top_p", "max_tokens", "seed")
WHY = (
    "what the agent did after the first answer depended on it, and recorded tool results belong to the old answers, so "
    "a new answer in the middle tells nothing of what the episode would have earned"
)


@dataclass(frozen=True)
class LoggedTask(Task):
    """A logged call. `request` is the body to send again; `data` what a grader and a critic may know of it."""

    request: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Logged:
    """The tasks of a slot, newest first, and what was left out and why, in sentences."""

    tasks: list[LoggedTask]
    notes: tuple[str, ...]


async def gather(
    client: Client, slot: str, grader: str, *, known: Sequence[Task] = (), force: bool = False, limit: int = 400
) -> Logged:
    """The newest calls under `slot`, at most `limit`, one a request.

    A call of an episode with several is left out unless `force`. Where the grader compares with a right answer, that is
    `expected` of the task of `known` that the runner made the episode for, else `expected` of the request's metadata,
    else the label of a reward named `expected`, else the logged answer where it earned the full reward; calls without
    any are left out. Raises BadInput, saying why, where nothing is left.
    """
    found = await patiently(lambda: client.query(CALLS, limit=NEWEST))
    rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
    rows = [row for row in rows if row["prompt_slot"] == slot]
    if not rows:
        raise BadInput(f"the store holds no call under the slot {slot} to replay", param="slot")
    labels = dict((await patiently(lambda: client.query(LABELS, limit=NEWEST)))["rows"])
    alone = [row for row in rows if row["steps"] == 1]
    many = len({row["episode_id"] for row in rows if row["steps"] != 1})
    if not alone and not force:
        raise BadInput(
            f"all {many} logged episodes of {slot} have several calls: {WHY}. Run the agent itself (-- COMMAND), or "
            f"let --force replay each call alone",
            param="replay",
        )
    notes = [_note(many, force=force)] if many else []
    tasks, unknown = _tasks(rows if force else alone, labels, {task_part(task.id): task for task in known}, grader)
    if unknown:
        notes.append(f"{unknown} calls were left out: nobody said what the right answer would have been")
    if len(tasks) < 2:
        raise BadInput(
            f"{len(tasks)} calls are too few to replay; {'; '.join(notes) or 'more traffic is needed'}", param="replay"
        )
    return Logged(tasks[:limit], tuple(notes))


def _note(many: int, *, force: bool) -> str:
    if force:
        return f"{many} episodes have several calls, and each call is replayed alone: {WHY}; read the result as a hint"
    return f"{many} episodes with several calls were left out: {WHY}; --force replays each of their calls alone"


def _tasks(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str], known: Mapping[str, Task], grader: str
) -> tuple[list[LoggedTask], int]:
    tasks: dict[str, LoggedTask] = {}
    unknown = 0
    for row in rows:
        task = _task(row, labels.get(row["episode_id"]), known)
        if task is None:
            continue
        if needs_expected(grader) and task.expected is None:
            unknown += 1
        else:
            tasks.setdefault(task.id, task)
    return list(tasks.values()), unknown


def _task(row: Mapping[str, Any], label: str | None, known: Mapping[str, Task]) -> LoggedTask | None:
    messages, said = _json(row["input_messages"]) or [], _json(row["output_messages"]) or []
    asked = [message for message in messages if message.get("role") == "user"]
    if not asked or not said or any(message.get("elided") for message in messages):
        return None
    attributes = _json(row["attributes"]) or {}
    metadata = attributes.get("metadata")
    answer = answer_of(said[0])
    data: dict[str, Any] = {
        **attributes.get("variables", {}),
        **(metadata if isinstance(metadata, dict) else {}),
        **_made_for(row["episode_id"], known),
        "input": asked[-1].get("content"),
        "logged_answer": answer,
        "logged_reward": row["reward"],
    }
    if data.get("expected", data.get("answer")) is None:
        data.pop("answer", None)
        if label is not None:
            data["expected"] = label
        elif row["reward"] is not None and row["reward"] >= FULL:
            data["expected"] = answer
    request: dict[str, Any] = {"model": row["request_model"], "messages": messages}
    request |= {name: row[name] for name in PARAMETERS if row[name] is not None}
    if tools := _json(row["tools"]):
        request["tools"] = tools
    # The prompt apart: the same question under another version of the prompt is the same task.
    same = json.dumps([message for message in messages if message.get("role") not in ("system", "developer")])
    identity = hashlib.sha256(same.encode()).hexdigest()[:12]
    group = hashlib.sha256(json.dumps(asked[-1].get("content")).encode()).hexdigest()[:12]
    return LoggedTask(identity, data, group, request)


def _made_for(episode: str, known: Mapping[str, Task]) -> dict[str, Any]:
    """The data of the task that the runner made the episode for."""
    from optimize.apo.examples import RUN_EPISODE

    named = RUN_EPISODE.fullmatch(episode)
    task = known.get(named.group(1)) if named else None
    return {} if task is None else dict(task.data)


def answer_of(message: Mapping[str, Any]) -> str:
    """The text of an assistant's message; its tool calls as JSON where it has no text."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if content:
        return str(content)
    calls = message.get("tool_calls")
    return json.dumps([call.get("function") for call in calls]) if calls else ""


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def save(logged: Logged, path: Path) -> None:
    """Keep the tasks for a resumed job: the traffic goes on meanwhile."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [json.dumps({"notes": logged.notes}), *(json.dumps(asdict(task)) for task in logged.tasks)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n")
    temporary.replace(path)


def load(path: Path) -> Logged | None:
    """What `save` kept; None where there is nothing."""
    if not path.is_file():
        return None
    head, *lines = path.read_text().splitlines()
    return Logged([LoggedTask(**json.loads(line)) for line in lines], tuple(json.loads(head)["notes"]))


def models(tasks: Sequence[LoggedTask]) -> str:
    """The models that the calls were sent to, most used first."""
    return ", ".join(name for name, _ in Counter(str(task.request["model"]) for task in tasks).most_common())

"""`ratchet export` and `ratchet import`: episodes to files and back, of a running server or a closed store."""

import contextlib
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from collector.cli import AsJson, DataDir, Url, connect
from collector.client import Client
from collector.console import command, emit_json, stderr
from collector.errors import BadInput

FORMATS = ("jsonl", "parquet", "hf", "otlp")
FORMS = ("sft", "preference", "prompt-completion", "trajectory")
DEFAULT_FOLDER = Path("ratchet-export")
_PAGE = 100
_BATCH_BYTES = 8 << 20
_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@command
def export(
    kind: Annotated[str, typer.Option("--format", help="jsonl, parquet, hf (a datasets folder) or otlp.")] = "jsonl",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File, or folder for parquet and hf (ratchet-export); -: stdout.")
    ] = None,
    form: Annotated[str, typer.Option(help="Of hf: sft, preference, prompt-completion or trajectory.")] = "sft",
    slot: Annotated[str | None, typer.Option(help="Only episodes that this slot served.")] = None,
    version: Annotated[int | None, typer.Option(help="Only episodes that this version served.")] = None,
    min_reward: Annotated[
        float | None, typer.Option(help="Lowest reward; without one, an episode is left out.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Begun since then: 2026-01-31T12:00:00Z, or an age: 24h, 7d.")
    ] = None,
    episodes: Annotated[str | None, typer.Option(help="Only these ids, separated by commas.")] = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Write episodes to a file: with everything (jsonl, parquet, otlp), or as rows to train on (hf)."""
    if kind not in FORMATS:
        raise BadInput(f"--format must be one of {', '.join(FORMATS)}", param="format")
    if form not in FORMS:
        raise BadInput(f"--form must be one of {', '.join(FORMS)}", param="form")
    filters: dict[str, Any] = {"slot": slot, "version": version, "min_reward": min_reward}
    filters["since_ns"] = None if since is None else _since(since)
    if episodes is not None:
        if any(value is not None for value in filters.values()):
            raise BadInput("--episodes names the episodes: give no other filter with it", param="episodes")
        filters = {"episodes": [one.strip() for one in episodes.split(",") if one.strip()]}
    with connect(url, data_dir) as client, _progress("episodes") as step:
        done = _write(kind, form, out, _all(client, filters, step))
    to_stdout = kind in ("jsonl", "otlp") and out in (None, Path("-"))
    if as_json and not to_stdout:
        emit_json(done)
    else:
        stderr.print(_told("wrote", done), highlight=False)


def _all(client: Client, filters: Mapping[str, Any], step: Any) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        found = client.export(_PAGE, cursor, **filters)
        for episode in found["episodes"]:
            yield episode
            step()
        cursor = found["next"]
        if cursor is None:
            return


def _write(kind: str, form: str, out: Path | None, episodes: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Everything to its place; {"path", ...counts}."""
    # The formats need Arrow: only who exports waits for it.
    if kind == "parquet":
        from collector.formats import parquet

        folder = out or DEFAULT_FOLDER
        spans, rewards = parquet.write(_folder(folder), episodes)
        return {"path": str(folder), "spans": spans, "rewards": rewards}
    if kind == "hf":
        from collector.formats import hf

        folder = out or DEFAULT_FOLDER
        rows, left = hf.write(_folder(folder), episodes, next(one for one in hf.FORMS if one == form))
        return {"path": str(folder), "form": form, "rows": rows, "left_out": dict(left)}
    from collector.formats import jsonl, otlp

    line = jsonl.line if kind == "jsonl" else otlp.line
    count = 0
    with _sink(out) as sink:
        for episode in episodes:
            sink.write(line(episode))
            count += 1
    return {"path": "-" if out is None else str(out), "episodes": count}


def _folder(path: Path) -> Path:
    if path.exists() and not path.is_dir():
        raise BadInput(f"--out: {path} is a file; this format writes a folder", param="out")
    return path


@contextlib.contextmanager
def _sink(out: Path | None) -> Iterator[Any]:
    """Standard output, or a file that appears once it is whole."""
    if out is None or out == Path("-"):
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    if out.is_dir():
        raise BadInput(f"--out: {out} is a folder; this format writes a file", param="out")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as sink:
            yield sink
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


@command
def import_(
    file: Annotated[Path, typer.Argument(help="A file or folder: .jsonl, .json, .parquet, .gz.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--format", help="jsonl, parquet, otlp, langfuse, phoenix, langsmith or openai; else seen by itself."
        ),
    ] = None,
    url: Url = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Take in episodes: our own exports, OTLP, Langfuse, Phoenix, LangSmith, or plain OpenAI logs. The same file twice
    adds nothing. Exit 1 when some records could not be read; the others are in."""
    from collector.formats.reader import Outcome, read

    outcome, totals = Outcome(), Counter({"spans": 0, "rewards": 0, "known": 0})
    with connect(url, data_dir) as client, _progress("rows") as step:
        for bundle in read(file, outcome, kind):
            for spans, rewards in _chunks(bundle.spans, bundle.rewards):
                totals.update(client.import_rows(spans, rewards))
                step(len(spans) + len(rewards))
        client.flush()
    done = {**totals, "records": dict(outcome.records), "bad": outcome.bad, "faults": outcome.faults}
    if as_json:
        emit_json(done)
    else:
        for fault in outcome.faults:
            stderr.print(f"[yellow]left out[/] {fault}", highlight=False, soft_wrap=True)
        stderr.print(_told("took in", {**totals, "bad": outcome.bad}), highlight=False)
    if not outcome.records and not outcome.bad:
        raise BadInput(f"{file} holds no record", param="file")
    if outcome.bad:
        raise typer.Exit(1 if outcome.records else 2)


def _chunks(
    spans: list[dict[str, Any]], rewards: list[dict[str, Any]]
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The rows in parts that fit into a request."""
    part: list[dict[str, Any]] = []
    size = 0
    for row in spans:
        part.append(row)
        size += len(orjson.dumps(row))
        if size >= _BATCH_BYTES:
            yield part, []
            part, size = [], 0
    if part or rewards:
        yield part, rewards


def _since(text: str) -> int:
    """Nanoseconds of a moment, or of an age before now."""
    age = _AGE.fullmatch(text.strip())
    if age is not None:
        return max(0, time.time_ns() - int(float(age[1]) * _SECONDS[age[2]] * 1e9))
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise BadInput(f"--since: {text!r} is neither a time nor an age such as 24h", param="since") from None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0, int(moment.timestamp() * 1_000_000_000))


def _told(verb: str, done: Mapping[str, Any]) -> str:
    shown = [f"{value} {name}" for name, value in done.items() if name not in ("path", "form", "left_out")]
    left = [f"{count} {why}" for why, count in (done.get("left_out") or {}).items()]
    where = f" to {done['path']}" if done.get("path", "-") != "-" else ""
    return f"{verb} {', '.join(shown)}{where}" + (f" (left out: {', '.join(left)})" if left else "")


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Any]:
    """A counter on standard error, where somebody watches."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda number=1: bar.advance(task, number)

"""Long histories: 64 agents that take turns, 20 turns each, 15 KB a call in the mean; what a call takes on disk, beside
the same calls with what is new in each alone.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import duckdb
import orjson

from bench.result import Result
from bench.store.data import calls, text
from bench.store.ingest import folder, settings, write
from collector import archive
from collector.model import Exchange
from collector.service import DATABASE, Collector

_AGENTS, _TURNS = 64, 20
_USED = "SELECT used_blocks * block_size FROM pragma_database_size()"


def measure(result: Result, count: int) -> None:
    """Fill in bytes a call in the journal, the live file and the archive, whole and by increments."""
    pairs = list(_conversations(count))
    whole = _sizes([one for one, _ in pairs])
    news = _sizes([replace(one, input_messages=new) for one, new in pairs])
    result.notes["history_body_bytes_mean"] = sum(len(one.input_messages or "") for one, _ in pairs) // count
    result.notes["history_news_bytes_mean"] = sum(len(new) for _, new in pairs) // count
    for place in whole:
        result.measures[f"history_{place}_bytes_per_call"] = whole[place]
        result.measures[f"history_{place}_x_increments"] = whole[place] / news[place]


def _conversations(count: int) -> Iterator[tuple[Exchange, str]]:
    """Each call, and those of its messages that no earlier call of its episode had."""
    rng = random.Random(3)
    told: list[list[dict[str, str]]] = [[] for _ in range(_AGENTS)]
    turns = [rng.randrange(_TURNS) for _ in range(_AGENTS)]
    for number, like in enumerate(calls(count)):
        agent = rng.randrange(_AGENTS)
        messages = told[agent]
        if not messages or turns[agent] % _TURNS == 0:
            messages[:] = [{"role": "system", "content": text(rng, 2500)}]
        before = len(messages) if len(messages) > 1 else 0
        messages.append({"role": "user", "content": text(rng, rng.randint(400, 1000))})
        answer = {"role": "assistant", "content": text(rng, rng.randint(200, 800))}
        sent = orjson.dumps(messages).decode()
        messages.append(answer)
        episode = f"ep-{agent}-{turns[agent] // _TURNS}"
        turns[agent] += 1
        # The assistant's message before counts as new: the call that gave it has it in its answer, not in its history.
        new = orjson.dumps(messages[max(0, before - 1) : -1]).decode()
        said = orjson.dumps([answer]).decode()
        one = replace(like, episode_id=episode, input_messages=sent, output_messages=said, tools=None)
        yield replace(one, start_ns=like.start_ns + number), new


def _sizes(spans: Sequence[Exchange]) -> dict[str, float]:
    with folder() as data_dir:
        journalled = write(data_dir, spans)
        collector = Collector(settings(data_dir), background=False)
        collector.close()
        live = (data_dir / DATABASE).stat().st_size
        with duckdb.connect(str(data_dir / DATABASE), read_only=True) as connection:
            ((used,),) = connection.execute(_USED).fetchall()
        archived = _archive(data_dir)
    sizes = {"journal": journalled, "live_used": used, "live_file": live, "archive": archived}
    return {place: size / len(spans) for place, size in sizes.items()}


def _archive(data_dir: Path) -> int:
    """Bytes of the day's folder, the journal's segments taken for those of a day that is over."""
    journal = data_dir / "journal"
    day = f"{(archive.today() - 3) * 86_400_000_000_000:019d}"
    for number, path in enumerate(sorted(journal.glob("*.ndjson"))):
        path.rename(journal / f"{int(day) + number:019d}-{path.name.partition('-')[2]}")
    (data_dir / DATABASE).unlink()
    collector = Collector(settings(data_dir), background=False)
    found = collector.keeper.compact()
    collector.close()
    return int(found["bytes"])

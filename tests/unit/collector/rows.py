"""Short hands for tests of the collector."""

import json
from pathlib import Path
from typing import Any

from collector.journal import Journal
from collector.model import Exchange
from collector.service import Collector
from collector.settings import Settings


def call(number: int, **fields: Any) -> Exchange:
    """The `number`-th call of episode "ep-a" unless told otherwise."""
    given: dict[str, Any] = {
        "span_id": f"{number:016x}",
        "trace_id": f"{1:032x}",
        "episode_id": "ep-a",
        "episode_source": "url",
        "start_ns": 1_000 + number,
        "end_ns": 2_000 + number,
        "operation": "chat",
        "route": "/v1/chat/completions",
        "status": "ok",
        "request_model": "m",
        "response_id": f"chatcmpl-{number}",
        "input_messages": json.dumps([{"role": "user", "content": f"question {number}"}]),
        "output_messages": json.dumps([{"role": "assistant", "content": f"answer {number}"}]),
    }
    return Exchange(**{**given, **fields})


def settings(data_dir: Path, **sections: Any) -> Settings:
    """Settings of a data directory."""
    store = {"data_dir": str(data_dir), **sections.pop("store", {})}
    return Settings.model_validate({"store": store, **sections})


def write(data_dir: Path, *bodies: Any, role: str = "w0") -> None:
    """Journal events as a writer that ends at once: dataclass instances of calls, or (event, body)."""
    journal = Journal(data_dir / "journal", role)
    for body in bodies:
        if isinstance(body, tuple):
            journal.append(*body)
        else:
            journal.append("span", body)
    journal.close()


def scalar(collector: Collector, sql: str) -> Any:
    """The one value of a query."""
    return collector.query(sql).json()["rows"][0][0]

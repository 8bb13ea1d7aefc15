"""The raw tables of a store whose server has ended, against what was acknowledged while it ran."""

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from collector.client import Local
from collector.errors import Conflict
from collector.maintenance import rebuild, verify
from tests.faults import figures, processes
from tests.faults.traffic import Traffic
from tests.unit.collector.rows import settings

_ALL = 10_000_000


def keys(local: Local, sql: str) -> list[str]:
    """The first column, as text."""
    return [str(row[0]) for row in local.query(sql, _ALL)["rows"]]


def opened(data_dir: Path) -> Local:
    """The store, once whoever was killed has let go of it."""
    found: list[Local] = []

    def free() -> bool:
        with contextlib.suppress(Conflict):
            found.append(Local(data_dir, settings(data_dir)))
        return bool(found)

    processes.until(free, 30, "the store is free")
    return found[0]


def settle(drill: str, data_dir: Path, traffic: Traffic, old: Collection[str], *, kills: int = 0, **notes: Any) -> None:
    """Nothing acknowledged is missing and nothing is there twice, in each table; journal and store agree; and a store
    made anew from the journal has the same rows. `old`: spans that were written to the journal by hand."""
    config = settings(data_dir)
    local = opened(data_dir)
    spans = traffic.spans | set(old)
    told = [
        figures.account(f"{drill}_{name}", acknowledged, keys(local, sql), kills=kills, **more)
        for name, acknowledged, sql, more in (
            ("spans", spans, "SELECT span_id FROM spans", {"sent": traffic.sent, "of_earlier_days": len(old), **notes}),
            ("payloads", spans, "SELECT span_id FROM payloads_v", {}),
            ("rewards", traffic.rewards, "SELECT reward_id FROM rewards", {}),
            ("promotions", set(map(str, traffic.revisions)), "SELECT revision FROM deployments", {}),
        )
    ]
    report = verify(data_dir / "journal", local)
    local.close()
    print("\n" + "\n".join(map(str, told)))
    assert [(one.lost, one.doubled) for one in told] == [(0, 0)] * len(told)
    assert told[0].stored <= traffic.sent + len(old)
    assert report.ok, report
    first = rebuild(config)
    assert rebuild(config) == first
    assert first["span"][0] == told[0].stored

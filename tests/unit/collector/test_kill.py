"""kill -9 in the middle of writing and of loading: what was acknowledged is there, once."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from collector.service import Collector
from tests.unit.collector.rows import call, settings, write

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

WRITER = """
import sys
from pathlib import Path
from collector.journal import Journal
from tests.unit.collector.rows import call
start = int(sys.argv[2])
journal = Journal(Path(sys.argv[1]), "w0", seal_seconds=0.02)
number = start
while True:
    journal.append("span", call(number, tools="x" * (number % 3000)))
    print(f"span {number:016x}", flush=True)
    body = {"reward_id": f"rw-{number}", "target_kind": "episode", "target_id": "e", "value": 1.0, "ts_ns": number}
    journal.append_durable("reward", body).result()
    print(f"reward rw-{number}", flush=True)
    number += 1
"""

LOADER = """
import sys
from pathlib import Path
from collector.service import Collector
from tests.unit.collector.rows import settings
from collector import loader
loader._BATCH_SEGMENTS = 1
print("loading", flush=True)
Collector(settings(Path(sys.argv[1])), background=False).close()
print("loaded", flush=True)
"""


def stored(data_dir: Path) -> tuple[list[str], list[str]]:
    collector = Collector(settings(data_dir), background=False)
    try:
        spans = collector.query("SELECT span_id FROM spans ORDER BY 1", 1_000_000).json()["rows"]
        rewards = collector.query("SELECT reward_id FROM rewards ORDER BY 1", 1_000_000).json()["rows"]
        payloads = collector.query("SELECT span_id FROM payloads ORDER BY 1", 1_000_000).json()["rows"]
        assert payloads == spans
        return [row[0] for row in spans], [row[0] for row in rewards]
    finally:
        collector.close()


def test_killing_the_writer_loses_and_doubles_nothing_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[str] = []
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", WRITER, str(tmp_path / "journal"), str(turn * 1_000_000)],
            stdout=subprocess.PIPE,
            env=ENVIRONMENT,
            text=True,
        )
        assert process.stdout is not None
        acknowledged += [process.stdout.readline() for _ in range(50)]
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        acknowledged += process.stdout.read().splitlines(keepends=True)
        process.stdout.close()
        process.wait(30)
    told = [line.split() for line in acknowledged if line.endswith("\n")]
    spans, rewards = stored(tmp_path)
    assert len(told) >= 200
    for kind, found in (("span", spans), ("reward", rewards)):
        assert len(found) == len(set(found))
        assert {identifier for what, identifier in told if what == kind} <= set(found)


def test_killing_the_loader_loses_and_doubles_nothing(tmp_path: Path) -> None:
    for segment in range(60):
        write(tmp_path, *(call(segment * 100 + number, tools="x" * 500) for number in range(20)))
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", LOADER, str(tmp_path)], stdout=subprocess.PIPE, env=ENVIRONMENT, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        time.sleep(0.15 + 0.1 * turn)
        process.kill()
        process.stdout.close()
        process.wait(30)
    spans, _ = stored(tmp_path)
    assert spans == sorted(f"{segment * 100 + number:016x}" for segment in range(60) for number in range(20))

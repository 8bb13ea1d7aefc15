"""Adapters swapped under load, for real: the built-in engine, the proxy, the collector, and calls all the while."""

import contextlib
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

pytest.importorskip("torch", reason="the engine needs the extra `engine`")

from optimize.rl.engine import Engine
from optimize.rl.model import LanguageModel
from tests.served import Served, served
from tests.unit.optimize.rl.conftest import byte_tokenizer, tiny_gemma
from tests.unit.optimize.rl.conftest import served as serving
from tests.unit.optimize.rl.test_adapters import made

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.timeout(600),
]
SWAPS = int(os.environ.get("RATCHET_SWAPS", "8"))


@contextlib.contextmanager
def two_adapters(home: Path) -> Iterator[Served]:
    """`ratchet serve` before an engine with a tiny model, and two adapters registered."""
    base, root = home / "tiny", home / "data" / "adapters"
    tiny_gemma().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    engine = Engine(LanguageModel.load(base), "tiny", adapters_root=root, base=base)
    with serving(engine.app()) as url:
        config = home / "ratchet.yaml"
        entry = {"api_base": f"{url}/v1", "base_model": "tiny", "drain_seconds": 0.5}
        config.write_text(yaml.safe_dump({"engines": [entry]}))
        with served(home / "data", f"{url}/v1", config=config) as running:
            for seed in (1, 2):
                made(root / f"a{seed}", seed=seed)
                (root / f"a{seed}" / "README.md").unlink(missing_ok=True)
                running.client.add_version("lora", kind="adapter", base_model="tiny", path=f"a{seed}")
            running.client.promote("lora", 1)
            yield running


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    """See `two_adapters`."""
    with two_adapters(tmp_path) as running:
        yield running


class Load:
    """Threads that talk without end: new episodes, each of two calls."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failed: list[str] = []
        self.seen: dict[str, set[str]] = defaultdict(set)
        self.first: dict[str, float] = {}
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._talk, args=(n,)) for n in range(3)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _talk(self, number: int) -> None:
        count = 0
        with httpx.Client(timeout=30, trust_env=False) as client:
            while not self._over.is_set():
                count += 1
                for _ in range(2):
                    self._call(client, f"t{number}-{count}")

    def _call(self, client: httpx.Client, episode: str) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0}
        answer = client.post(f"{self.url}/e/{episode}/v1/chat/completions", json=body)
        if answer.status_code != 200:
            self.failed.append(answer.text)
            return
        version = answer.headers["x-ratchet-versions"]
        assert answer.json()["model"].startswith(version + "-"), answer.text
        self.seen[episode].add(version)
        self.first.setdefault(version, time.monotonic())


def swap_under_load(server: Served, count: int) -> tuple[list[float], Load]:
    """Swap one version for the other, `count` times: seconds from each promotion until its version first answered."""
    delays = []
    with Load(server.url) as load:
        for swap in range(count):
            version = 2 - swap % 2
            load.first.clear()
            began = time.monotonic()
            server.client.promote("lora", version)
            deadline = began + 20
            while f"lora@{version}" not in load.first:
                assert time.monotonic() < deadline, "the new version never answered"
                time.sleep(0.002)
            delays.append(load.first[f"lora@{version}"] - began)
    return delays, load


def test_adapters_are_swapped_under_load_without_a_failed_call_or_a_mixed_episode(server: Served) -> None:
    delays, load = swap_under_load(server, SWAPS)
    print(f"\n{SWAPS} swaps: first answer after {sorted(delays)[len(delays) // 2]:.3f} s, at most {max(delays):.3f} s")
    assert load.failed == []
    assert len(load.seen) > SWAPS and all(len(versions) == 1 for versions in load.seen.values())


def test_a_version_that_its_engine_refuses_gets_no_traffic(server: Served, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "adapters" / "bad"
    made(folder, seed=3)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    (folder / "README.md").unlink(missing_ok=True)
    number = server.client.add_version("lora", kind="adapter", base_model="tiny", path="bad")["version"]
    answer = httpx.post(f"{server.url}/api/slots/lora/promote", json={"version": number}, trust_env=False)
    assert answer.status_code == 502 and "use_dora" in answer.json()["error"]["message"]
    assert next(slot for slot in server.client.slots() if slot["slot"] == "lora")["live"] == {"1": 1.0}

"""An adapter version that is on trial: served for pinned calls, though no traffic goes to it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from collector import bodies
from collector.engines import Engines
from collector.errors import BadInput, NotFound
from collector.service import Collector
from tests.unit.collector.rows import settings


class Fake:
    """An engine in memory."""

    base_model = "tiny"

    def __init__(self) -> None:
        self.names: set[str] = set()

    def models(self) -> list[str]:
        return sorted(self.names)

    def load(self, name: str, path: Path) -> None:
        self.names.add(name)

    def unload(self, name: str) -> None:
        self.names.discard(name)

    def logprobs(self, name: str, prompt: str, tokens: int) -> tuple[str, list[float]]:
        return "", [-0.1]

    def close(self) -> None: ...


@pytest.fixture
def engine() -> Fake:
    return Fake()


@pytest.fixture
def collector(tmp_path: Path, engine: Fake) -> Iterator[Collector]:
    entry = {"api_base": "http://127.0.0.1:9/v1", "base_model": "tiny"}
    made = Collector(settings(tmp_path, engines=[entry]), background=False)
    made._engines.close()
    made._engines = Engines([engine])
    folder = tmp_path / "adapters" / "one"
    folder.mkdir(parents=True)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "adapter_model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "adapter_config.json").write_text("{}")
    made.add_version("lora", bodies.VersionBody(kind="adapter", base_model="tiny", path="one"))
    made.add_version("words", bodies.VersionBody(kind="prompt", template="Be brief."))
    yield made
    made.close()


def test_a_version_on_hold_is_served_and_stays_until_its_time_is_over(collector: Collector, engine: Fake) -> None:
    name = collector.hold("lora", bodies.HoldBody(version=1, seconds=1000))
    assert name.startswith("lora@1-") and engine.names == {name}
    collector._settle()
    assert engine.names == {name}
    assert collector.slots()[0]["live"] == {}
    collector._held["lora", 1] = 0.0
    collector._settle()
    assert engine.names == set()


def test_what_cannot_be_held_is_said(collector: Collector) -> None:
    with pytest.raises(BadInput, match="holds prompts"):
        collector.hold("words", bodies.HoldBody(version=1))
    with pytest.raises(NotFound):
        collector.hold("lora", bodies.HoldBody(version=2))
    collector._engines = Engines([])
    with pytest.raises(BadInput, match="no engine of the base model tiny"):
        collector.hold("lora", bodies.HoldBody(version=1))

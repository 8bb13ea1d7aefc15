import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from collector.engines import EngineFailed, Engines, HttpEngine, Served, try_out
from collector.errors import NotFound
from collector.settings import EngineEntry
from optimize.rl.adapter import save
from optimize.rl.batcher import Batcher, Row
from optimize.rl.engine import Engine
from optimize.rl.model import LanguageModel
from optimize.rl.sample import Sampling
from tests.unit.optimize.rl.conftest import served
from tests.unit.optimize.rl.test_adapters import made

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ASK: dict[str, Any] = {"prompt": "abc", "temperature": 0, "max_tokens": 60}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in (1, 2):
        made(tmp_path / "adapters" / f"a{seed}", seed=seed)
        (tmp_path / "adapters" / f"a{seed}" / "README.md").unlink(missing_ok=True)
    return tmp_path / "adapters"


@pytest.fixture
def url(root: Path, tiny_directory: Path) -> Iterator[str]:
    engine = Engine(LanguageModel.load(tiny_directory), "tiny", adapters_root=root, base=tiny_directory)
    with served(engine.app()) as url:
        yield f"{url}/v1"


def post(url: str, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{url}/{path}", json=body, timeout=30, trust_env=False)


def answer(url: str, model: str, **changes: Any) -> str:
    got = post(url, "completions", {**ASK, "model": model, **changes})
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["text"])


def names(url: str) -> list[str]:
    return [entry["id"] for entry in httpx.get(f"{url}/models", trust_env=False).json()["data"]]


def load(url: str, name: str, path: Path) -> httpx.Response:
    return post(url, "load_lora_adapter", {"lora_name": name, "lora_path": str(path)})


def test_an_adapter_comes_and_goes_while_the_base_answers_as_before(url: str, root: Path) -> None:
    base = answer(url, "tiny")
    with ThreadPoolExecutor(4) as pool:
        before = [pool.submit(answer, url, "tiny") for _ in range(4)]
        assert load(url, "one", root / "a1").json() == {"status": "loaded", "lora_name": "one"}
        assert load(url, "two", root / "a2").status_code == 200
        alone = {name: answer(url, name) for name in ("one", "two")}
        mixed = {name: [pool.submit(answer, url, name) for _ in range(3)] for name in ("tiny", "one", "two")}
        assert {one.result() for one in (*before, *mixed["tiny"])} == {base}
        for name in ("one", "two"):
            assert {one.result() for one in mixed[name]} == {alone[name]}
    assert len({base, *alone.values()}) == 3
    assert names(url) == ["tiny", "one", "two"]
    assert post(url, "unload_lora_adapter", {"lora_name": "one"}).json()["status"] == "unloaded"
    assert names(url) == ["tiny", "two"]
    assert post(url, "completions", {**ASK, "model": "one"}).json()["error"]["code"] == "model_not_found"
    assert (answer(url, "tiny"), answer(url, "two")) == (base, alone["two"])


def test_unloading_waits_for_the_last_answer(url: str, root: Path) -> None:
    load(url, "one", root / "a1")
    whole = answer(url, "one", max_tokens=200)
    got: list[str] = []
    began = threading.Event()

    def stream() -> None:
        with httpx.stream(
            "POST", f"{url}/completions", json={**ASK, "model": "one", "max_tokens": 200, "stream": True}, timeout=30
        ) as response:
            for line in response.iter_lines():
                began.set()
                got.append(line)

    reader = threading.Thread(target=stream)
    reader.start()
    assert began.wait(20)
    assert post(url, "unload_lora_adapter", {"lora_name": "one"}).status_code == 200
    reader.join(20)
    chunks = [orjson.loads(line[6:]) for line in got if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == whole


def test_a_name_is_never_used_for_something_else(url: str, root: Path) -> None:
    load(url, "one", root / "a1")
    expected = answer(url, "one")
    for name in ("one", "tiny"):
        assert load(url, name, root / "a2").status_code == 409
    post(url, "unload_lora_adapter", {"lora_name": "one"})
    assert load(url, "one", root / "a2").status_code == 409
    assert post(url, "unload_lora_adapter", {"lora_name": "one"}).status_code == 404
    assert load(url, "one", root / "a1").status_code == 200
    assert answer(url, "one") == expected


def test_what_may_not_be_loaded_is_refused_and_named(url: str, root: Path, tmp_path: Path) -> None:
    assert load(url, "x", tmp_path).json()["error"]["param"] == "lora_path"
    assert load(url, "x", root / ".." / "elsewhere").json()["error"]["param"] == "lora_path"
    assert load(url, "a b", root / "a1").json()["error"]["param"] == "lora_name"
    assert post(url, "load_lora_adapter", {"lora_name": "x"}).json()["error"]["param"] == "lora_path"
    (root / "a1" / "adapter_model.safetensors").rename(root / "a1" / "adapter_model.bin")
    assert load(url, "x", root / "a1").status_code == 400
    assert names(url) == ["tiny"]


def test_an_adapter_of_another_base_is_refused(url: str, root: Path, tmp_path: Path, tiny_directory: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_directory.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    model = made(tmp_path / "scratch")
    save(model, root / "mine", base=tiny_directory, method="sft")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    save(model, root / "theirs", base=other, method="sft")
    assert load(url, "mine", root / "mine").status_code == 200
    refused = load(url, "theirs", root / "theirs")
    assert refused.status_code == 400 and "was trained on other" in refused.json()["error"]["message"]


@pytest.fixture
def engine_at() -> Iterator[Callable[[str], HttpEngine]]:
    made: list[HttpEngine] = []

    def make(url: str) -> HttpEngine:
        made.append(HttpEngine(EngineEntry(api_base=url, base_model="tiny")))
        return made[-1]

    yield make
    Engines(made).close()


EngineAt = Callable[[str], HttpEngine]


def test_a_version_is_loaded_and_tried_before_it_is_ready(url: str, root: Path, engine_at: EngineAt) -> None:
    one = Served("tiny", "slot@1-abc", root / "a1")
    engines = Engines([engine_at(url)])
    engines.ready(one)
    engines.ready(one)
    assert names(url) == ["tiny", one.name]
    text, logprobs = engine_at(url).logprobs(one.name, "abc", 8)
    case = {"prompt": "abc", "text": text, "logprobs": logprobs}
    (root / "a1" / "canary.json").write_bytes(orjson.dumps([case]))
    try_out(engine_at(url), one)
    (root / "a1" / "canary.json").write_bytes(orjson.dumps([{**case, "logprobs": [one - 0.2 for one in logprobs]}]))
    with pytest.raises(EngineFailed, match="otherwise than it was trained"):
        engines.ready(one)


def test_engines_are_brought_back_to_what_is_needed(url: str, root: Path, engine_at: EngineAt) -> None:
    one, two = Served("tiny", "s@1-abc", root / "a1"), Served("tiny", "s@2-def", root / "a2")
    engines = Engines([engine_at(url)])
    engines.settle([one, two], [])
    assert names(url) == ["tiny", one.name, two.name]
    engines.settle([two], [one.name, two.name])
    assert names(url) == ["tiny", two.name]
    assert engines.state() == {url: {"error": None, "models": ["s@2-def", "tiny"]}}


def test_an_engine_that_is_away_is_said_and_nothing_is_ready(root: Path, engine_at: EngineAt) -> None:
    away = "http://127.0.0.1:9/v1"
    engines = Engines([engine_at(away)])
    with pytest.raises(EngineFailed, match="is it running"):
        engines.ready(Served("tiny", "s@1-abc", root / "a1"))
    engines.settle([], [])
    assert "is it running" in engines.state()[away]["error"]
    engines.ready(Served("another", "s@1-abc", root / "a1"))


def test_a_row_for_an_adapter_that_left_while_it_was_tokenized_is_not_run(tiny: LanguageModel, root: Path) -> None:
    batcher = Batcher(tiny)
    batcher.start()
    try:
        batcher.attach("gone", tiny.adapters.read(root / "a1")).result(10)
        batcher.detach("gone").result(10)
        with pytest.raises(NotFound):
            batcher.submit([Row([5], Sampling(1, 0.0, 1.0, None, (), None), lambda _: None, adapter="gone")])
    finally:
        batcher.close()

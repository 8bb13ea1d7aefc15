"""The whole of `ratchet optimize rl` on a tiny model: engine, proxy, store, an agent's processes, training, gate."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("trl", reason="training needs the extra `rl`")

from collector import settings
from collector.client import Remote
from collector.errors import BadInput
from optimize.rl.commands import optimize_app
from optimize.rl.engine import Engine
from optimize.rl.gather import gather
from optimize.rl.job import RlResult, run_rl
from optimize.rl.model import LanguageModel
from optimize.rl.spec import RlSpec, check
from tests.served import Served, served
from tests.unit.optimize.rl.conftest import byte_tokenizer, tiny_gemma
from tests.unit.optimize.rl.conftest import served as serving

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.timeout(300),
]
AGENT = """
import json, os, sys, urllib.request, zlib
task = json.loads(sys.stdin.readline())
seed = zlib.crc32("-".join(os.environ["RATCHET_EPISODE"].split("-")[2:4]).encode())  # by task and replicate
body = {"model": os.environ["OPENAI_MODEL"], "max_tokens": 2, "messages": [{"role": "user", "content": task["q"]}],
        "seed": seed, "temperature": float(os.environ.get("OPENAI_TEMPERATURE", "0"))}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", json.dumps(body).encode(),
                                 {"content-type": "application/json", "authorization": "Bearer x"})
print(json.loads(urllib.request.urlopen(request).read())["choices"][0]["message"]["content"])
"""


class World:
    """A server before an engine with a tiny model, tasks, and an agent that asks it."""

    def __init__(self, server: Served, home: Path, base: Path) -> None:
        self.server, self.home, self.base = server, home, base

    @property
    def client(self) -> Remote:
        return self.server.client

    def spec(self, **options: Any) -> RlSpec:
        return RlSpec(**{
            "model": "tiny", "slot": "tiny", "tasks": "tasks.jsonl", "command": (sys.executable, "agent.py"),
            "grader": r"regex:^[ -~]", "samples": 4, "holdout": 12, "validation": 4, "epochs": 6.0, "batch_size": 8,
            "learning_rate": 1e-2, "concurrency": 3, "cwd": str(self.home), **options,
        })  # fmt: skip

    def run(self, job_id: str = "job-one", **options: Any) -> RlResult:
        config = settings.load(flags={"store.data_dir": str(self.server.data_dir)})
        work = run_rl(self.spec(**options), self.client, self.server.url, self.base, settings=config, job_id=job_id)
        return asyncio.run(work)

    def live(self) -> Any:
        return next((slot["live"] for slot in self.client.slots() if slot["slot"] == "tiny"), {})


def kept(url: str) -> Iterator[dict[str, str]]:
    """Tasks whose right answer begins as the base model's own does."""
    for n in range(24):
        letter = "abcdefghijklmnopqrstuvwxyz"[n]
        body = {"model": "tiny", "max_tokens": 2, "temperature": 0, "messages": [{"role": "user", "content": letter}]}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, trust_env=False).json()
        yield {"id": f"k{n}", "q": letter, "start": answer["choices"][0]["message"]["content"].strip()[:1]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("rl")
    base, root = home / "tiny", home / "data" / "adapters"
    tiny_gemma().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    (home / "agent.py").write_text(AGENT)
    (home / "tasks.jsonl").write_text(
        "".join(json.dumps({"id": f"t{n}", "q": "abcdefghijklmnopqrstuvwxyz"[n]}) + "\n" for n in range(24))
    )
    engine = Engine(LanguageModel.load(base), "tiny", adapters_root=root, base=base)
    with serving(engine.app()) as url:
        (home / "kept.jsonl").write_text("".join(json.dumps(one) + "\n" for one in kept(url)))
        config = home / "ratchet.yaml"
        config.write_text(yaml.safe_dump({"engines": [{"api_base": f"{url}/v1", "base_model": "tiny"}]}))
        with served(home / "data", f"{url}/v1", config=config) as running:
            yield World(running, home, base)


def test_a_collapsed_training_changes_nothing_that_is_served(world: World) -> None:
    """The base model does all that is asked of it here; training at a mad rate can only break it."""
    mad = {"tasks": "kept.jsonl", "grader": "regex:^{start}", "learning_rate": 2.0, "epochs": 12.0}
    result = world.run(job_id="job-bad", **mad)
    assert (result.verdict, result.promoted) == ("reject", False), result
    assert world.live() == {}


def test_an_agent_learns_and_its_adapter_goes_live_on_held_out_evidence(world: World) -> None:
    good = {"job_id": "job-good", "method": "sft", "credit": "leave_one_out"}
    result = world.run(**good)
    assert result.rounds[0].rows["calls"] == 8 * 4
    assert "no_ids" not in result.rounds[0].rows and "mismatch" not in result.rounds[0].rows
    assert result.verdict == "promote", result
    assert result.promoted and result.gate is not None and result.gate.after > result.gate.before
    assert world.live() == {str(result.version): 1.0}
    version = world.client.version("tiny", int(result.version or 0))
    assert version["job_id"] == "job-good" and version["metrics"]["rows"] > 0
    paid = [one for one in world.client.evaluations() if one["job_id"] == "job-good"]
    assert len(paid) == 24

    # The same job again repeats no rollout and no training, and says the same.
    spans = world.client.query("select count(*) from spans_v")["rows"]
    again = world.run(**good)
    world.client.flush()
    assert (again.verdict, again.version, again.rollouts) == (result.verdict, result.version, 0)
    assert world.client.query("select count(*) from spans_v")["rows"] == spans


def test_stored_episodes_train_an_adapter_that_gets_no_traffic_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command line: one JSON object on stdout, exit 1 since nothing is proven."""
    before = world.live()
    monkeypatch.setenv("RATCHET_URL", world.server.url)
    asked = ["--model", str(world.base), "--from-traces", "--method", "kto", "--credit", "group", "--json"]
    told = CliRunner().invoke(optimize_app, ["rl", *asked])
    assert told.exit_code == 1, told.output
    result = json.loads(told.stdout)
    assert (result["verdict"], result["promoted"], result["slot"]) == ("shadow", False, "tiny")
    assert result["version"] is not None and result["rounds"][0]["rows"]["rows"] > 10
    assert world.live() == before
    world.client.flush()
    stored = world.client.job(result["job_id"])
    assert (stored["kind"], stored["status"]) == ("rl", "done")


def test_what_the_engine_said_is_stored_and_read_back(world: World) -> None:
    found = gather(world.client, {"reward": 1.0}, models={"tiny"})
    known = [call for call in found.calls if call.completion_ids is not None and call.logprobs is not None]
    assert len(known) == len(found.calls) > 40
    assert {call.version for call in known} >= {"tiny"}
    assert all(len(call.logprobs or ()) == len(call.completion_ids or ()) <= 2 for call in known)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"method": "ppo"}, "method"),
        ({"credit": "magic"}, "credit"),
        ({"promote": "always"}, "promote"),
        ({"command": ()}, "tasks"),
        ({"tasks": None}, "tasks"),
        ({"tasks": None, "command": (), "from_traces": True, "rounds": 2}, "rounds"),
        ({"slot": "a b"}, "slot"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    good = {"model": "m", "slot": "s", "tasks": "t.jsonl", "command": ("python",)}
    with pytest.raises(BadInput) as caught:
        check(RlSpec(**{**good, **change}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--from-traces", "--method", "ppo"],
        ["--tasks", "missing.jsonl", "--", "python"],
        ["--from-traces", "--holdout", "many"],
    ],
)
def test_the_command_says_what_is_wrong_before_anything_runs(arguments: list[str]) -> None:
    told = CliRunner().invoke(optimize_app, ["rl", "--model", "m", *arguments])
    assert told.exit_code == 2 and "error" in told.output


def test_a_spec_survives_its_journal() -> None:
    spec = RlSpec(model="m", slot="s", tasks="t.jsonl", command=("python", "a.py"), roles=("x",))
    assert RlSpec.from_dict(json.loads(json.dumps(spec.as_dict()))) == spec

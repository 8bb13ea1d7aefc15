"""The classic in-process script, with only its import changed."""

import asyncio
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from collector.client import Local
from collector.errors import BadInput, RatchetError
from optimize.api import _LOOP, APO, FitResult, PromptTemplate, Trainer, rollout
from optimize.fit import datasets
from optimize.function import identity
from tests.fake_upstream import FakeUpstream, Received, Reply, chat

TASKS = [{"question": f"Say {number}.", "expected": str(number)} for number in range(100, 140)]
REWRITE = "You are a helper. Answer CURTLY with the number alone. {question}"


class Client:
    """An OpenAI client, async unless told otherwise, whose model obeys "CURTLY" and whose editor answers in `form`."""

    def __init__(self, form: str = "prose", sync: bool = False) -> None:
        self.form, self.sync = form, sync
        self.calls: Counter[str] = Counter()
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, model: str, messages: list[dict[str, str]], **_: Any) -> Any:
        answer = self._answer(model, messages[-1]["content"])
        return answer if self.sync else _later(answer)

    def _answer(self, model: str, text: str) -> Any:
        self.calls[model] += 1
        if model == "m":
            number = re.findall(r"\d+", text)[-1]
            said = number if "CURTLY" in text else f"The number is {number}, I think."
        elif "Which weaknesses" in text:
            said = "It does not say how short the answer must be."
        else:
            unit = {"op": "add", "text": "Answer CURTLY with the number alone.", "failures": [1, 2]}
            said = json.dumps([unit]) if self.form == "json" else f"Here is the new prompt:\n{REWRITE}"
        usage = SimpleNamespace(total_tokens=12, prompt_tokens=10, completion_tokens=2)
        choice = SimpleNamespace(message=SimpleNamespace(content=said))
        return SimpleNamespace(choices=[choice], usage=usage, id="r-1", model="scripted")


async def _later(answer: Any) -> Any:
    await asyncio.sleep(0)
    return answer


def async_agent(client: Client) -> Callable[..., Any]:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        messages = [{"role": "user", "content": prompt_template.format(**task)}]
        reply = await client.chat.completions.create(model="m", messages=messages)
        return float(reply.choices[0].message.content == task["expected"])

    return agent


def sync_agent(client: Client) -> Callable[..., Any]:
    @rollout
    def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        messages = [{"role": "user", "content": prompt_template.format(**task)}]
        reply = client.create(model="m", messages=messages)
        return float(reply.choices[0].message.content == task["expected"])

    return agent


def prompt(text: str = "You are a helper. {question}") -> PromptTemplate:
    return PromptTemplate(text=text, engine="f-string")


@pytest.mark.parametrize("form", ["prose", "json"])
@pytest.mark.parametrize("engine", ["factorial", "beam", "gepa"])
def test_the_classic_script_gets_a_better_prompt_with_every_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, engine: str
) -> None:
    client = Client(form)
    trainer = Trainer(
        algorithm=APO(inference_client=client, model="editor", engine=engine, budget=120),
        initial_resources={"prompt_template": prompt()},
        data_dir=tmp_path / "data",
    )
    result = trainer.fit(agent=async_agent(client), train_dataset=TASKS)
    assert isinstance(result, FitResult)
    assert (result.verdict, "CURTLY" in str(result.best_prompt)) == ("promote", True)
    assert result.best_prompt.format(question="x").count("{") == 0
    assert result.holdout is not None
    assert (result.holdout["n"], result.holdout.before, result.holdout["after"]) == (16, 0.0, 1.0)
    assert result.report_path.is_file()
    assert str(result.report_path).startswith(str(tmp_path / "data"))
    printed = capsys.readouterr().out
    assert str(result.best_prompt) in printed
    assert result.report_path.name in printed.replace("\n", "")
    assert client.calls["editor"] > 0
    assert trainer.algorithm.get_best_prompt() == result.best_prompt


def test_positional_forms_sync_agent_and_sync_client(tmp_path: Path) -> None:
    client = Client("json", sync=True)
    trainer = Trainer(APO(client, budget=60), {"prompt_template": prompt()}, data_dir=tmp_path / "data")
    result = trainer.fit(sync_agent(client), TASKS[:24], TASKS[24:])
    assert (result.verdict, result.holdout and result.holdout.n) == ("promote", 16)


def test_parameters_of_the_script_that_mean_nothing_here_are_taken(tmp_path: Path) -> None:
    client = Client()
    algorithm = APO(
        client,
        gradient_model="a",
        apply_edit_model="b",
        val_batch_size=10,
        gradient_batch_size=4,
        beam_width=2,
        branch_factor=2,
        beam_rounds=2,
        diversity_temperature=1.0,
        _poml_trace=True,
        budget=120,
    )
    resources = {"prompt_template": prompt()}
    trainer = Trainer(
        algorithm=algorithm, n_runners=4, initial_resources=resources, adapter=object(), data_dir=tmp_path / "data"
    )
    assert algorithm.model == "b"
    assert trainer.fit(agent=async_agent(client), train_dataset=TASKS, val_dataset=TASKS[:12]).verdict == "promote"
    with pytest.raises(BadInput, match="beam_depth"):
        APO(client, beam_depth=3)
    with pytest.raises(BadInput, match="n_runnerz"):
        Trainer(algorithm, resources, n_runnerz=1)


def test_rollouts_rewards_and_the_optimizers_calls_are_in_the_local_store(tmp_path: Path) -> None:
    client = Client("json")
    result = Trainer(
        APO(client, model="editor", budget=40), {"prompt_template": prompt()}, data_dir=tmp_path / "data"
    ).fit(async_agent(client), TASKS)
    store = Local(tmp_path / "data")
    try:
        spans = store.query("select operation, status, count(*) from spans_v group by all order by all")["rows"]
        assert spans == [["chat", "ok", client.calls["editor"]], ["invoke_agent", "ok", result.details["rollouts"]]]
        rewards = store.query("select count(*), min(value), max(value) from rewards_v")["rows"]
        assert rewards == [[result.details["rollouts"], 0.0, 1.0]]
        (job,) = store.jobs()
        assert (job["status"], job["result"]["verdict"]) == ("done", "promote")
        assert store.versions("agent-prompt_template")[1]["template"] == str(result.best_prompt)
        assert store.versions("agent-prompt_template")[1]["live"] == 1.0
    finally:
        store.close()


class Died(BaseException):
    """Stands for a death that runs no handler of ours."""


def test_a_script_that_died_goes_on_where_it_was_when_it_is_run_again(tmp_path: Path) -> None:
    client = Client("json")
    calls: list[str] = []
    limit = [30]  # not a plain value: an agent that refers to another number is another agent

    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        text = prompt_template.format(**task)
        if len(calls) >= limit[0]:
            raise Died
        calls.append(text)
        return float("CURTLY" in text)

    def fit() -> FitResult:
        return Trainer(APO(client, budget=60), {"prompt_template": prompt()}, data_dir=tmp_path, n_runners=1).fit(
            agent, TASKS
        )

    with pytest.raises(Died):
        fit()
    store = Local(tmp_path)
    paid = len(store.evaluations())
    store.close()
    assert paid >= limit[0] - 8
    limit[0] = 1000
    calls.clear()
    result = fit()
    assert result.verdict == "promote"
    assert len(calls) == result.details["rollouts"] - paid
    store = Local(tmp_path)
    keys = Counter((event["version_hash"], event["task_id"], event["replicate"]) for event in store.evaluations())
    assert set(keys.values()) == {1}
    assert [job["status"] for job in store.jobs()] == ["done"]
    store.close()


def test_an_agent_that_always_fails_ends_early_and_says_how(tmp_path: Path) -> None:
    calls = 0

    @rollout
    def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        nonlocal calls
        calls += 1
        return float(prompt_template.format(wrong="x") == "y")

    trainer = Trainer(APO(budget=100), {"prompt_template": prompt()}, data_dir=tmp_path)
    with pytest.raises(RatchetError, match=r"(?s)rollouts failed: crash.*KeyError: 'question'"):
        trainer.fit(agent, TASKS)
    assert calls <= 24


def test_an_agent_that_exits_is_a_crash_and_not_our_end(tmp_path: Path) -> None:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        sys.exit("no more")

    trainer = Trainer(APO(budget=100), {"prompt_template": prompt()}, data_dir=tmp_path)
    with pytest.raises(RatchetError, match=r"crash.*SystemExit: no more"):
        trainer.fit(agent, TASKS)


def test_an_agent_that_returns_nothing_is_told_so(tmp_path: Path) -> None:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> None:
        return None

    trainer = Trainer(APO(budget=100), {"prompt_template": prompt()}, data_dir=tmp_path)
    with pytest.raises(RatchetError, match=r"no_reward.*returned None"):
        trainer.fit(agent, TASKS)


def test_infrastructure_errors_are_tried_again_and_others_not(tmp_path: Path) -> None:
    tries: dict[str, int] = {}

    class APIConnectionError(Exception):
        pass

    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        key = task["question"] + prompt_template.text
        tries[key] = tries.get(key, 0) + 1
        if tries[key] == 1:
            raise APIConnectionError("try again")
        return float("ONLY" in prompt_template.text)

    result = Trainer(APO(budget=40), {"prompt_template": prompt()}, data_dir=tmp_path).fit(agent, TASKS)
    assert not [pair for pair in result.details["pairs"] if pair["after"] is None]
    assert result.verdict == "promote"
    assert min(tries.values()) == 2


def test_a_rollout_over_its_time_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        await asyncio.sleep(60)
        return 1.0

    trainer = Trainer(APO(budget=40), {"prompt_template": prompt()}, data_dir=tmp_path, timeout=0.05)
    with pytest.raises(RatchetError, match="rollouts failed: timeout"):
        trainer.fit(agent, TASKS)


def test_it_works_where_a_loop_runs_already(tmp_path: Path) -> None:
    client = Client("json")

    async def notebook() -> FitResult:
        trainer = Trainer(APO(client, budget=40), {"prompt_template": prompt()}, data_dir=tmp_path)
        return trainer.fit(async_agent(client), TASKS)

    assert asyncio.run(notebook()).verdict == "promote"


@dataclass
class Typed:
    question: str
    expected: str


def test_tasks_may_be_objects_and_other_resources_pass_through(tmp_path: Path) -> None:
    seen: list[Any] = []

    @rollout
    async def agent(task: Typed, prompt_template: PromptTemplate, tool: str) -> float:
        seen.append((task, tool))
        return float("ONLY" in prompt_template.text)

    tasks = [Typed(task["question"], task["expected"]) for task in TASKS]
    resources = {"prompt_template": prompt(), "tool": "a hammer"}
    result = Trainer(APO(budget=40), resources, data_dir=tmp_path).fit(agent, tasks)
    assert all(isinstance(task, Typed) and tool == "a hammer" for task, tool in seen)
    assert result.verdict == "promote"


def test_a_prompt_without_headroom_is_given_back(tmp_path: Path) -> None:
    @rollout
    async def agent(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
        return 1.0

    given = prompt()
    result = Trainer(APO(budget=60), {"prompt_template": given}, data_dir=tmp_path).fit(agent, TASKS)
    assert (result.verdict, result.holdout, result.best_prompt) == ("reject", None, given)
    assert "nothing to gain" in result.reason


def test_what_cannot_work_is_refused_with_the_fix_named(tmp_path: Path) -> None:
    trainer = Trainer(APO(), {"prompt_template": "text"}, data_dir=tmp_path)
    with pytest.raises(BadInput, match="one PromptTemplate"):
        trainer.fit(lambda task, prompt_template: 1.0, TASKS)
    trainer = Trainer(APO(), {"prompt_template": prompt()}, data_dir=tmp_path)
    with pytest.raises(BadInput, match="take a task and prompt_template"):
        trainer.fit(lambda task: 1.0, TASKS)
    with pytest.raises(BadInput, match="too few"):
        trainer.fit(lambda task, prompt_template: 1.0, TASKS[:1])
    with pytest.raises(RatchetError, match="call Trainer"):
        APO().get_best_prompt()


def test_no_task_is_both_searched_on_and_held_out() -> None:
    data = datasets(TASKS, TASKS[:10], 0.4, 0)
    assert (len(data.search), len(data.held)) == (30, 10)
    assert not {task.id for task in data.search} & {task.id for task in data.held}
    same = datasets(TASKS, TASKS, 0.4, 0)
    assert (len(same.search), len(same.held)) == (24, 16)
    twice = datasets([*TASKS, TASKS[0]], [], 0.4, 0)
    assert len({task.id for task in [*twice.search, *twice.held]}) == 41


@pytest.mark.parametrize("sync", [False, True])
def test_the_real_openai_clients_work_with_their_base_url_alone(tmp_path: Path, sync: bool) -> None:
    def model(request: Received) -> Reply:
        text = request.json["messages"][-1]["content"]
        return chat(Client()._answer(request.json["model"], text).choices[0].message.content)

    with FakeUpstream(default=model) as upstream:
        client: Any = (OpenAI if sync else AsyncOpenAI)(base_url=upstream.url, api_key="k")

        async def later(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
            messages = [{"role": "user", "content": prompt_template.format(**task)}]
            reply = await client.chat.completions.create(model="m", messages=messages)
            return float(reply.choices[0].message.content == task["expected"])

        def now(task: dict[str, Any], prompt_template: PromptTemplate) -> float:
            messages = [{"role": "user", "content": prompt_template.format(**task)}]
            reply = client.chat.completions.create(model="m", messages=messages)
            return float(reply.choices[0].message.content == task["expected"])

        trainer = Trainer(
            algorithm=APO(inference_client=client, budget=60),
            initial_resources={"prompt_template": prompt()},
            data_dir=tmp_path,
        )
        result = trainer.fit(agent=rollout(now if sync else later), train_dataset=TASKS)
        again = trainer.fit(agent=rollout(now if sync else later), train_dataset=TASKS[:30])
        assert again.holdout is not None
        if sync:
            client.close()
        else:  # in the loop that opened its connections, as filterwarnings = error wants it
            _LOOP.run(client.close())
    assert (result.verdict, "CURTLY" in str(result.best_prompt)) == ("promote", True)


def test_an_edited_agent_is_another_agent(tmp_path: Path) -> None:
    def made(text: str, model: str = "a") -> str:
        path = tmp_path / "script.py"
        path.write_text(f"model = {model!r}\ndef agent(task, prompt_template):\n    return model, {text}\n")
        space: dict[str, Any] = {}
        exec(compile(path.read_text(), str(path), "exec"), space)
        return identity(space["agent"])

    assert made("1") == made("1")
    assert len({made("1"), made("2"), made("1", model="b")}) == 3

    def closing(model: str) -> Callable[..., Any]:
        return lambda task, prompt_template: model

    assert identity(closing("a")) == identity(closing("a")) != identity(closing("b"))

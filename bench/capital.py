"""The capital city agent, trained for real on the local model: `python -m bench.capital [--seeds 3] [--methods ...]`.

Baseline, prompt only, SFT on gold answers, RFT and GRPO, on the same split into training, validation and held-out
countries. Everything is chosen on validation; each held-out country is asked once, greedily, at the end. With
`--keep FILE` every finished method of a seed is a line there, and is not measured again: a broken run goes on, and
several may measure different seeds at once (`--threads 1`).
"""

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Threads that wait by sleeping: several times faster on a machine with other work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.result import RESULTS, Result
from collector.model import Episode, Step
from examples.capital_city.grader import grade
from optimize import credit
from optimize.dataset import Task, load_tasks, split
from optimize.rl.batcher import Batcher, Delta
from optimize.rl.batcher import Row as Asked
from optimize.rl.calls import Call
from optimize.rl.chat import plain
from optimize.rl.model import LanguageModel, use_threads
from optimize.rl.rows import Report, Row, Rules, build
from optimize.rl.sample import Sampling
from optimize.rl.train import Trained, TrainSpec, train
from optimize.summary import interval

ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "examples" / "capital_city" / "tasks.jsonl"
MODEL = ROOT / "data" / "models" / "gemma-3-270m"
HELD_OUT, VALIDATION, LONGEST = 64, 26, 16
AGENT = "You are a geography helper."
BETTER = "Answer with the name of the capital city alone.\n\nQuestion: Capital of {one}?\nAnswer: {two}\nQuestion: Capital of {three}?\nAnswer: {four}"  # noqa: E501
METHODS = ("baseline", "prompt", "sft", "rft", "grpo")


@dataclass(frozen=True)
class Answer:
    """One sampled answer to a task: ids, the policy's log-probabilities of them, text and reward."""

    task: Task
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    reward: float


class Model:
    """The local model, answering many prompts at once, each as the engine would."""

    def __init__(self, directory: Path, batch: int = 64) -> None:
        self.language = LanguageModel.load(directory)
        self._batch = batch

    def answers(
        self, tasks: Sequence[Task], *, temperature: float, count: int = 1, adapter: str | None = None,
        system: str = AGENT, seed: int = 0,
    ) -> list[Answer]:  # fmt: skip
        """`count` answers to each task, in order."""
        prompts = [tuple(self.language.tokenizer.encode(prompt(task, system))) for task in tasks for _ in range(count)]
        found: list[list[Delta]] = [[] for _ in prompts]
        left = [len(prompts)]
        done = threading.Event()

        def emitter(index: int) -> Any:
            def emit(delta: Any) -> None:
                if not isinstance(delta, Delta):
                    raise RuntimeError(delta)
                found[index].append(delta)
                if delta.finish is not None:
                    left[0] -= 1
                    if not left[0]:
                        done.set()

            return emit

        batcher = Batcher(self.language, max_batch=self._batch, max_waiting=len(prompts) + 1)
        sampling = Sampling(LONGEST, temperature, 1.0, seed, ("\n",), 0)
        batcher.start()
        batcher.submit(
            [Asked(ids, sampling, emitter(at), index=at, adapter=adapter, lead=True) for at, ids in enumerate(prompts)]
        )
        done.wait()
        batcher.close()
        return [_answer(tasks[at // count], prompts[at], deltas) for at, deltas in enumerate(found)]


def _answer(task: Task, ids: tuple[int, ...], deltas: list[Delta]) -> Answer:
    text = "".join(delta.text for delta in deltas).strip()
    tokens = tuple(delta.picked.token for delta in deltas)
    logprobs = tuple(float(delta.picked.logprob or 0.0) for delta in deltas)
    return Answer(task, ids, tokens, logprobs, text, grade(task.data, text))


def prompt(task: Task, system: str) -> str:
    """What the engine makes of the agent's messages."""
    question = f"Capital of {task.data['country']}?"
    return plain([{"role": "system", "content": system}, {"role": "user", "content": question}])


def rows_of(answers: Sequence[Answer], version: str, method: str) -> tuple[list[Row], Report]:
    """Answers as logged episodes, credited and made to training rows by the product's own functions."""
    episodes, calls, rewards = [], [], {}
    for index, one in enumerate(answers):
        name = f"e{index}"
        messages = [{"role": "user", "content": one.task.id}]
        judged = [{"name": "reward", "value": one.reward}]
        step = Step(f"s{index}", 0, "agent", None, {}, messages, [], None, None, [])
        episodes.append(Episode(name, [step], judged, one.reward))
        calls.append(Call(f"s{index}", name, 0, version, True, one.prompt, one.ids, one.logprobs))
        rewards[name] = one.reward
    key = {one.episode_id: "all" if method == "rft" else one.steps[0].input_messages[0]["content"] for one in episodes}
    given = credit.assign(episodes, "leave_one_out" if method == "rft" else "group", key=key)
    return build(calls, {one.span_id: one.advantage for one in given}, Rules(), rewards)


def gold_rows(model: Model, tasks: Sequence[Task]) -> list[Row]:
    """The right answers as rows."""
    rows = []
    for index, task in enumerate(tasks):
        expected = task.expected[0] if isinstance(task.expected, list) else task.expected
        ids = tuple(model.language.tokenizer.encode(prompt(task, AGENT)))
        answer = tuple(model.language.tokenizer.encode(f" {expected}\n", add_special_tokens=False))
        size = len(answer)
        rows.append(Row(f"e{index}", (f"s{index}",), "gold", ids, answer, (1,) * size, (1.0,) * size))
    return rows


def exact(answers: Sequence[Answer]) -> float:
    """Share of exactly right answers."""
    return float(np.mean([one.reward >= 1.0 for one in answers]))


@dataclass(frozen=True)
class Setting:
    """How a method learns here: found on validation countries of seed 0."""

    spec: TrainSpec
    rounds: int = 1
    samples: int = 4


SETTINGS = {
    "sft": Setting(TrainSpec("sft", epochs=3, batch_size=8, learning_rate=2e-4)),
    "rft": Setting(TrainSpec("rft", epochs=3, batch_size=8, learning_rate=2e-4), rounds=3),
    "grpo": Setting(TrainSpec("grpo", epochs=1, batch_size=8, learning_rate=1e-4), rounds=3),
}


class Study:
    """One seed: its split, its adapters. What the base model answers to is asked once for all methods."""

    def __init__(self, model: Model, seed: int, home: Path, say: Any) -> None:
        self.model, self.seed, self.home, self.say = model, seed, home, say
        rest, self.held = split(load_tasks(TASKS), HELD_OUT, seed)
        self.training, self.validation = split(rest, VALIDATION, seed)
        self._base: dict[tuple[int, float], list[Answer]] = {}
        self._base_validation: float | None = None

    def run(self, method: str, setting: Setting | None = None, *, test: bool = True) -> dict[str, Any]:
        """The method's figures: exact answers on validation, and (with `test`) held out, greedy and at temperature 1.

        `seconds` by the clock, `cpu_seconds` of all cores together.
        """
        began, spent = time.monotonic(), time.process_time()
        system, adapter = AGENT, None
        history: list[dict[str, Any]] = []
        if method == "prompt":
            system = self.prompted()
        elif method != "baseline":
            adapter, history = self.learn(method, setting or SETTINGS[method])
        found: dict[str, Any] = {"history": history}
        if test:
            ask: dict[str, Any] = {"adapter": adapter, "system": system}
            greedy = self.model.answers(self.held, temperature=0, **ask)
            sampled = self.model.answers(self.held, temperature=1, seed=self.seed + 900, **ask)
            found["greedy"] = [float(one.reward >= 1.0) for one in greedy]
            found["contains"] = float(np.mean([one.reward > 0 for one in greedy]))
            found["sampled"] = exact(sampled)
        found |= {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - spent}
        return {**found, "load": os.getloadavg()[2]}

    def prompted(self) -> str:
        """The agent's prompt with two training examples in it."""
        one, two = self.training[:2]
        words = {"one": one.data["country"], "two": one.expected, "three": two.data["country"], "four": two.expected}
        return BETTER.format(**{key: value[0] if isinstance(value, list) else value for key, value in words.items()})

    def learn(self, method: str, setting: Setting) -> tuple[str | None, list[dict[str, Any]]]:
        """Train round after round; the best version on validation, as its name, and what happened."""
        if self._base_validation is None:
            self._base_validation = self._validate(None)
        best, best_name, parent, name = self._base_validation, None, None, None
        history: list[dict[str, Any]] = [{"round": 0, "validation": best}]
        for number in range(1, setting.rounds + 1):
            began = time.monotonic()
            rows, report, reward = self._rows(method, setting, number, name)
            collected = time.monotonic()
            made = self._train(method, setting, rows, number, parent)
            if made.directory is None:
                history.append({"round": number, "stopped": made.stopped})
                break
            parent, name = made.directory, f"{method}-{self.seed}-{number}"
            self.model.language.adapters.load(name, parent)
            trained = time.monotonic()
            value = self._validate(name)
            history.append(
                {"round": number, "validation": value, "reward": reward, "learned": made.rows, "steps": made.steps,
                 "curve": made.curves[-1], "collect_s": collected - began, "train_s": trained - collected,
                 "validate_s": time.monotonic() - trained, **report.as_dict()}
            )  # fmt: skip
            self.say(f"seed {self.seed} {method} {json.dumps(history[-1])}")
            if value >= best:
                best, best_name = value, name
        return best_name, history

    def _rows(
        self, method: str, setting: Setting, number: int, name: str | None
    ) -> tuple[list[Row], Report, float | None]:
        if method == "sft":
            return gold_rows(self.model, self.training), Report(), None
        seed = 1000 * self.seed + number
        how: dict[str, Any] = {"temperature": 1, "count": setting.samples, "seed": seed}
        if name is None:
            known = self._base.get((setting.samples, seed))
            answers = known or self.model.answers(self.training, **how)
            self._base[setting.samples, seed] = answers
        else:
            answers = self.model.answers(self.training, adapter=name, **how)
        rows, report = rows_of(answers, name or "base", method)
        return rows, report, float(np.mean([one.reward for one in answers]))

    def _train(self, method: str, setting: Setting, rows: list[Row], number: int, parent: Path | None) -> Trained:
        folder = self.home / f"{method}-{self.seed}-{number}"
        spec = replace(setting.spec, seed=self.seed)
        return train(MODEL, rows, spec, folder, work=self.home / f"work-{folder.name}", parent=parent)

    def _validate(self, name: str | None) -> float:
        return exact(self.model.answers(self.validation, temperature=0, adapter=name))


Found = dict[str, list[dict[str, Any]]]


def read(paths: Sequence[Path], methods: Sequence[str] = METHODS) -> Found:
    """Method -> one entry a seed, of files that `--keep` wrote."""
    lines = [json.loads(line) for path in paths if path.is_file() for line in path.read_text().splitlines()]
    lines.sort(key=lambda entry: entry["seed"])
    return {name: entries for name in methods if (entries := [one for one in lines if one["method"] == name])}


def measure(seeds: Sequence[int], methods: Sequence[str], say: Any, kept: Path, threads: int = 0) -> None:
    """Measure what is not in `kept` yet, a line as soon as it is known."""
    use_threads(threads)
    model = Model(MODEL)
    done = {(entry["seed"], name) for name, entries in read([kept]).items() for entry in entries}
    with tempfile.TemporaryDirectory() as home:
        for seed in seeds:
            study = Study(model, seed, Path(home), say)
            for name in (one for one in methods if (seed, one) not in done):
                entry = {"seed": seed, "method": name, **study.run(name)}
                with kept.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                say(f"seed {seed} {name}: {np.mean(entry['greedy']):.3f} exact, {entry['seconds']:.0f} s")


def cpu_seconds(entries: Sequence[dict[str, Any]]) -> float | None:
    """Mean CPU seconds of a seed, None where a run did not count them."""
    known = [entry.get("cpu_seconds") for entry in entries]
    return None if None in known else float(np.mean(known))


def table(found: Found) -> Table:
    """A line a method: mean over seeds with an interval over countries and seeds."""
    shown = Table("method", "greedy exact", "95 %", "by seed", "T=1 exact", "contains", "seconds a seed", "of CPU")
    for name, entries in found.items():
        pooled = [value for entry in entries for value in entry["greedy"]]
        low, high = interval(pooled)
        means = [float(np.mean(entry["greedy"])) for entry in entries]
        shown.add_row(
            name,
            f"{np.mean(means):.3f}",
            f"{low:.3f} to {high:.3f}",
            " ".join(f"{mean:.3f}" for mean in means),
            f"{np.mean([entry['sampled'] for entry in entries]):.3f}",
            f"{np.mean([entry['contains'] for entry in entries]):.3f}",
            f"{np.mean([entry['seconds'] for entry in entries]):.0f}",
            "-" if (spent := cpu_seconds(entries)) is None else f"{spent:.0f}",
        )
    return shown


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument("--keep", type=Path, help="keep the raw figures there, and go on with what is there")
    parser.add_argument("--merge", type=Path, nargs="+", help="instead of measuring: make one result of such files")
    asked = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        kept = asked.keep or Path(folder) / "capital.jsonl"
        if not asked.merge:
            seeds = range(asked.first, asked.first + asked.seeds)
            say = lambda line: console.print(line, highlight=False)  # noqa: E731
            measure(seeds, asked.methods.split(","), say, kept, asked.threads)
        found = read(asked.merge or [kept])
    console.print(table(found))
    if asked.merge or asked.keep is None:
        keep(found)


def keep(found: Found, folder: Path = RESULTS) -> None:
    """Write bench/results/capital.json and its picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    must = {"rft": (">=", 0.80)}
    means = {name: [float(np.mean(entry["greedy"])) for entry in entries] for name, entries in found.items()}
    result = Result("capital", must, {name: float(np.mean(values)) for name, values in means.items()})
    bounds = {name: interval([one for entry in entries for one in entry["greedy"]]) for name, entries in found.items()}
    for name, entries in found.items():
        result.measures[f"{name}, seconds a seed"] = float(np.mean([entry["seconds"] for entry in entries]))
        if (spent := cpu_seconds(entries)) is not None:
            result.measures[f"{name}, CPU seconds a seed"] = spent
    result.notes = {"seeds": means, "ci95": bounds, "runs": found}
    result.write(sum(entry["seconds"] for entries in found.values() for entry in entries), folder)
    pyplot.figure(figsize=(6, 3.5))
    heights = [result.measures[name] for name in means]
    errors = [[height - bounds[name][0] for name, height in zip(means, heights, strict=True)],
              [bounds[name][1] - height for name, height in zip(means, heights, strict=True)]]  # fmt: skip
    pyplot.bar(list(means), heights, yerr=errors, capsize=4)
    pyplot.ylim(0, 1)
    pyplot.title("Held-out capitals, greedy, exactly right", fontsize=9)
    pyplot.tight_layout()
    pyplot.savefig(folder / "capital.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

"""The real APO class of agentlightning 0.3.0 on a world, in an environment of its own: `python -m
bench.apo.agentlightning_peer WORLD SEED...` prints one JSON line a seed.

Its search is untouched. Two things around it are replaced: rollouts come from the world instead of a store and runners,
and the prompt templates of its critic are passed on as data (rendering them starts Node.js for each call), so that the
scripted editor can read what the critic is shown. Configuration: beam 2, branch 2, up to 12 rounds; of the published
ones the strongest here.
"""

import asyncio
import contextlib
import json
import logging
import random
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any

import agentlightning.algorithm.apo.apo as module
from agentlightning.adapter.messages import TraceToMessages
from agentlightning.types import PromptTemplate

from bench.apo.worlds import SEED_PROMPT, SPECS, Editor, World

MOST = 1200


class Spent(Exception):
    """The budget is used up."""


class Client:
    """Stands in for AsyncOpenAI: the critic names the failures, the editor rewrites the prompt."""

    def __init__(self, world: World) -> None:
        self.editor = Editor(world)
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))

    async def _create(self, *, messages: Any, **_: Any) -> Any:
        context = json.loads(messages)
        template = context["prompt_template"]
        if "experiments" in context:
            failed = [one["messages"][0] for one in context["experiments"] if (one["final_reward"] or 0.0) < 0.95]
            text = json.dumps(failed)
        else:
            shown = [(task, template) for task in json.loads(context["critique"])]
            text = self.editor.edit(template, shown).rewrite if shown else template
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=text))])


class Search(module.APO[str]):
    """The class with rollouts in a world."""

    def __init__(self, world: World) -> None:
        super().__init__(Client(world), beam_width=2, branch_factor=2, beam_rounds=12)  # type: ignore[arg-type]
        self.world = world
        self.curve: list[tuple[int, float]] = []
        self._asked: Counter[tuple[str, str]] = Counter()

    async def evaluate_prompt_on_batch(self, prompt: Any, resource_name: str, dataset: Any, mode: Any, **_: Any) -> Any:
        """One rollout a task. Raises Spent at the end of the budget."""
        template = prompt.prompt_template.template
        self.curve.append((self.world.rollouts, self.world.score(self.get_best_prompt().template)))
        if self.world.rollouts >= MOST:
            raise Spent
        results = []
        for task in dataset:
            reward = self.world.reward(template, task, self._asked[template, task])
            self._asked[template, task] += 1
            results.append({"status": "succeeded", "final_reward": reward, "spans": [], "messages": [task]})
        return results, sum(one["final_reward"] for one in results) / len(results)


def run(name: str, seed: int) -> dict[str, Any]:
    """One search: what it reports at the end and on the way."""
    random.seed(seed)
    world = World(SPECS[name], seed)
    search = Search(world)
    search.set_initial_resources({"prompt": PromptTemplate(template=SEED_PROMPT, engine="f-string")})
    search.set_adapter(TraceToMessages())
    search.set_store(SimpleNamespace())  # type: ignore[arg-type]  # nothing is asked of it
    with contextlib.suppress(Spent):
        asyncio.run(search.run(train_dataset=world.train, val_dataset=world.val))
    template = search.get_best_prompt().template
    return {
        "world": name,
        "seed": seed,
        "score": world.score(template),
        "curve": search.curve,
        "rollouts": world.rollouts,
    }


def main() -> None:
    """One world, its seeds."""
    logging.disable(logging.CRITICAL)
    module.poml.poml = lambda _, context, **__: {"messages": json.dumps(context)}
    for seed in sys.argv[2:]:
        print(json.dumps(run(sys.argv[1], int(seed))), flush=True)


if __name__ == "__main__":
    main()

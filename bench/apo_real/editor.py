"""The scripted optimizer model of the engines that rewrite whole prompts: it edits with parts of the bank alone.

It never sees which part is good. What it changes is drawn at random, by seed, so that every engine meets an editor of
the same (little) wit; the engine's own part is to tell good edits from bad.
"""

import json
import random
from collections.abc import Sequence

from optimize.apo.parts import Part, cut, render

MOST = 3  # changes an edit
ADD = 0.7  # share of changes that add a part; the others replace one or take one out, in equal shares


class Editor:
    """`complete(messages)` as an engine calls its optimizer's model: the reply to an edit is a whole prompt as JSON.

    It knows the prompt to edit by finding it in the message, so it serves any engine, whatever that asks around it.
    """

    def __init__(self, seed_prompt: str, bank: Sequence[Part], seed: int) -> None:
        self.bank = tuple(bank)
        self.calls = 0
        self._skeleton, own = cut(seed_prompt)
        self._dice = random.Random(f"editor-{seed}")  # a reproducible order
        self._known: dict[str, tuple[Part, ...]] = {seed_prompt: tuple(own)}

    async def complete(self, messages: list[dict[str, str]]) -> str:
        """A new prompt made from the longest known prompt in the messages."""
        self.calls += 1
        told = "\n".join(message["content"] for message in messages)
        parent = max((prompt for prompt in self._known if prompt in told), key=len)
        child = self.edited(self._known[parent])
        text = render(self._skeleton, child).strip()
        self._known.setdefault(text, child)
        return json.dumps({"prompt": text})

    def edited(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """The parts after one to three random changes; never none at all."""
        chosen = list(parts)
        for _ in range(self._dice.randint(1, MOST)):
            self._change(chosen)
        return tuple(chosen)

    def _change(self, chosen: list[Part]) -> None:
        """One part more, one replaced by another, or one less."""
        fresh = [part for part in self.bank if part not in chosen]
        luck = self._dice.random()
        adds = luck < (1 + ADD) / 2 and bool(fresh)
        removes = bool(chosen) and luck >= ADD and (adds or len(chosen) > 1)
        if removes:
            chosen.remove(self._dice.choice(chosen))
        if adds:
            chosen.append(self._dice.choice(fresh))

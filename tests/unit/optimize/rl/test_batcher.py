import queue
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from collector.errors import RatchetError, Unavailable
from optimize.rl.attention import Segment
from optimize.rl.batcher import CHUNK, Batcher, Delta, Row
from optimize.rl.model import LanguageModel
from optimize.rl.sample import Sampling

WAIT = 20


class Watched:
    """A row and what it emitted."""

    def __init__(self, prompt: Sequence[int], sampling: Sampling, **options: Any) -> None:
        self.events: queue.Queue[Delta | RatchetError] = queue.Queue()
        self.row = Row(prompt, sampling, self.events.put, **options)
        self.deltas: list[Delta] = []

    def result(self) -> list[int]:
        while not self.deltas or self.deltas[-1].finish is None:
            event = self.events.get(timeout=WAIT)
            if isinstance(event, RatchetError):
                raise event
            self.deltas.append(event)
        return [delta.picked.token for delta in self.deltas]

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)


@pytest.fixture
def batcher(tiny: LanguageModel) -> Iterator[Batcher]:
    batcher = Batcher(tiny, max_batch=4)
    batcher.start()
    yield batcher
    batcher.close()


def prompts(count: int, head: int = 0) -> list[list[int]]:
    """Prompts of different lengths, all with one beginning of `head` ids."""
    chance = random.Random(5)
    start = [chance.randrange(2, 258) for _ in range(head)]
    return [start + [chance.randrange(2, 258) for _ in range(chance.randrange(1, 25))] for _ in range(count)]


def greedy_of_transformers(tiny: LanguageModel, ids: list[int], count: int) -> list[int]:
    """One sequence, recomputed from its beginning at every token."""
    from optimize.rl.memory import Memory

    made: list[int] = []
    while len(made) < count and (not made or made[-1] not in tiny.eos_ids):
        made.append(int(tiny.forward([Segment(Memory(), ids + made)])[0].argmax()))
    return made


GREEDY = Sampling(12, temperature=0)


@pytest.mark.parametrize("head", [0, 40])
def test_greedy_answers_are_the_same_alone_and_in_any_company(tiny: LanguageModel, batcher: Batcher, head: int) -> None:
    asked = prompts(10, head)
    alone = [greedy_of_transformers(tiny, ids, 12) for ids in asked]
    assert len({tuple(answer) for answer in alone}) > 5
    together = [Watched(ids, GREEDY) for ids in asked]
    batcher.submit([watched.row for watched in together])
    assert [watched.result() for watched in together] == alone
    for watched, answer in zip([Watched(ids, GREEDY) for ids in asked], alone, strict=True):
        batcher.submit([watched.row])
        assert watched.result() == answer


def test_prompts_with_one_beginning_compute_it_once(tiny: LanguageModel) -> None:
    computed: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tiny, name)

        def forward(self, segments: Sequence[Segment]) -> torch.Tensor:
            computed.append(sum(len(segment.ids) for segment in segments))
            return tiny.forward(segments)

    batcher = Batcher(Counting(), max_batch=8)  # type: ignore[arg-type]
    asked = [Watched(ids, Sampling(1, temperature=0)) for ids in prompts(6, head=60)]
    batcher.submit([watched.row for watched in asked])
    batcher.start()
    for watched in asked:
        watched.result()
    batcher.close()
    assert sum(computed) == 60 + sum(len(watched.row.prompt) - 60 for watched in asked)
    assert [watched.deltas[-1].cached for watched in asked] == [0, 60, 60, 60, 60, 60]


def test_a_seeded_answer_is_the_same_in_any_company(batcher: Batcher) -> None:
    sampling = Sampling(12, temperature=1.0, top_p=0.9, seed=11)
    ids = prompts(1)[0]
    alone = Watched(ids, sampling)
    batcher.submit([alone.row])
    expected = alone.result()
    company = [Watched(other, Sampling(12)) for other in prompts(3)]
    again = Watched(ids, sampling)
    batcher.submit([*(watched.row for watched in company), again.row])
    assert again.result() == expected


def test_a_long_answer_keeps_no_short_one_waiting(batcher: Batcher) -> None:
    long = Watched([5, 6, 7], Sampling(200, temperature=0.5, seed=1))
    batcher.submit([long.row])
    while long.events.qsize() < 3:
        threading.Event().wait(0.001)
    short = Watched([8, 9], Sampling(2, temperature=0))
    batcher.submit([short.row])
    short.result()
    assert long.row in batcher._active
    batcher.cancel([long.row])


def test_a_long_prompt_is_computed_in_pieces_beside_running_rows(tiny: LanguageModel) -> None:
    model = LanguageModel(tiny._model, tiny.tokenizer)
    model.context = 4096
    sizes: list[list[int]] = []
    forward = model.forward

    def watched_forward(segments: Sequence[Segment]) -> torch.Tensor:
        sizes.append([len(segment.ids) for segment in segments])
        return forward(segments)

    model.forward = watched_forward  # type: ignore[method-assign]
    batcher = Batcher(model, max_batch=4)
    first, second = Watched([5, 6], Sampling(20, temperature=0)), Watched([7] * (2 * CHUNK + 10), Sampling(1))
    batcher.submit([first.row, second.row])
    batcher.start()
    first.result()
    second.result()
    batcher.close()
    assert [size[-1] for size in sizes[:3]] == [CHUNK - 2, CHUNK, 12]
    assert all(len(size) == 2 for size in sizes[:3])


def test_a_cancelled_row_leaves_and_emits_nothing_more(batcher: Batcher) -> None:
    gone = Watched([5, 6, 7], Sampling(240, temperature=0.9, seed=2))
    batcher.submit([gone.row])
    gone.events.get(timeout=WAIT)
    batcher.cancel([gone.row])
    after = Watched([8, 9], Sampling(2, temperature=0))
    batcher.submit([after.row])
    after.result()
    assert batcher.load == (0, 0)
    seen = gone.events.qsize()
    again = Watched([8, 9], Sampling(2, temperature=0))
    batcher.submit([again.row])
    again.result()
    assert gone.events.qsize() == seen


def test_an_answer_ends_at_its_stop_its_length_or_the_context(tiny: LanguageModel, batcher: Batcher) -> None:
    ids = prompts(1)[0]
    free = Watched(ids, Sampling(12, temperature=0))
    batcher.submit([free.row])
    free.result()
    assert free.deltas[-1].finish == "length"
    stop = free.text[4:6]
    assert stop not in free.text[:4]
    stopped = Watched(ids, Sampling(12, temperature=0, stop=(stop,)))
    batcher.submit([stopped.row])
    stopped.result()
    assert (stopped.text, stopped.deltas[-1].finish) == (free.text[:4], "stop")
    full = Watched([5] * (tiny.context - 3), Sampling(100, temperature=0.8, seed=3))
    batcher.submit([full.row])
    assert len(full.result()) == 3


def test_the_end_token_ends_an_answer_and_shows_no_text(tiny: LanguageModel, batcher: Batcher) -> None:
    model = LanguageModel(tiny._model, tiny.tokenizer)
    ids = prompts(1)[0]
    answer = greedy_of_transformers(model, ids, 4)
    model.eos_ids = frozenset({answer[2]})
    ending = Batcher(model)
    ending.start()
    watched = Watched(ids, GREEDY)
    ending.submit([watched.row])
    assert watched.result() == answer[:3]
    ending.close()
    assert watched.deltas[-1].finish == "stop"
    assert watched.text == tiny.tokenizer.decode(answer[:2])


def test_a_failing_step_fails_its_rows_and_not_the_engine(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, tiny: LanguageModel
) -> None:
    failing = Watched([5], Sampling(3, temperature=0))
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "forward", lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
        batcher.submit([failing.row])
        with pytest.raises(RatchetError, match="its log says why"):
            failing.result()
    healthy = Watched([5], Sampling(3, temperature=0))
    batcher.submit([healthy.row])
    assert len(healthy.result()) == 3


def test_too_many_waiting_rows_are_refused_at_once(tiny: LanguageModel) -> None:
    batcher = Batcher(tiny, max_waiting=2)
    waiting = [Watched([5], GREEDY) for _ in range(3)]
    with pytest.raises(Unavailable, match="waiting already"):
        batcher.submit([watched.row for watched in waiting])
    assert batcher.load == (0, 0)


def test_rows_that_are_unfinished_at_the_end_fail(tiny: LanguageModel) -> None:
    batcher = Batcher(tiny)
    left = Watched([5], GREEDY)
    batcher.submit([left.row])
    batcher.close()
    with pytest.raises(Unavailable, match="shutting down"):
        left.result()

"""TRL's own KTO, DPO and SFT trainers on logged ids: datasets are made of rewards, and nothing is tokenised anew."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset  # type: ignore[import-untyped]
from trl import DPOTrainer, KTOTrainer  # type: ignore[attr-defined]

from collector.errors import BadInput
from optimize.rl.rows import Row

Record = dict[str, Any]


class _Ready:
    """The dataset holds ids already."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
        return dataset

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """None: what an adapter is stands in its manifest."""


class ReadyKTO(_Ready, KTOTrainer):
    """KTO on ids."""


class ReadyDPO(_Ready, DPOTrainer):
    """DPO on ids."""


def kto_records(rows: Sequence[Row]) -> list[Record]:
    """One record a row whose advantage is not 0: good or bad. Each is also paired with another prompt's answer, by
    which TRL estimates the KL to the base. Raises BadInput where there are not at least one of both.
    """
    judged = [(row, _advantage(row)) for row in rows]
    kept = [(row, value > 0) for row, value in judged if value]
    if len({good for _, good in kept}) < 2:
        raise BadInput("kto needs steps that did better and steps that did worse than expected", param="method")
    answers = [list(row.completion_ids) for row, _ in kept]
    others = answers[-1:] + answers[:-1]
    return [
        {"prompt_ids": list(row.prompt_ids), "completion_ids": answer, "KL_completion_ids": other, "label": good}
        for (row, good), answer, other in zip(kept, answers, others, strict=True)
    ]


def dpo_records(rows: Sequence[Row]) -> list[Record]:
    """Pairs of different answers to the same prompt: the best with the worst, the second best with the second worst,
    and so on while their advantages differ. Raises BadInput where there is no pair.
    """
    groups: dict[tuple[int, ...], dict[tuple[int, ...], float]] = {}
    for row in rows:
        answers = groups.setdefault(row.prompt_ids, {})
        answers[row.completion_ids] = max(_advantage(row), answers.get(row.completion_ids, float("-inf")))
    records = []
    for prompt, answers in groups.items():
        ranked = sorted(answers, key=lambda answer: (-answers[answer], answer))
        for best, worst in zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False):
            if answers[best] > answers[worst]:
                records.append({"prompt_ids": list(prompt), "chosen_ids": list(best), "rejected_ids": list(worst)})
    if not records:
        raise BadInput("dpo needs better and worse answers to one prompt: run each task several times", param="method")
    return records


def sft_records(rows: Sequence[Row]) -> list[Record]:
    """One record a row: its ids, and as labels the tokens that the model wrote."""
    return [
        {
            "input_ids": [*row.prompt_ids, *row.completion_ids],
            "labels": [-100] * len(row.prompt_ids)
            + [token if wrote else -100 for token, wrote in zip(row.completion_ids, row.mask, strict=True)],
        }
        for row in rows
    ]


def dataset(records: Sequence[Record]) -> Any:
    """As TRL takes it."""
    return Dataset.from_list(list(records))


def _advantage(row: Row) -> float:
    """The row's: the mean over its written tokens."""
    return sum(row.advantages) / max(sum(row.mask), 1)

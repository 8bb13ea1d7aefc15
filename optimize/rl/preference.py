"""TRL's own KTO, DPO and SFT trainers on logged ids: datasets are made of rewards, and nothing is tokenised anew."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-untyped]
from trl import DPOTrainer, KTOTrainer, SFTTrainer  # type: ignore[attr-defined]

from collector.errors import BadInput
from optimize.rl.logprobs import supported, token_logprobs
from optimize.rl.rows import Row

Record = dict[str, Any]
UNLABELLED = -100  # what torch's losses leave out


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


class ReadySFT(_Ready, SFTTrainer):
    """SFT on ids: TRL's loss (the mean over labelled tokens), computed at those tokens alone, shared beginnings once.

    On a model of 0.3 billion parameters most of them are its output layer, which TRL's own way runs on prompts too.
    """

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL's, for a model in one process whose output is a plain linear layer; TRL's own for any other."""
        whole = self.accelerator.unwrap_model(model) is model and supported(model) and not self.aux_loss_enabled
        if return_outputs or not whole:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs["attention_mask"]
        # Every row has a prompt; from the shortest one's end on, tokens can be labelled.
        lead = max(int((labels != UNLABELLED).long().argmax(1).min()), 1)
        wrote = (labels[:, lead:] != UNLABELLED).long()
        with self.accelerator.autocast():
            logprobs, entropies = token_logprobs(model, ids, mask, wrote, share=not self.args.gradient_checkpointing)
        count = wrote.sum()
        self._metrics["train"]["entropy"].append(float(entropies.sum() / count.clamp(min=1)))
        total = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        return -logprobs.sum() / total.clamp(min=1)


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
            "labels": [UNLABELLED] * len(row.prompt_ids)
            + [token if wrote else UNLABELLED for token, wrote in zip(row.completion_ids, row.mask, strict=True)],
        }
        for row in rows
    ]


def dataset(records: Sequence[Record]) -> Any:
    """As TRL takes it."""
    return Dataset.from_list(list(records))


def _advantage(row: Row) -> float:
    """The row's: the mean over its written tokens."""
    return sum(row.advantages) / max(sum(row.mask), 1)

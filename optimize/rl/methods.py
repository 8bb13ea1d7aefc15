"""The ways to train, by name: which loss, which ratio, which data it can use.

| method | learns from | loss |
|---|---|---|
| rft | steps with a positive advantage | each counts by it, clipped at the logged policy (rejection sampling) |
| grpo | all steps | clipped ratio, mean over each sequence, then over sequences (Shao et al. 2024) |
| dr_grpo | all steps | clipped ratio, sum over a constant length (Liu et al. 2025) |
| dapo | all steps | clipped ratio with a higher upper bound, mean over tokens (Yu et al. 2025) |
| cispo | all steps | truncated ratio as a constant weight of log p, mean over tokens (MiniMax 2025) |
| sapo | all steps | soft gate of the ratio instead of a clip (Gao et al. 2025) |
| gspo | all steps | one ratio a sequence: its geometric mean (Zheng et al. 2025) |
| kto | good and bad steps | Kahneman-Tversky optimisation (Ethayarajh et al. 2024) |
| dpo | better and worse steps of one prompt | direct preference optimisation (Rafailov et al. 2023) |
| sft | steps with a positive advantage | plain likelihood |
"""

from dataclasses import dataclass

from collector.errors import BadInput


@dataclass(frozen=True)
class Method:
    """`trainer`: "logged" (ours), "kto", "dpo" or "sft". `ratio`: needs logged log-probabilities of the policy that
    acted. `positive`: keeps steps with an advantage above 0 alone. `merge`: several calls may be one row. `loss`,
    `level`, `low` and `high` are TRL's loss_type, importance_sampling_level, epsilon and epsilon_high. (Bounds of 3e-4,
    as in the GSPO paper, suit fresh samples; logged ones, passed over several times, would all be clipped at once.)
    """

    trainer: str = "logged"
    ratio: bool = True
    positive: bool = False
    merge: bool = True
    loss: str = "grpo"
    level: str = "token"
    low: float = 0.2
    high: float = 0.2
    learning_rate: float = 1e-4


METHODS: dict[str, Method] = {
    "rft": Method(ratio=False, positive=True, learning_rate=2e-4),
    "grpo": Method(),
    "dr_grpo": Method(loss="dr_grpo"),
    "dapo": Method(loss="dapo", high=0.28),
    "cispo": Method(loss="cispo", high=5.0),
    "sapo": Method(loss="sapo"),
    "gspo": Method(level="sequence", low=0.05, high=0.05),
    "kto": Method(trainer="kto", ratio=False, merge=False, learning_rate=5e-5),
    "dpo": Method(trainer="dpo", ratio=False, merge=False, learning_rate=5e-5),
    "sft": Method(trainer="sft", ratio=False, positive=True, learning_rate=2e-4),
}


def method(name: str) -> Method:
    """The method of that name. Raises BadInput."""
    if name not in METHODS:
        raise BadInput(f"there is no method {name!r}; there are: {', '.join(METHODS)}", param="method")
    return METHODS[name]

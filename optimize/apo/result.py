"""What a prompt search came to: as an object, as JSON, as a report page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal

from optimize.apo.engine import Candidate, PartReport, SearchResult
from optimize.evaluation import Outcome
from optimize.gate import Comparison, Verdict

CLEAR = 0.9  # P(a part helps) from which its gain is called clear


@dataclass(frozen=True)
class HeldOut:
    """One held-out task under both prompts, means over its replicates; a failed rollout scored 0."""

    task_id: str
    before: float
    after: float
    answer_before: str = ""
    answer_after: str = ""
    reason_before: str | None = None
    reason_after: str | None = None
    old: tuple[Outcome, ...] = ()
    new: tuple[Outcome, ...] = ()


def pair_of(outcomes: Sequence[Outcome]) -> HeldOut:
    """The held-out pair of one task: its outcomes, the old prompt's and the new one's in turn."""
    old, new = tuple(outcomes[::2]), tuple(outcomes[1::2])
    return HeldOut(
        old[0].request.task.id,
        sum(one.score for one in old) / len(old),
        sum(one.score for one in new) / len(new),
        old[0].answer,
        new[0].answer,
        next((one.reason for one in old if one.reason), None),
        next((one.reason for one in new if one.reason), None),
        old,
        new,
    )


@dataclass(frozen=True)
class ApoResult:
    """The outcome. `gate` is None where no candidate reached it; `rollouts` were paid by this job, `calls` are theirs.

    `version` is the candidate's number in the registry (None: rejected or none), `revision` the deployment's; where
    several slots were searched together, `versions` has the number of each, and `version` is the first of them.
    """

    job_id: str
    slot: str
    verdict: Literal["promote", "shadow", "reject"]
    promoted: bool
    reason: str
    seed_template: str
    best_template: str
    seed_version: int
    version: int | None
    revision: int | None
    gate: Verdict | None
    pairs: tuple[HeldOut, ...]
    search: SearchResult
    rollouts: int
    calls: int | None
    seconds: float
    report: Path | None = None
    notes: tuple[str, ...] = ()
    versions: Mapping[str, int] = field(default_factory=dict)  # of each slot whose prompt changed
    costs: Mapping[str, Comparison] = field(default_factory=dict)
    used: Mapping[str, float] = field(default_factory=dict)  # tokens, usd, seconds: rollouts and the optimizer's calls

    def as_dict(self) -> dict[str, Any]:
        """For `--json` and the job's result."""
        return {
            "job_id": self.job_id,
            "verdict": self.verdict,
            "promoted": self.promoted,
            "reason": self.reason,
            "slot": self.slot,
            "version": self.version,
            "versions": dict(self.versions),
            "revision": self.revision,
            "holdout": None if self.gate is None else holdout(self.gate),
            "rollouts": self.rollouts,
            "calls": self.calls,
            "seconds": round(self.seconds, 3),
            "report": None if self.report is None else str(self.report),
            "seed_template": self.seed_template,
            "best_template": self.best_template,
            "notes": list(self.notes),
            "costs": {name: asdict(one) for name, one in self.costs.items()},
            "used": {name: round(value, 6) for name, value in self.used.items()},
            "search": {
                "stop": self.search.stop,
                "reason": self.search.reason,
                "rollouts": self.search.rollouts,
                "gain": self.search.gain,
                "gain_sd": self.search.gain_sd,
                "p_gain": self.search.p_gain,
                "parts": [part.text for part in self.search.best_parts],
            },
            "pairs": [{"task_id": pair.task_id, "before": pair.before, "after": pair.after} for pair in self.pairs],
        }


def holdout(gate: Verdict) -> dict[str, Any]:
    """The gate's figures under their public names."""
    names = ("n", "before", "after", "diff", "p_value", "alpha", "candidates_tried", "needed_n", "method")
    return {**{name: getattr(gate, name) for name in names}, "ci95": list(gate.ci95)}


def write_report(result: ApoResult, folder: Path) -> Path:
    """Write `{job_id}.html` and `{job_id}.json` into `folder`; the page's path comes back."""
    from optimize.report import Pair, PartRow, Point, PromptReport, as_json, write

    search = result.search
    before = search.value - search.gain
    points = [Point(rollouts, before + gain, _sd(gain, p, search.gain_sd)) for rollouts, gain, p in search.history]
    parts = [
        PartRow(row.part.text, row.part.kind, row.part.source, row.mean, row.sd, row.chosen, why(row))
        for row in search.parts
    ]
    page = PromptReport(
        slot=result.slot,
        job_id=result.job_id,
        seed_template=result.seed_template,
        best_template=result.best_template,
        verdict=result.gate,
        outcome=result.reason,
        rollouts=result.rollouts,
        calls=result.calls,
        seconds=result.seconds,
        history=points,
        parts=parts,
        pairs=[Pair(p.task_id, p.before, p.after, p.answer_before, p.answer_after) for p in result.pairs],
        rejected=search.rejected,
        candidates=search.candidates or lineage(search),
        costs=result.costs,
        notes=result.notes,
    )
    path = write(page, folder / f"{result.job_id}.html")
    told = {**result.as_dict(), "report": str(path), **as_json(page)}
    path.with_suffix(".json").write_text(json.dumps(told, indent=2) + "\n")
    return path


def _sd(gain: float, p_gain: float, otherwise: float) -> float:
    """The standard deviation that goes with a normal belief's mean and its probability of being above 0."""
    z = NormalDist().inv_cdf(min(max(p_gain, 1e-12), 1 - 1e-12))
    return gain / z if gain * z > 0 else otherwise


def why(row: PartReport) -> str:
    """Why a part is in the best prompt, or not, in words."""
    if row.chosen:
        return "in the best prompt"
    if row.rollouts == 0:
        return "was not tried"
    if row.mean <= 0:
        return "no gain was seen"
    return "its gain is not clear" if row.p_helps < CLEAR else "the best prompt does without it"


def lineage(search: SearchResult) -> tuple[Candidate, ...]:
    """The seed, the rewrites that grew out of it, and the best prompt, for searches that think in parts."""
    seed = Candidate("seed", None, search.seed_template, None, 0, "the prompt in force")
    rewrites = [row for row in search.parts if row.part.kind == "rewrite"]
    grown = [
        Candidate(row.part.id, row.part.parent or "seed", row.part.text, None, row.rollouts, why(row))
        for row in rewrites
    ]
    if not search.changed:
        return (seed, *grown)
    base = next((part.id for part in search.best_parts if part.kind == "rewrite"), "seed")
    best = Candidate("best", base, search.best_template, search.value, 0, "best of the search")
    return (seed, *grown, best)

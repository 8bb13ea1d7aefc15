"""Episodes to training rows: what the engine read and wrote, token for token, with each step's advantage on its tokens.

A row is one sequence that the model is run on. A call whose prompt continues an earlier call's prompt and answer, id
for id, goes into that call's row: its observation is masked, and the beginning is computed once instead of once a call
(what prime-rl and SkyRL do as well). Anything else becomes a row of its own: merging what only looks alike trains on
text that the model never saw (rLLM issue 272, huggingface/trl#5224). Ids are never made from text here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from optimize.rl.calls import Call

Tokenise = Callable[[Call], tuple[Sequence[int], Sequence[int]]]
# Largest difference of logged and recomputed log-probabilities that rounding explains: measured between a bfloat16
# server and float32 training, mean 0.03 and 0.13 at most; an adapter mixed up with its base gave up to 1.6.
MEAN_GAP, MOST_GAP = 0.1, 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: `prompt_ids` (P,) and, all (T,), `completion_ids`, `mask` (1 where the model wrote),
    `advantages` (0 where it did not) and `logprobs` of the policy that acted (0 where it did not; None: not logged).

    `spans` are the calls in it, `reward` the episode's, None where it has none.
    """

    episode_id: str
    spans: tuple[str, ...]
    version: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    mask: tuple[int, ...]
    advantages: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None
    reward: float | None = None

    @property
    def tokens(self) -> int:
        """Positions that a training step computes."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass
class Report:
    """What became of the calls, by reason. Kept visible: `ratchet optimize rl` prints every count that is not 0.

    `merged` calls went into an earlier one's row; `drift`: the messages continue an earlier call's but its ids don't
    (the answer was tokenised anew); `broken`: neither does. All others are left out: `failed` calls, `uncredited` (no
    reward, or a role that doesn't learn), `no_ids`, `no_logprobs`, `reshaped` (sampled at another temperature or
    top_p, so that logged log-probabilities are not the policy's), `choices` (several), `stale`, `foreign` (a version
    that is not known), `long`, `mismatch` (not what the claimed version would say). `from_text`: without ids, made
    from text for a method that allows it.
    """

    calls: int = 0
    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def as_dict(self) -> dict[str, int]:
        """For `--json`."""
        counted = {name: self.counts[name] for name in sorted(self.counts) if self.counts[name]}
        return {"calls": self.calls, "rows": self.rows, **counted}


@dataclass(frozen=True)
class Rules:
    """Which calls may be learned from. `logprobs`: the method needs logged ones. `ages`: version -> how many versions
    old it is (None: all are taken); `max_age` the staleness limit. `tokenise`: for methods that may learn from calls
    without ids. `longest` in tokens. `merge`: False for methods that compare single answers.
    """

    logprobs: bool = True
    ages: Mapping[str, int] | None = None
    max_age: int = 0
    tokenise: Tokenise | None = None
    longest: int | None = None
    merge: bool = True


def build(
    calls: Sequence[Call],
    advantages: Mapping[str, float | None],
    rules: Rules,
    rewards: Mapping[str, float | None] | None = None,
) -> tuple[list[Row], Report]:
    """Rows in the order of their first calls, and what became of every call.

    `advantages`: span id -> credit, missing or None where the call is not learned from. `rewards`: episode id -> its.
    """
    report = Report(calls=len(calls))
    episodes: dict[str, list[Call]] = {}
    for call in calls:
        episodes.setdefault(call.episode_id, []).append(call)
    rows: list[Row] = []
    for episode, members in episodes.items():
        reward = (rewards or {}).get(episode)
        rows.extend(_episode(sorted(members, key=lambda call: call.step), advantages, rules, report, reward))
    if rules.longest is not None:
        longest = rules.longest
        report.counts["long"] += sum(len(row.spans) for row in rows if row.tokens > longest)
        rows = [row for row in rows if row.tokens <= longest]
    report.rows = len(rows)
    return rows, report


def _episode(
    calls: Sequence[Call],
    advantages: Mapping[str, float | None],
    rules: Rules,
    report: Report,
    reward: float | None,
) -> list[Row]:
    open_: list[tuple[Row, Call]] = []
    for call in calls:
        advantage = advantages.get(call.span_id)
        reason = _unfit(call, advantage, rules)
        if reason is not None or advantage is None:
            report.counts[reason or "uncredited"] += 1
            continue
        row = _single(call, advantage, rules, report, reward)
        before = _continued(open_, row, rules.merge)
        if before is not None:
            open_[before] = (_merged(open_[before][0], row), call)
            report.counts["merged"] += 1
            continue
        if rules.merge and open_:
            drifted = any(_continues(call, earlier) for _, earlier in open_)
            report.counts["drift" if drifted else "broken"] += 1
        open_.append((row, call))
    return [row for row, _ in open_]


def _unfit(call: Call, advantage: float | None, rules: Rules) -> str | None:
    """Why a call is left out, None where it is not."""
    without_ids = call.prompt_ids is None or call.completion_ids is None
    reasons = {
        "failed": not call.ok,
        "uncredited": advantage is None,
        "choices": not call.single,
        "foreign": rules.ages is not None and call.version not in rules.ages,
        "stale": rules.ages is not None and rules.ages.get(call.version, 0) > rules.max_age,
        "no_ids": without_ids and (rules.tokenise is None or call.answer is None),
        "no_logprobs": rules.logprobs and (without_ids or call.logprobs is None),
        "reshaped": rules.logprobs and not call.sampled,
    }
    return next((name for name, true in reasons.items() if true), None)


def _single(call: Call, advantage: float, rules: Rules, report: Report, reward: float | None) -> Row:
    prompt, completion, logprobs = call.prompt_ids, call.completion_ids, call.logprobs if call.sampled else None
    if (prompt is None or completion is None) and rules.tokenise is not None:
        made = rules.tokenise(call)
        prompt, completion, logprobs = tuple(made[0]), tuple(made[1]), None
        report.counts["from_text"] += 1
    if prompt is None or completion is None:
        raise ValueError("a call without ids is unfit")
    size = len(completion)
    return Row(
        call.episode_id,
        (call.span_id,),
        call.version,
        prompt,
        completion,
        (1,) * size,
        (float(advantage),) * size,
        logprobs,
        reward,
    )


def _continued(open_: Sequence[tuple[Row, Call]], row: Row, merge: bool) -> int | None:
    """The row that this one continues id for id: the longest, each at most once by construction."""
    found, longest = None, 0
    for index, (other, _) in enumerate(open_ if merge else ()):
        size = other.tokens
        same = other.version == row.version and (other.logprobs is None) == (row.logprobs is None)
        if same and longest < size <= len(row.prompt_ids) and _begins(row.prompt_ids, other):
            found, longest = index, size
    return found


def _begins(prompt: tuple[int, ...], other: Row) -> bool:
    middle = len(other.prompt_ids)
    return prompt[:middle] == other.prompt_ids and prompt[middle : other.tokens] == other.completion_ids


def _merged(before: Row, after: Row) -> Row:
    seen = after.prompt_ids[before.tokens :]
    blank = (0,) * len(seen)
    silent = (0.0,) * len(seen)
    logprobs = None
    if before.logprobs is not None and after.logprobs is not None:
        logprobs = before.logprobs + silent + after.logprobs
    return replace(
        before,
        spans=before.spans + after.spans,
        completion_ids=before.completion_ids + seen + after.completion_ids,
        mask=before.mask + blank + after.mask,
        advantages=before.advantages + silent + after.advantages,
        logprobs=logprobs,
    )


def _continues(call: Call, earlier: Call) -> bool:
    """Whether the messages go on where the earlier call's ended, whatever the ids say."""
    size = len(earlier.messages)
    if not size or len(call.messages) <= size or call.messages[:size] != earlier.messages:
        return False
    reply = call.messages[size]
    return reply.get("role") == "assistant" and reply.get("content") == earlier.answer


def matching(
    rows: Sequence[Row],
    scored: Sequence[Sequence[float]],
    report: Report,
    *,
    mean: float = MEAN_GAP,
    most: float = MOST_GAP,
) -> list[Row]:
    """The rows whose logged log-probabilities are those that their version gives, `scored` (T,) for each row.

    The others were not written by the version they claim (a server that mixes adapters up, a wrong label): they are
    counted as `mismatch`, by their calls, and left out. Rows without logged ones are kept.
    """
    kept = []
    for row, found in zip(rows, scored, strict=True):
        if row.logprobs is None or _alike(row, found, mean, most):
            kept.append(row)
        else:
            report.counts["mismatch"] += len(row.spans)
    report.rows = len(kept)
    return kept


def _alike(row: Row, scored: Sequence[float], mean: float, most: float) -> bool:
    if len(scored) != len(row.mask) or row.logprobs is None:
        raise ValueError("one recomputed log-probability for each token is needed")
    gaps = [abs(one - two) for one, two, wrote in zip(row.logprobs, scored, row.mask, strict=True) if wrote]
    return sum(gaps) / len(gaps) <= mean and max(gaps) <= most

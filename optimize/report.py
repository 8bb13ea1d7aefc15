"""The HTML report of a prompt search: one self-contained page, no script, no request to anywhere."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, Protocol

from optimize.gate import Comparison, Verdict

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #656d76; --line: #d0d7de; --paper: #fff; --soft: #f6f8fa;
  --good: #1a7f37; --bad: #cf222e; --blue: #0969da }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #8b949e; --line: #30363d; --paper: #0d1117;
  --soft: #161b22; --good: #3fb950; --bad: #f85149; --blue: #4493f8 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } .dim { color: var(--dim) }
table { border-collapse: collapse; width: 100% } td, th { border-bottom: 1px solid var(--line); padding: .3rem .6rem;
  text-align: left; vertical-align: top } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; border-radius: 6px; margin: 0 }
.side { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem } .badge { padding: .1rem .6rem; border-radius: 1rem;
  color: #fff; background: var(--dim) } .promote { background: var(--good) } .reject { background: var(--bad) }
ins { background: color-mix(in srgb, var(--good) 25%, transparent); text-decoration: none }
del { background: color-mix(in srgb, var(--bad) 25%, transparent) }
.win { color: var(--good) } .loss { color: var(--bad) }
svg text { fill: var(--dim); font-size: 12px } details { margin: .5rem 0 }
"""


@dataclass(frozen=True, slots=True)
class Point:
    """The search's belief after `rollouts`: posterior mean and standard deviation of the best prompt's reward."""

    rollouts: int
    mean: float
    sd: float


@dataclass(frozen=True, slots=True)
class PartRow:
    """One part that was tried: its estimated effect on the reward, and whether the winner has it."""

    text: str
    kind: str
    source: str
    effect: float
    sd: float
    chosen: bool
    reason: str = ""


class Tried(Protocol):
    """A whole prompt that was tried: what `optimize.apo.engine.Candidate` says of it."""

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def parent(self) -> str | None: ...  # noqa: D102
    @property
    def template(self) -> str: ...  # noqa: D102
    @property
    def score(self) -> float | None: ...  # noqa: D102
    @property
    def rollouts(self) -> int: ...  # noqa: D102
    @property
    def reason(self) -> str: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Pair:
    """One held-out task under both prompts."""

    task_id: str
    before: float
    after: float
    answer_before: str = ""
    answer_after: str = ""


@dataclass(frozen=True, slots=True)
class PromptReport:
    """All that the page shows."""

    slot: str
    job_id: str
    seed_template: str
    best_template: str
    verdict: Verdict | None  # None: nothing reached the gate
    outcome: str  # one sentence: what was decided and why
    rollouts: int
    calls: int | None
    seconds: float
    history: Sequence[Point] = ()
    parts: Sequence[PartRow] = ()
    pairs: Sequence[Pair] = ()
    rejected: Sequence[tuple[str, str]] = field(default_factory=tuple)  # (text, reason) refused by the guards
    candidates: Sequence[Tried] = ()
    costs: Mapping[str, Comparison] = field(default_factory=dict)
    notes: Sequence[str] = ()


def write(report: PromptReport, path: Path) -> Path:
    """Write the page; the path comes back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report), encoding="utf-8")
    return path


def as_json(report: PromptReport) -> dict[str, Any]:
    """What the page draws, for programs: lineage, score against rollouts, parts and refusals with their reasons, the
    difference of the prompts, and on how many held-out tasks the new one did better and worse."""
    lines = report.seed_template.splitlines(), report.best_template.splitlines()
    names = ("id", "parent", "template", "score", "rollouts", "reason")
    wins, losses = _wins(report.pairs)
    return {
        "lineage": [{name: getattr(one, name) for name in names} for one in report.candidates],
        "history": [asdict(point) for point in report.history],
        "parts": [asdict(part) for part in report.parts],
        "rejected": [{"text": text, "reason": why} for text, why in report.rejected],
        "diff": list(difflib.unified_diff(*lines, "before", "after", lineterm="")),
        "wins": wins,
        "losses": losses,
    }


def _wins(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Held-out tasks on which the new prompt did better, and worse."""
    return sum(pair.after > pair.before for pair in pairs), sum(pair.after < pair.before for pair in pairs)


def page(report: PromptReport) -> str:
    """The whole document."""
    sections = [_head(report), _evidence(report), _costs(report), _prompts(report), _search(report), _lineage(report)]
    sections += [_parts(report), _tasks(report), _rejected(report)]
    title = f"Ratchet: {escape(report.slot)}"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(sections)}</body></html>"
    )


def _head(report: PromptReport) -> str:
    decision = report.verdict.decision if report.verdict else "no candidate"
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    calls = "" if report.calls is None else f", {report.calls} model calls"
    return (
        f'<h1>{escape(report.slot)} <span class="badge {escape(decision)}">{escape(decision)}</span></h1>'
        f"<p>{escape(report.outcome)}</p>"
        f'<p class="dim">{escape(report.job_id)} · {when} · {report.rollouts} rollouts{calls}, '
        f"{report.seconds:.0f} s</p>" + "".join(f'<p class="dim">{escape(note)}</p>' for note in report.notes)
    )


def _evidence(report: PromptReport) -> str:
    verdict = report.verdict
    if verdict is None:
        return ""
    low, high = verdict.ci95
    row = _cells(
        [f"{verdict.before:.3f}", f"{verdict.after:.3f}", f"{verdict.diff:+.3f}", f"{low:+.3f} to {high:+.3f}"]
    )
    row += _cells([f"{verdict.p_value:.4g}", str(verdict.n)])
    names = ["before", "after", "difference", "95% interval", "p", "tasks"]
    header = "".join(f'<th class="n">{name}</th>' for name in names)
    looked = ", whenever it stops (an e-process; p is 1 / evidence)" if verdict.method == "anytime" else ""
    note = (
        f"Mean reward on held-out tasks, paired; the test allows {verdict.alpha:.0%} false promotions over "
        f"{verdict.candidates_tried} candidate(s) that reached it{looked}."
    )
    table = f"<table><tr>{header}</tr><tr>{row}</tr></table>"
    return f'<h2>Evidence</h2>{table}{_interval(low, verdict.diff, high)}<p class="dim">{note}</p>'


def _interval(low: float, middle: float, high: float) -> str:
    """The interval of the difference on a line, with zero marked."""
    left, right = min(low, 0.0) - 0.05, max(high, 0.0) + 0.05

    def x(value: float) -> float:
        return 20 + 660 * (value - left) / (right - left)

    colour = "var(--good)" if low > 0 else "var(--bad)" if high < 0 else "var(--dim)"
    return (
        f'<svg viewBox="0 0 700 56" width="100%" role="img" aria-label="difference {middle:+.3f}, 95% interval">'
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="40" stroke="var(--dim)" stroke-dasharray="3 3"/>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="22" y2="22" stroke="{colour}" stroke-width="3"/>'
        f'<circle cx="{x(middle):.1f}" cy="22" r="6" fill="{colour}"/>'
        f'<text x="{x(0):.1f}" y="54" text-anchor="middle">no difference</text></svg>'
    )


def _costs(report: PromptReport) -> str:
    if not report.costs:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{_cells([f'{one.ratio:.2f}', f'{one.low:.2f} to {one.high:.2f}'])}"
        f"<td>{ {'held': 'within', 'worse': 'above', 'open': 'not clear of'}[one.verdict] } {one.limit:g}</td></tr>"
        for name, one in report.costs.items()
    )
    header = '<tr><th></th><th class="n">times the old prompt</th><th class="n">interval</th><th>limit</th></tr>'
    return f"<h2>What it costs</h2><table>{header}{rows}</table>"


def _lineage(report: PromptReport) -> str:
    """The prompts as a tree, each under the one that it was made from."""
    if len(report.candidates) < 2:
        return ""
    children: dict[str | None, list[Tried]] = {}
    known = {one.id for one in report.candidates}
    for one in report.candidates:
        children.setdefault(one.parent if one.parent in known else None, []).append(one)
    return f"<h2>Lineage</h2>{_branch(children, None, set())}"


def _branch(children: Mapping[str | None, Sequence[Tried]], parent: str | None, above: set[str]) -> str:
    items = [
        f"<li><details><summary>{escape(one.id)} {_scored(one)}: {escape(one.reason)}</summary>"
        f"<pre>{escape(one.template)}</pre></details>{_branch(children, one.id, {*above, one.id})}</li>"
        for one in children.get(parent, ())
        if one.id not in above
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _scored(one: Tried) -> str:
    score = "" if one.score is None else f"{one.score:.2f}"
    return score + (f" on {one.rollouts} rollouts" if one.rollouts else "")


def _prompts(report: PromptReport) -> str:
    before, after = diff(report.seed_template, report.best_template)
    return (
        '<h2>The prompts</h2><div class="side"><div><p class="dim">before</p>'
        f'<pre>{before}</pre></div><div><p class="dim">after</p><pre>{after}</pre></div></div>'
    )


def diff(before: str, after: str) -> tuple[str, str]:
    """Both texts as HTML, word by word, with what left and what came marked."""
    old, new = (re.findall(r"\s+|[^\s]+", text) for text in (before, after))
    left, right = [], []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        gone, came = escape("".join(old[a:b])), escape("".join(new[c:d]))
        left.append(gone if tag == "equal" else f"<del>{gone}</del>" if gone else "")
        right.append(came if tag == "equal" else f"<ins>{came}</ins>" if came else "")
    return "".join(left), "".join(right)


def _search(report: PromptReport) -> str:
    points = report.history
    if len(points) < 2:
        return ""
    top = max(point.mean + point.sd for point in points)
    bottom = min(point.mean - point.sd for point in points)
    last, span = max(point.rollouts for point in points) or 1, (top - bottom) or 1.0

    def place(rollouts: int, value: float) -> str:
        return f"{50 + 630 * rollouts / last:.1f},{10 + 160 * (top - value) / span:.1f}"

    upper = [place(point.rollouts, point.mean + point.sd) for point in points]
    lower = [place(point.rollouts, point.mean - point.sd) for point in reversed(points)]
    line = [place(point.rollouts, point.mean) for point in points]
    return (
        "<h2>The search</h2>"
        '<svg viewBox="0 0 700 210" width="100%" role="img" aria-label="estimated reward against rollouts">'
        f'<polygon points="{" ".join(upper + lower)}" fill="var(--blue)" opacity=".15"/>'
        f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--blue)" stroke-width="2"/>'
        f'<text x="4" y="16">{top:.2f}</text><text x="4" y="172">{bottom:.2f}</text>'
        f'<text x="50" y="200">0</text><text x="680" y="200" text-anchor="end">{last} rollouts</text></svg>'
        '<p class="dim">Estimated reward of the best prompt so far, with one standard deviation. '
        "An estimate of the search's own; the evidence above is separate.</p>"
    )


def _parts(report: PromptReport) -> str:
    if not report.parts:
        return ""
    rows = (
        f"<tr><td>{'✓' if part.chosen else ''}</td><td>{escape(part.text)}</td><td>{escape(part.kind)}</td>"
        f'<td>{escape(part.source)}</td><td class="n">{part.effect:+.3f} ± {part.sd:.3f}</td>'
        f"<td>{escape(part.reason)}</td></tr>"
        for part in sorted(report.parts, key=lambda part: -part.effect)
    )
    header = '<tr><th>in</th><th>part</th><th>kind</th><th>from</th><th class="n">effect</th><th>why</th></tr>'
    return f"<h2>What was tried</h2><table>{header}{''.join(rows)}</table>"


def _tasks(report: PromptReport) -> str:
    if not report.pairs:
        return ""
    wins, losses = _wins(report.pairs)
    header = (
        '<tr><th>task</th><th class="n">before</th><th class="n">after</th><th>answer before</th><th>after</th></tr>'
    )
    rows = "".join(map(_pair, sorted(report.pairs, key=lambda pair: pair.before - pair.after)))
    return (
        f"<h2>Held-out tasks</h2><p>{wins} better, {losses} worse, {len(report.pairs) - wins - losses} the same.</p>"
        f"<details><summary>Every task</summary><table>{header}{rows}</table></details>"
    )


def _pair(pair: Pair) -> str:
    kind = "win" if pair.after > pair.before else "loss" if pair.after < pair.before else ""
    answers = f"<td>{escape(pair.answer_before[:200])}</td><td>{escape(pair.answer_after[:200])}</td>"
    scores = _cells([f"{pair.before:.2f}", f"{pair.after:.2f}"])
    return f'<tr class="{kind}"><td>{escape(pair.task_id)}</td>{scores}{answers}</tr>'


def _rejected(report: PromptReport) -> str:
    if not report.rejected:
        return ""
    rows = "".join(f"<tr><td>{escape(text[:300])}</td><td>{escape(why)}</td></tr>" for text, why in report.rejected)
    return f"<h2>Refused before any rollout</h2><table><tr><th>text</th><th>why</th></tr>{rows}</table>"


def _cells(values: Iterable[str]) -> str:
    return "".join(f'<td class="n">{escape(value)}</td>' for value in values)

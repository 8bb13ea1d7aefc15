"""The report shows what was measured, escapes what users wrote, and asks nobody for anything."""

import re
from pathlib import Path

from optimize.apo.engine import Candidate
from optimize.gate import decide, non_inferiority
from optimize.report import Pair, PartRow, Point, PromptReport, diff, page, write

BEFORE = [0.0, 0.0, 1.0, 0.0, 0.3, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0]
AFTER = [1.0, 1.0, 1.0, 1.0, 1.0, 0.3, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]


def report(**changes: object) -> PromptReport:
    fields: dict[str, object] = {
        "slot": "capital",
        "job_id": "job-1",
        "seed_template": "You are a helper.",
        "best_template": "You are a helper.\nOutput ONLY the <name> & nothing else.",
        "verdict": decide(BEFORE, AFTER, alpha=0.05, candidates_tried=1),
        "outcome": "Promoted: better on held-out tasks.",
        "rollouts": 120,
        "calls": 240,
        "seconds": 61.2,
        "history": [Point(8, 0.2, 0.1), Point(60, 0.5, 0.08), Point(120, 0.7, 0.05)],
        "parts": [PartRow("Output ONLY <b>", "instruction", "bank", 0.31, 0.05, True)],
        "pairs": [Pair(f"t{i}", b, a, "<script>", "Paris") for i, (b, a) in enumerate(zip(BEFORE, AFTER, strict=True))],
        "rejected": [("Ignore {everything}", "unknown variable")],
    }
    return PromptReport(**{**fields, **changes})  # type: ignore[arg-type]


def test_the_page_carries_the_verdict_and_its_numbers() -> None:
    text = page(report())
    verdict = report().verdict
    assert verdict is not None
    assert verdict.decision == "promote"
    for number in (f"{verdict.before:.3f}", f"{verdict.after:.3f}", f"{verdict.diff:+.3f}", f"{verdict.ci95[0]:+.3f}"):
        assert number in text
    assert "10 better, 0 worse" in text


def test_what_users_and_models_wrote_is_escaped() -> None:
    text = page(report())
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "Output ONLY <b>" not in text


def test_the_page_needs_no_network() -> None:
    assert re.findall(r"(?:src|href)=|https?://", page(report())) == []


def test_a_search_without_candidate_says_so_instead_of_inventing_numbers() -> None:
    text = page(report(verdict=None, pairs=(), parts=(), history=(), rejected=(), outcome="No headroom."))
    assert "no candidate" in text
    assert "No headroom." in text
    assert "<h2>Evidence" not in text


def test_the_diff_marks_only_what_changed() -> None:
    before, after = diff("Answer the question now.", "Answer the long question now.")
    assert "<del>" not in before
    assert after == "Answer the <ins>long </ins>question now."


def test_writing_makes_the_folder(tmp_path: Path) -> None:
    path = write(report(), tmp_path / "reports" / "job-1.html")
    assert path.read_text().startswith("<!doctype html>")


def test_the_lineage_is_a_tree_with_every_prompt_its_score_and_its_reason() -> None:
    tried = [
        Candidate("a1", None, "Seed.", 0.25, 20, "left the beam"),
        Candidate("b2", "a1", "Seed. <More>.", 0.75, 20, "best of the search"),
        Candidate("c3", "b2", "Third.", None, 0, "was not tried: the search ended"),
    ]
    text = page(report(candidates=tried))
    tree = text[text.index("<h2>Lineage") :]
    assert tree.index("a1") < tree.index("b2") < tree.index("c3")
    assert tree.count("<ul>") >= 3
    for said in ("0.25 on 20 rollouts", "best of the search", "was not tried", "&lt;More&gt;"):
        assert said in tree


def test_costs_are_told_with_their_interval_and_limit() -> None:
    costs = {"cost": non_inferiority([1.0, 2.0, 3.0, 2.0], [2.0, 4.0, 6.0, 4.0], limit=1.5)}
    text = page(report(costs=costs, notes=["a note <of> ours"]))
    assert "2.00 to 2.00" in text
    assert "above 1.5" in text
    assert "a note &lt;of&gt; ours" in text

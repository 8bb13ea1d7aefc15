"""The report shows what was measured, escapes what users wrote, and asks nobody for anything."""

import re
from pathlib import Path

from optimize.gate import decide
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

"""What jobs show while they work, and a search at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from optimize.apo.job import Stage
    from optimize.apo.result import ApoResult

NAMES = {"search": "search", "gate": "held-out test"}


class Bars:
    """A context with one progress bar a phase; `names` says which phases have one, and what it is called."""

    def __init__(self, console: Console, job_id: str, names: Mapping[str, str], resume: str | None = None) -> None:
        self._console, self._job, self._names = console, job_id, names
        self._resume = resume or f"ratchet jobs resume {job_id}"
        columns = (TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._console.print(f"job {self._job}   (resume it after a break: {self._resume})", style="dim")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, phase: str, done: int, total: int, message: str = "", note: str = "") -> None:
        """Where the job stands: `done` of `total` of a phase, `note` behind its bar; `message` where there is news."""
        if message:
            self._console.print(escape(message), highlight=False)
        if phase not in self._names or not total:
            return
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task(self._names[phase], total=total, note="")
        self._progress.update(self._bars[phase], completed=done, total=total, note=note)


class Screen(Bars):
    """The bars of a search."""

    def __init__(self, console: Console, job_id: str, resume: str | None = None) -> None:
        super().__init__(console, job_id, NAMES, resume)
        self._best: str | None = None

    def update(self, stage: "Stage") -> None:
        """Show where the job stands."""
        self._say_best(stage)
        message = "" if stage.phase == "done" else stage.message
        belief = _belief(stage) if stage.phase == "search" else ""
        self.show(stage.phase, stage.rollouts, stage.total, message, belief)

    def _say_best(self, stage: "Stage") -> None:
        """The best prompt so far, whenever it is another one; the first is the one to improve."""
        if stage.phase != "search" or stage.search is None or stage.search.best_template == self._best:
            return
        if self._best is not None:
            text = " ".join(stage.search.best_template.split())
            self._console.print(f"best so far: {escape(text[:100])}", style="dim", highlight=False)
        self._best = stage.search.best_template


def _belief(stage: "Stage") -> str:
    search = stage.search
    if search is None:
        return ""
    left = "" if search.eta_seconds is None else f", at most {_duration(search.eta_seconds)} left"
    return f"gain {search.gain:+.2f}, P(gain > 0) {search.p_gain:.2f}, {search.parts} parts{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def show_result(result: "ApoResult", console: Console) -> None:
    """The closing table, both prompts, the verdict and what to do with it."""
    gate = result.gate
    if gate is not None:
        low, high = gate.ci95
        table = Table("", "before", "after", "difference", "95% interval", "p", title=f"{gate.n} held-out tasks")
        means = [f"{gate.before:.3f}", f"{gate.after:.3f}", f"{gate.diff:+.3f}"]
        table.add_row("mean reward", *means, f"{low:+.3f} to {high:+.3f}", f"{gate.p_value:.2g}")
        console.print(table)
        panels = [Panel(Text(text), title=name) for text, name in _prompts(result)]
        console.print(Columns(panels, equal=True, expand=True))
    console.print(f"{_verdict(result)} {escape(result.reason)}", highlight=False)
    calls = "" if result.calls is None else f", {result.calls} model calls"
    console.print(
        f"{result.rollouts} rollouts{calls}, {result.seconds:.0f} s. Report: {result.report}",
        highlight=False,
        soft_wrap=True,
    )
    share = "" if result.verdict == "promote" else " --traffic 0.1"
    for slot, version in result.versions.items() if not result.promoted else ():
        console.print(f"Yours to decide: ratchet promote {slot} {version}{share}", highlight=False)


def _prompts(result: "ApoResult") -> list[tuple[str, str]]:
    names = ", ".join(f"{slot}@{version}" for slot, version in result.versions.items()) or "candidate"
    before = f"{result.slot}@{result.seed_version}" if len(result.versions) < 2 else result.slot
    return [(result.seed_template, before), (result.best_template, names)]


def _verdict(result: "ApoResult") -> str:
    if result.promoted:
        names = ", ".join(f"{slot}@{version}" for slot, version in result.versions.items())
        return f"[bold green]promoted {escape(names)}[/]:"
    colours = {"promote": "green", "shadow": "yellow", "reject": "red"}
    return f"[bold {colours[result.verdict]}]{result.verdict}[/]:"

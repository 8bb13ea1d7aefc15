"""OTLP into the journal: what agents' own instrumentation says becomes spans and rewards, each written once on disk.

Blocks, so it runs in a thread. What a key may not write, and what is no span, is refused item by item and said.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import asdict, dataclass
from typing import Any

from collector import otel_in, otlp
from collector.errors import BadInput, Unavailable
from collector.journal import Journal
from collector.model import Reward
from collector.privacy import Policy
from collector.settings import Redaction

DISK_SECONDS = 30.0
_SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Taken:
    """What became of an export: items stored, refused (with reasons), and log records of no use here."""

    spans: int = 0
    rewards: int = 0
    rejected: int = 0
    ignored: int = 0
    message: str = ""


@dataclass(frozen=True)
class Rights:
    """What the sender may write."""

    spans: bool = True
    rewards: bool = True


def take(
    journal: Journal,
    body: bytes,
    kind: str,
    signal: otlp.Signal,
    rights: Rights | None = None,
    rules: Redaction | None = None,
) -> Taken:
    """Store the spans of an export and the evaluations among them; returns once all of it is on disk.

    `rules` say how much of a span is kept; its route is /v1/traces.

    Raises BadPayload (nothing stored) and Unavailable (send it all again: what is stored already is known by its id).
    """
    rights = rights or Rights()
    batch = otlp.read(body, kind, signal)
    return (
        _traces(journal, batch, rights, rules or Redaction()) if signal == "traces" else _logs(journal, batch, rights)
    )


def _traces(journal: Journal, batch: otlp.Batch, rights: Rights, rules: Redaction) -> Taken:
    judged, faults = otel_in.rewards(batch.spans)
    if judged and not rights.rewards:
        faults = [*faults, f"{len(judged)} evaluations: the key lacks the scope `reward`"]
        judged = []
    rows = kept(otel_in.rows(batch.spans, emails=rules.emails), rules)
    _write(journal, [("otlp", row) for row in rows], judged)
    return Taken(len(rows), len(judged), len(batch.faults), 0, _message([*batch.faults, *faults]))


def kept(rows: Sequence[otel_in.Observed], rules: Redaction) -> Sequence[Any]:
    """The rows as lines: as much of each as the rules of `store.redaction` leave."""
    policy = Policy.of(rules)
    if policy is None:
        return rows
    lines = [asdict(row) for row in rows]
    for line in lines:
        policy.apply(line)
    return lines


def _logs(journal: Journal, batch: otlp.Batch, rights: Rights) -> Taken:
    """Evaluations are kept; other records are of no use here, and no fault of the sender's."""
    events = [event for event in batch.logs if event.name == otel_in.EVALUATION]
    judged: list[Reward] = []
    faults = list(batch.faults)
    for event in events:
        try:
            if not rights.rewards:
                raise BadInput("an evaluation: the key lacks the scope `reward`")
            judged.append(otel_in.evaluation(event))
        except BadInput as error:
            faults.append(error.message)
    _write(journal, [], judged)
    return Taken(0, len(judged), len(faults), len(batch.logs) - len(events), _message(faults))


def _write(journal: Journal, spans: Sequence[tuple[str, Any]], judged: Sequence[Reward]) -> None:
    lines: list[Future[None]] = [journal.append_durable(event, row) for event, row in spans]
    lines += [journal.append_durable("reward", reward) for reward in judged]
    for line in lines:
        try:
            line.result(DISK_SECONDS)
        except FutureTimeout:
            raise Unavailable(f"the disk did not answer within {DISK_SECONDS:g} s") from None


def _message(faults: Sequence[str]) -> str:
    shown = "; ".join(dict.fromkeys(faults[:_SHOWN_FAULTS]))
    more = len(faults) - _SHOWN_FAULTS
    return f"{shown}; and {more} more" if more > 0 else shown

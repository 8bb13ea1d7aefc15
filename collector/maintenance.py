"""Care of the store: is everything of the journal in the projection, and making the projection anew."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from collector import archive, journal
from collector.client import Client
from collector.errors import Unavailable
from collector.loader import QUARANTINE, Loader, kind, sift
from collector.lock import DirectoryLock, refuse_a_store
from collector.service import DATABASE
from collector.settings import Settings
from collector.stores import open_store

# Events of which a repeated one is stored once, and the field by which it is known.
_UNIQUE = {"reward": "reward_id", "evaluation": "evaluation_id", "otlp": "span_id"}
# Rows and segments in one statement, so that a server which goes on loading cannot come in between.
_STATE = """
SELECT 'row', 'span', (SELECT count(*) FROM spans) + (SELECT count(*) FROM echoes)
UNION ALL SELECT 'row', 'reward', count(*) FROM rewards UNION ALL SELECT 'row', 'version', count(*) FROM versions
UNION ALL SELECT 'row', 'candidate', count(*) FROM candidates
UNION ALL SELECT 'row', 'deployment', count(*) FROM deployments
UNION ALL SELECT 'row', 'evaluation', count(*) FROM evaluations UNION ALL SELECT 'row', 'job', count(*) FROM jobs
UNION ALL SELECT 'row', 'payload', count(*) FROM payloads_v UNION ALL SELECT 'row', 'key', count(*) FROM keys
UNION ALL SELECT 'segment', name, quarantined FROM _segments
"""
_MANY = 10_000_000


@dataclass
class Report:
    """What `verify` found. `journal` and `store` count rows per kind of event; equal is right."""

    segments: int = 0
    not_loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # loaded, but no longer in the journal
    archived: int = 0  # days in the archive
    damaged: list[str] = field(default_factory=list)  # files of the archive that are not as they were written
    broken: int = 0  # lines whose checksum is wrong
    quarantined: int = 0
    journal: dict[str, int] = field(default_factory=dict)
    store: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether the projection holds what the journal says, no more and no less."""
        return not (self.missing or self.not_loaded or self.damaged) and self.journal == self.store


def verify(directory: Path, client: Client) -> Report:
    """Read the whole journal and archive again, check every line and file, and compare with the rows of the store."""
    before = {path.stem for path in directory.glob("*" + journal.SEALED)}
    client.flush()
    state = client.query(_STATE, _MANY)["rows"]
    loaded = {name: count for what, name, count in state if what == "segment"}
    rows = {name: count for what, name, count in state if what == "row"}
    report = Report(segments=len(loaded), quarantined=sum(loaded.values()), store=rows)
    report.not_loaded = sorted(before - set(loaded))
    counts: Counter[str] = Counter()
    seen: set[tuple[str, str]] = set()
    _count_archive(directory.parent / archive.FOLDER, report, counts, seen)
    for name, quarantined in loaded.items():
        path = directory / (name + journal.SEALED)
        if not path.exists():
            report.missing.append(name)
            continue
        good, bad = sift(path.read_bytes())
        report.broken += len(bad)
        refused = _refused(directory, name) if quarantined else set()
        counts.update(_kinds([line for line in good if line not in refused], seen))
    counts["payload"] = counts["span"]
    report.journal = {name: counts[name] for name in rows}
    return report


def _count_archive(folder: Path, report: Report, counts: Counter[str], seen: set[tuple[str, str]]) -> None:
    """What the archived days hold, and whether their files are whole."""
    days = archive.Archive(folder)
    for part in days.parts():
        report.archived += 1
        report.damaged += [f"{part.name}/{name}" for name in days.damaged(part)]
        events = days.file(part, archive.EVENTS)
        counts.update(_kinds(sift(events.read_bytes())[0] if events.exists() else [], seen))
        if not part.retained:
            counts["span"] += part.rows["spans"] + part.rows["echoes"]
            counts["reward"] += part.rows["rewards"]
            seen.update(("reward", one) for one in days.column(part, "rewards", "reward_id"))
            for table in ("spans", "echoes"):
                seen.update(("otlp", one) for one in days.column(part, table, "span_id"))


def _kinds(lines: list[bytes], seen: set[tuple[str, str]]) -> Counter[str]:
    """Lines per kind, repeated rewards and evaluations left out; `seen` grows."""
    counts: Counter[str] = Counter()
    for line in lines:
        event = kind(line)
        if event in _UNIQUE:
            key = (event, str(journal.decode(line).get(_UNIQUE[event])))
            if key in seen:
                continue
            seen.add(key)
        counts["span" if event == "otlp" else event] += 1
    return counts


def _refused(directory: Path, name: str) -> set[bytes]:
    """Lines of a segment that are whole, but that the schema did not take."""
    path = directory / QUARANTINE / f"{name}.bad"
    return set(sift(path.read_bytes())[0]) if path.exists() else set()


def rebuild(settings: Settings) -> Mapping[str, tuple[int, int]]:
    """Make the projection anew from the journal and put it in the place of the old one.

    Returns `Store.content` of the new one. Raises Conflict while a server has the directory, Unavailable when the
    journal could not be read to its end; then the old one stays.
    """
    data_dir = settings.store.data_dir
    directory = data_dir / journal.FOLDER
    refuse_a_store(data_dir)
    lock = DirectoryLock(data_dir)
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        fresh = data_dir / f"{DATABASE}.new"
        _remove(fresh)
        store = open_store(fresh, directory, settings.store, settings.rewards.weights)
        try:
            loader = Loader(store, directory)
            loader.adopt()
            loader.load_once()
            if loader.counters.errors:
                raise Unavailable(f"the journal could not be loaded: {loader.counters.last_error}")
            content = store.content()
        finally:
            store.close()
        # The old log first: it must never be applied to the new file. Without it the old file is merely behind.
        _wal(data_dir / DATABASE).unlink(missing_ok=True)
        fresh.replace(data_dir / DATABASE)
        journal.sync_directory(data_dir)
        return content
    finally:
        lock.release()


def _wal(path: Path) -> Path:
    return path.with_name(path.name + ".wal")


def _remove(path: Path) -> None:
    for one in (path, _wal(path)):
        one.unlink(missing_ok=True)

"""Segments of other hosts are in the journal once, whole, or not at all."""

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from collector.errors import Unavailable
from collector.inbox import Inbox
from collector.journal import encode
from collector.part import Garbled, Part, Refused, parts
from collector.service import Collector
from tests.unit.collector.days import DAY_NS, write_day
from tests.unit.collector.rows import call, scalar, settings
from tests.unit.collector.serving import served

NAME = "1795400000000000000-0a1b2c3d-worker0-77-01234567"


class Nothing:
    """A loader that has loaded nothing."""

    def is_loaded(self, name: str) -> bool:
        return False


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "journal").mkdir()
    return tmp_path / "journal"


@pytest.fixture
def inbox(folder: Path) -> Inbox:
    return Inbox(folder, Nothing())


def pieces(tmp_path: Path, content: bytes, size: int = 1 << 20) -> Iterator[tuple[Part, bytes]]:
    source = tmp_path / "source"
    source.write_bytes(content)
    return parts(source, size)


def lines(*numbers: int) -> bytes:
    return b"".join(encode("span", call(number)) for number in numbers)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_segment_in_parts_is_there_when_the_last_one_is(inbox: Inbox, folder: Path, tmp_path: Path) -> None:
    content = lines(1, 2, 3)
    answers = [inbox.take(NAME, *piece) for piece in pieces(tmp_path, content, 500)]
    assert answers == [*[False] * (len(answers) - 1), True]
    assert len(answers) > 2
    assert names(folder) == [f"{NAME}.ndjson"]
    assert (folder / f"{NAME}.ndjson").read_bytes() == content


def test_sent_again_it_is_known_and_other_bytes_are_refused(inbox: Inbox, folder: Path, tmp_path: Path) -> None:
    for _ in range(3):
        assert inbox.take(NAME, *next(pieces(tmp_path, lines(1))))
    with pytest.raises(Refused, match="other bytes"):
        inbox.take(NAME, *next(pieces(tmp_path, lines(2))))
    assert (folder / f"{NAME}.ndjson").read_bytes() == lines(1)
    assert inbox.stats() == {"segments": 1, "bytes": len(lines(1)), "known": 2, "refused": 1}


def test_a_missing_part_or_a_wrong_checksum_stores_nothing(inbox: Inbox, folder: Path, tmp_path: Path) -> None:
    sent = list(pieces(tmp_path, lines(1, 2), 500))
    with pytest.raises(Unavailable, match="first byte"):
        inbox.take(NAME, *sent[1])
    part, packed = next(pieces(tmp_path, lines(1)))
    with pytest.raises(Garbled, match="checksum"):
        inbox.take(NAME, Part(part.start, part.end, part.total, "0" * 64), packed)
    assert names(folder) == []


def test_a_registrys_events_come_from_no_other_host(inbox: Inbox, folder: Path, tmp_path: Path) -> None:
    for event in ("deployment", "version", "key"):
        with pytest.raises(Refused, match=f"{event} events"):
            inbox.take(NAME, *next(pieces(tmp_path, lines(1) + encode(event, {"slot": "a"}))))
    assert names(folder) == []


@pytest.mark.parametrize("name", ["../evil", "x.ndjson", "", NAME + "/..", NAME.upper(), NAME[1:]])
def test_only_names_of_sent_segments_are_taken(inbox: Inbox, folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(Garbled):
        inbox.take(name, *next(pieces(tmp_path, lines(1))))
    assert names(folder) == []


def test_a_full_disk_is_said_and_leaves_nothing(
    inbox: Inbox, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    piece = next(pieces(tmp_path, lines(1)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(Unavailable, match="No space left"):
            inbox.take(NAME, *piece)
    assert names(folder) == []
    assert inbox.take(NAME, *piece)


def test_a_second_request_for_what_is_being_received_has_to_wait(
    inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(fd: int, data: bytes, at: int) -> int:
        writing.set()
        assert go_on.wait(10)
        return pwrite(fd, data, at)

    piece = next(pieces(tmp_path, lines(1)))
    monkeypatch.setattr(os, "pwrite", slow)
    first = threading.Thread(target=inbox.take, args=(NAME, *piece))
    first.start()
    assert writing.wait(10)
    with pytest.raises(Unavailable, match="being received"):
        inbox.take(NAME, *piece)
    go_on.set()
    first.join()
    assert inbox.take(NAME, *piece), "it is known"
    assert inbox.stats()["segments"] == 1


def test_what_was_loaded_and_archived_long_ago_is_still_known(tmp_path: Path) -> None:
    data = tmp_path / "data"
    path = write_day(data, 3, call(1), role="0a1b2c3d-worker0")
    piece = next(parts(path))
    collector = Collector(settings(data), background=False)
    try:
        collector.flush()
        assert collector.compact(1)["spans"] == 1
        assert not path.exists()
        assert collector.inbox.take(path.stem, *piece)
        collector.flush()
        assert scalar(collector, "SELECT count(*) FROM spans") == 1
        late = f"{int(path.stem[:19]) - DAY_NS:019d}{path.stem[19:]}"
        assert collector.inbox.take(late, *next(pieces(tmp_path, lines(2))))
        collector.flush()
        assert scalar(collector, "SELECT count(*) FROM spans") == 2, "what comes late for an archived day is taken"
    finally:
        collector.close()


def test_the_archive_is_asked_once_a_segment_and_not_for_each_part(
    inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Inbox, "_is_archived", lambda _, name: asked.append(name))
    sent = list(pieces(tmp_path, lines(1, 2, 3), 500))
    assert [inbox.take(NAME, *piece) for piece in sent] == [*[False] * (len(sent) - 1), True]
    assert len(sent) > 2
    assert asked == [NAME]


def test_over_http_it_is_stored_loaded_and_answered_as_such(tmp_path: Path) -> None:
    collector = Collector(settings(tmp_path / "data"), background=False)
    try:
        with served(collector) as transport, httpx.Client(transport=transport, base_url="http://c") as http:
            sent = list(pieces(tmp_path, lines(1, 2, 3), 500))
            answers = [
                http.put(f"/api/segments/{NAME}", content=packed, headers=part.headers).status_code
                for part, packed in sent
            ]
            assert answers == [*[202] * (len(sent) - 1), 200]
            part, packed = next(pieces(tmp_path, lines(4)))
            refused = http.put(f"/api/segments/{NAME}", content=packed, headers=part.headers)
            assert (refused.status_code, refused.json()["error"]["code"]) == (409, "segment_refused")
            assert http.put(f"/api/segments/{NAME}", content=b"").status_code == 400
            assert http.post("/api/flush").json() == {"loaded": 1, "pending": 0}
            assert http.get("/api/stats").json()["inbox"]["segments"] == 1
        assert scalar(collector, "SELECT count(*) FROM spans") == 3
    finally:
        collector.close()

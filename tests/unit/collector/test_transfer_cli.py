import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from collector.transfer_cli import _since
from ratchet import app
from tests.unit.collector.formats.test_foreign import FILES
from tests.unit.collector.formats.world import filled, opened
from tests.unit.collector.rows import settings
from tests.unit.collector.serving import served


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    for name in ("RATCHET_URL", "RATCHET_DATA_DIR", "RATCHET_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    yield filled(tmp_path / "data")


def test_lines_go_to_standard_output_unless_told_otherwise(data_dir: Path) -> None:
    done = run("export", "--data-dir", str(data_dir))
    assert done.exit_code == 0
    assert len([json.loads(line) for line in done.stdout.splitlines()]) == 6
    told = run("export", "--out", "all.jsonl", "--slot", "s", "--json", "--data-dir", str(data_dir))
    assert json.loads(told.stdout) == {"path": "all.jsonl", "episodes": 1}
    assert [path.name for path in Path().glob("*.jsonl")] == ["all.jsonl"]


def test_what_was_exported_is_imported_once(data_dir: Path) -> None:
    for kind, out in (("jsonl", "a.jsonl"), ("otlp", "b.jsonl"), ("parquet", "tables")):
        assert run("export", "--format", kind, "--out", out, "--data-dir", str(data_dir)).exit_code == 0
    seen = [
        json.loads(run("import", out, "--json", "--data-dir", "copy").stdout)
        for out in ("a.jsonl", "b.jsonl", "tables")
    ]
    assert [(one["spans"], one["rewards"], one["known"]) for one in seen] == [(13, 4, 0), (0, 0, 17), (0, 0, 17)]


def test_a_folder_for_datasets_has_a_card(data_dir: Path) -> None:
    done = run("export", "--format", "hf", "--form", "prompt-completion", "--json", "--data-dir", str(data_dir))
    assert json.loads(done.stdout)["rows"] == 4
    assert "prompt-completion" in Path("ratchet-export/README.md").read_text()


def test_bad_lines_are_named_and_the_exit_code_says_so(data_dir: Path) -> None:
    done = run("import", str(FILES / "openai-log.jsonl"), "--data-dir", str(data_dir))
    assert done.exit_code == 1
    assert "line 7" in done.stderr
    assert "6 spans" in done.stderr
    Path("nothing.jsonl").write_text("nope\n")
    assert run("import", "nothing.jsonl", "--data-dir", str(data_dir)).exit_code == 2
    Path("empty.jsonl").write_text("")
    assert run("import", "empty.jsonl", "--data-dir", str(data_dir)).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("export", "--format", "csv"), "--format"),
        (("export", "--format", "hf", "--form", "dpo"), "--form"),
        (("export", "--since", "yesterday"), "--since"),
        (("export", "--episodes", "a", "--slot", "s"), "--episodes"),
        (("export", "--format", "parquet", "--out", "file"), "--out"),
        (("import", "missing.jsonl"), "missing.jsonl"),
        (("import", "file", "--format", "csv"), "--format"),
    ],
)
def test_bad_input_is_named(data_dir: Path, arguments: tuple[str, ...], named: str) -> None:
    Path("file").write_text("")
    done = run(*arguments, "--data-dir", str(data_dir))
    assert (done.exit_code, named in done.stderr) == (2, True)


def test_a_running_server_is_exported_and_imported_alike(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from collector.client import Remote
    from collector.service import Collector

    collector = Collector(settings(data_dir))
    with served(collector) as transport:
        monkeypatch.setattr("collector.cli.open_client", lambda *_: Remote("http://collector", transport=transport))
        assert run("export", "--out", "a.jsonl").exit_code == 0
        told = json.loads(run("import", "a.jsonl", "--json").stdout)
        more = json.loads(run("import", str(FILES / "langfuse-observations.jsonl"), "--json").stdout)
    collector.close()
    assert (told["spans"], told["known"], more["spans"]) == (0, 17, 3)
    local = opened(data_dir)
    assert local.episode("5b8efff798038103d269b633813fc60c")["steps"][0]["model"] == "gpt-4o-mini"
    local.close()


def test_an_age_and_a_time_are_moments() -> None:
    assert _since("2023-11-14T22:13:20Z") == 1_700_000_000_000_000_000
    assert abs(_since("2h") - (time.time_ns() - 7_200_000_000_000)) < 60_000_000_000

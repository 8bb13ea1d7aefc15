import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from collector import cli
from collector.client import Local
from collector.console import command
from collector.errors import BadInput, Conflict
from tests.unit.collector.rows import call, settings, write

app = typer.Typer()
for name in ("episodes", "slots", "versions", "store", "jobs"):
    app.add_typer(getattr(cli, f"{name}_app"), name=name)
app.command(context_settings={"ignore_unknown_options": True})(cli.reward)  # as ratchet.py mounts it
for function in (cli.promote, cli.rollback, cli.query):
    app.command()(function)

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("collector.settings.DEFAULT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("RATCHET_URL", raising=False)
    monkeypatch.setenv("RATCHET_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, call(1, prompt_slot="capital", prompt_version=1), call(2, status="error", error_type="timeout"))
    local = Local(tmp_path, settings(tmp_path))
    local.add_version("capital", template="You help with\n[bold]maps[/bold].")
    local.add_version("capital", template="You help with\ncapitals.", note="shorter")
    local.events([{"event": "job", "job_id": "j-1", "kind": "apo", "status": "done", "spec": "{}", "ts_ns": 1}])
    local.close()
    runner = CliRunner()

    def invoke(*arguments: str) -> Result:
        return runner.invoke(app, arguments)

    return invoke


def read(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_every_reading_command_speaks_json(run: Run) -> None:
    assert read(run("episodes", "list", "--json"))["episodes"][0]["episode_id"] == "ep-a"
    assert len(read(run("episodes", "show", "ep-a", "--json"))["steps"]) == 2
    assert read(run("episodes", "show", "ep-a", "--otlp"))["resourceSpans"]
    assert read(run("slots", "list", "--json"))["slots"][0]["live"] == {"1": 1.0}
    assert len(read(run("slots", "show", "capital", "--json"))["deployments"]) == 1
    assert len(read(run("versions", "list", "capital", "--json"))["versions"]) == 2
    assert read(run("versions", "show", "capital", "2", "--json"))["note"] == "shorter"
    assert run("versions", "show", "capital", "1", "--raw").stdout == "You help with\n[bold]maps[/bold]."
    assert "-[bold]maps[/bold]." in read(run("versions", "diff", "capital", "1", "2", "--json"))["diff"]
    assert read(run("jobs", "list", "--json"))["jobs"][0]["job_id"] == "j-1"
    assert read(run("jobs", "show", "j-1", "--json"))["status"] == "done"
    assert read(run("query", "SELECT 1 AS one", "--json"))["rows"] == [[1]]
    assert read(run("store", "verify", "--json"))["ok"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("episodes", "list"), ["ep-a", "capital@1", "error"]),
        (("episodes", "show", "ep-a"), ["step 0", "question 1", "timeout"]),
        (("slots", "list"), ["capital", "@1 100%"]),
        (("slots", "show", "capital"), ["initial", "shorter"]),
        (("versions", "list", "capital"), ["[bold]maps", "shorter"]),
        (("versions", "show", "capital", "1"), ["[bold]maps[/bold]."]),
        (("versions", "diff", "capital", "1", "2"), ["+capitals.", "-[bold]maps"]),
        (("versions", "diff", "capital", "1", "1"), ["no difference"]),
        (("jobs", "list"), ["j-1", "done"]),
        (("jobs", "show", "j-1"), ["apo"]),
        (("query", "SELECT range AS n FROM range(200)", "--limit", "3"), ["n", "only the first 3 rows"]),
        (("store", "verify"), ["the store holds what the journal says"]),
        (("store", "rebuild"), ["span"]),
    ],
)
def test_every_reading_command_speaks_to_people(run: Run, arguments: tuple[str, ...], words: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    for word in words:
        assert word in result.output


def test_a_reward_goes_to_its_target(run: Run) -> None:
    stored = run("reward", "0.5", "--episode", "ep-a", "--explanation", "fine", "--key", "k")
    assert stored.output.startswith("stored rw-")
    run("reward", "-1", "--response", "chatcmpl-1", "--name", "style")
    rewards = read(run("episodes", "show", "ep-a", "--json"))["rewards"]
    assert [(row["name"], row["value"], row["source"]) for row in rewards] == [
        ("reward", 0.5, "human"),
        ("style", -1.0, "human"),
    ]
    assert "0.5" in run("episodes", "list").output


def test_promote_and_rollback_say_what_is_live(run: Run) -> None:
    assert "@2 25%, @1 75%" in run("promote", "capital", "2", "--traffic", "0.25").output
    back = read(run("rollback", "capital", "--note", "oops", "--json"))
    assert back == {"slot": "capital", "revision": 3, "live": {"1": 1.0}}
    assert run("rollback", "capital").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("episodes", "show", "none"), 1, "no episode"),
        (("episodes", "list", "--status", "odd"), 2, "ok or error"),
        (("reward", "1"), 2, "exactly one of"),
        (("reward", "nan", "--episode", "e"), 2, "finite"),
        (("promote", "none", "1"), 1, "no slot"),
        (("promote", "capital", "2", "--traffic", "7"), 2, "traffic"),
        (("query", "DROP TABLE spans"), 2, "only SELECT"),
        (("episodes", "list", "--url", "http://127.0.0.1:9"), 1, "is `ratchet serve` running?"),
        (("store", "rebuild", "--config", "/none.yaml"), 2, "no configuration"),
        (("jobs", "show", "none"), 1, "no job"),
        (("episodes", "list", "--nonsense"), 2, ""),
    ],
)
def test_failures_have_their_exit_code_and_one_clear_line(
    run: Run, arguments: tuple[str, ...], code: int, word: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == code
    assert word in result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_store_in_use_is_not_done(run: Run, tmp_path: Path) -> None:
    local = Local(tmp_path, settings(tmp_path))
    result = run("store", "rebuild")
    local.close()
    assert result.exit_code == 1
    assert "a server is using" in result.output


def test_a_store_that_differs_is_not_done(run: Run, tmp_path: Path) -> None:
    segment = sorted((tmp_path / "journal").glob("*.ndjson"))[0]
    segment.unlink()
    result = run("store", "verify")
    assert result.exit_code == 1
    assert segment.stem in result.output


def test_verify_reads_the_journal_of_the_server_it_asks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RATCHET_DATA_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(cli, "open_client", lambda url, data_dir: Local(tmp_path, settings(tmp_path)))
    report = read(run("store", "verify", "--url", "http://server", "--json"))
    assert (report["ok"], report["journal"]["span"]) == (True, 2)


def test_empty_stores_say_what_to_do(tmp_path: Path, run: Run) -> None:
    empty = str(tmp_path / "empty")
    assert "OPENAI_BASE_URL" in run("episodes", "list", "--data-dir", empty).output
    assert "No slot yet" in run("slots", "list", "--data-dir", empty).output


@pytest.mark.parametrize(
    ("error", "code"), [(BadInput("x", param="p"), 2), (Conflict("[red]x"), 1), (KeyboardInterrupt(), 130)]
)
def test_errors_become_exit_codes(error: BaseException, code: int) -> None:
    @command
    def failing() -> None:
        raise error

    with pytest.raises(typer.Exit) as caught:
        failing()
    assert caught.value.exit_code == code

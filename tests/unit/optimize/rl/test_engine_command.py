import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from collector.errors import BadInput
from optimize.rl.cli import model_directory

COMMAND = [sys.executable, "-c", "import ratchet; ratchet.main()", "engine", "--threads", "1"]


def run(*options: str) -> Any:
    return subprocess.run([*COMMAND, *options], capture_output=True, text=True, timeout=60)


@contextmanager
def started(directory: Path, **options: Any) -> Iterator[tuple[Any, str]]:
    """The command with a tiny model, and the URL of its ready line."""
    command = [*COMMAND, "--model", str(directory), "--port", "0"]
    if "pass_fds" in options:
        command += ["--parent-fd", str(options["pass_fds"][0])]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert process.stdout
    try:
        ready = process.stdout.readline().strip()
        assert ready.startswith("tiny ready at http://127.0.0.1:")
        assert ready.endswith("/v1")
        yield process, ready.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_model_is_the_demo_model_or_a_local_directory(tmp_path: Path) -> None:
    assert model_directory(str(tmp_path), tmp_path) == tmp_path
    with pytest.raises(BadInput, match="local directory of safetensors"):
        model_directory("someone/else", tmp_path)


def test_the_engine_prints_one_line_and_ends_cleanly_when_interrupted(tiny_directory: Path) -> None:
    with started(tiny_directory) as (process, url):
        answer = httpx.post(f"{url}/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2}, timeout=30)
        assert answer.json()["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""


def test_the_engine_ends_when_its_parent_does(tiny_directory: Path) -> None:
    read, write = os.pipe()
    with started(tiny_directory, pass_fds=(read,)) as (process, _):
        os.close(read)
        os.close(write)
        assert process.wait(20) == 0


def test_bad_input_is_named_with_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = run("--model", str(tmp_path), "--port", str(taken.getsockname()[1]))
    assert busy.returncode == 2
    assert "cannot listen on" in busy.stderr
    empty = run("--model", str(tmp_path), "--port", "0", "--adapter", "nonsense")
    assert empty.returncode == 2
    assert "write NAME=DIRECTORY" in empty.stderr

"""The built-in engine with the real model, as its own process, asked by the OpenAI client."""

import concurrent.futures
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("torch", reason="the local model needs the extra `demo`")
pytest.importorskip("gguf", reason="the local model needs the extra `demo`")
pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "gemma-3-270m"
SHOTS = (
    "You are a geography helper.\n\nQuestion: Capital of Poland?\nAnswer: Warsaw\n\n"
    "Question: Capital of Egypt?\nAnswer: Cairo\n\nQuestion: Capital of Peru?\nAnswer: Lima\n\n"
    "Question: Capital of Thailand?\nAnswer: Bangkok"
)
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    data = os.environ.get("RATCHET_DATA_DIR", str(ROOT / "data"))
    command = [sys.executable, "-c", "import ratchet; ratchet.main()", "engine", "--port", "0", "--data-dir", data]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout
    try:
        ready = process.stdout.readline()
        assert ready.startswith(f"{MODEL} ready at ")
        yield openai.OpenAI(base_url=ready.split()[-1], api_key="none", timeout=300)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(client: openai.OpenAI, country: str, system: str = SHOTS, **options: Any) -> Any:
    messages: Any = [{"role": "system", "content": system}, {"role": "user", "content": f"Capital of {country}?"}]
    settings = {"temperature": 0, "max_tokens": 16, "extra_body": {"return_token_ids": True}} | options
    return client.chat.completions.create(model=MODEL, messages=messages, **settings)


def test_the_model_knows_capitals_when_shown_how_to_answer(client: openai.OpenAI) -> None:
    answers = {country: ask(client, country).choices[0].message.content for country in CAPITALS}
    assert answers == CAPITALS


def test_greedy_answers_are_the_same_alone_and_in_company(client: openai.OpenAI) -> None:
    asked = [(country, system) for system in (SHOTS, "You are a geography helper.") for country in CAPITALS]
    alone = [ask(client, *question).choices[0].token_ids for question in asked]
    company = [("Brazil", "Write a long story.", {"temperature": 1.0, "stop": [], "max_tokens": 40})] * 2
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        others = [pool.submit(ask, client, country, system, **options) for country, system, options in company]
        together = list(pool.map(lambda question: ask(client, *question).choices[0].token_ids, asked))
    assert together == alone
    assert all(other.result().usage.completion_tokens == 40 for other in others)


def test_a_stream_carries_the_same_answer(client: openai.OpenAI) -> None:
    whole = ask(client, "France")
    chunks = list(ask(client, "France", stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Paris"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_seeded_sample_repeats_in_company(client: openai.OpenAI) -> None:
    options = {"temperature": 1.0, "seed": 5, "stop": [], "max_tokens": 12}
    one = ask(client, "France", **options).choices[0].token_ids
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        again = [pool.submit(ask, client, "France", **options) for _ in range(3)]
    assert [answer.result().choices[0].token_ids for answer in again] == [one] * 3

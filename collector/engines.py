"""Engines that serve adapters: a version is loaded and tried there before any call is routed to it, and leaves last.

A version goes by a name that is never used for anything else (`served_name`), so what was recorded is what answered.
The way: load under the new name, canary, deploy for new episodes, keep while old episodes may use it, unload. The
routes are vLLM's (`load_lora_adapter`, `unload_lora_adapter`), which the built-in engine speaks too.
"""

import logging
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import orjson

from collector.errors import BadInput, RatchetError
from collector.settings import EngineEntry

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)
CANARY_FILE = "canary.json"
# Greatest difference to the logprobs that the trainer measured under the same adapter: mean and single token.
MEAN_GAP, LARGEST_GAP = 0.03, 0.13


class EngineFailed(RatchetError):
    """An engine could not be reached, or refused."""

    status = 502
    code = "engine_failed"


class Served(NamedTuple):
    """An adapter version as an engine knows it."""

    base_model: str
    name: str
    path: Path


class Engine(Protocol):
    """What is asked of an engine. Every call raises EngineFailed; none is made on an event loop."""

    base_model: str

    def models(self) -> list[str]:
        """The names served now."""

    def load(self, name: str, path: Path) -> None:
        """Serve the adapter in `path` under a new name."""

    def unload(self, name: str) -> None:
        """Stop serving it, once the last answer with it has ended."""

    def logprobs(self, name: str, prompt: str, tokens: int) -> tuple[str, list[float]]:
        """The greedy answer to `prompt`, at most `tokens` long, and each token's logprob."""

    def close(self) -> None:
        """Let go of it."""


class HttpEngine:
    """An engine behind an OpenAI endpoint with vLLM's adapter routes: the built-in one."""

    def __init__(self, entry: EngineEntry) -> None:
        import httpx  # who has no engine starts without it

        self.base_model = entry.base_model
        self.url = entry.api_base.rstrip("/")
        headers = {"authorization": f"Bearer {entry.api_key}"} if entry.api_key else {}
        self._client = httpx.Client(timeout=entry.timeout, headers=headers, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def models(self) -> list[str]:
        """GET /models."""
        return [str(entry["id"]) for entry in self._call("GET", "models")["data"]]

    def load(self, name: str, path: Path) -> None:
        """POST /load_lora_adapter."""
        self._call("POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(path)})

    def unload(self, name: str) -> None:
        """POST /unload_lora_adapter."""
        self._call("POST", "unload_lora_adapter", {"lora_name": name})

    def logprobs(self, name: str, prompt: str, tokens: int) -> tuple[str, list[float]]:
        """POST /completions."""
        body = {"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        choice = self._call("POST", "completions", body)["choices"][0]
        return str(choice["text"]), [float(one) for one in (choice["logprobs"] or {}).get("token_logprobs") or []]

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        import httpx

        try:
            answer = self._client.request(method, f"{self.url}/{path}", json=body)
            answer.raise_for_status()
            return answer.json() if answer.headers.get("content-type", "").startswith("application/json") else None
        except httpx.HTTPStatusError as error:
            raise EngineFailed(f"the engine at {self.url} refused {path}: {_why(error.response)}") from None
        except (httpx.HTTPError, ValueError) as error:
            raise EngineFailed(f"the engine at {self.url} can't be used: {error}; is it running?") from None


class Engines:
    """The configured engines. Any thread may call; `ready` and `settle` exclude each other."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines
        self._lock = threading.Lock()
        self._state: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        """Let go of all."""
        for engine in self._engines:
            engine.close()

    def serving(self, base_model: str) -> list[Engine]:
        """Those that serve a base model."""
        return [engine for engine in self._engines if engine.base_model == base_model]

    def ready(self, version: Served) -> None:
        """Load a version on every engine of its base model, and see it answer as it should. Raises EngineFailed.

        With no engine configured for the base model there is nothing to do: somebody else loads it.
        """
        with self._lock:
            for engine in self.serving(version.base_model):
                if version.name not in engine.models():
                    engine.load(version.name, version.path)
                try_out(engine, version)

    def settle(self, keep: Iterable[Served], ours: Iterable[str]) -> None:
        """Load what must be served and is not (an engine was restarted); unload those of `ours` that nobody needs.

        What fails is noted in `state` and tried again by the next call.
        """
        wanted = list(keep)
        strays = set(ours) - {version.name for version in wanted}
        with self._lock:
            for engine in self._engines:
                try:
                    self._state[_name(engine)] = {"error": None, "models": _settle(engine, wanted, strays)}
                except EngineFailed as error:
                    if self._state.get(_name(engine), {}).get("error") != error.message:
                        log.warning("%s", error.message)
                    self._state[_name(engine)] = {"error": error.message, "models": []}

    def state(self) -> dict[str, dict[str, Any]]:
        """By engine what it serves, or what is wrong with it."""
        return dict(self._state)


def _settle(engine: Engine, wanted: Sequence[Served], strays: set[str]) -> list[str]:
    there = set(engine.models())
    for version in wanted:
        if version.base_model == engine.base_model and version.name not in there:
            engine.load(version.name, version.path)
            there.add(version.name)
    for name in sorted(strays & there):
        engine.unload(name)
        there.discard(name)
    return sorted(there)


def try_out(engine: Engine, version: Served) -> None:
    """Ask a version for fixed answers before traffic does. Raises EngineFailed if it answers otherwise than its trainer
    measured (`canary.json` in its folder: [{"prompt", "text", "logprobs"}]), or with anything that is not finite."""
    for case in canaries(version.path):
        expected: list[float] = case["logprobs"]
        text, got = engine.logprobs(version.name, case["prompt"], max(1, len(expected)))
        if not got or not all(map(math.isfinite, got)):
            raise EngineFailed(f"{version.name} gives no finite logprobs; it is not deployed")
        if expected and text == case["text"]:
            gaps = [abs(one - other) for one, other in zip(got, expected, strict=False)]
            if sum(gaps) / len(gaps) > MEAN_GAP or max(gaps) > LARGEST_GAP:
                raise EngineFailed(
                    f"{version.name} is served otherwise than it was trained (logprobs differ by {max(gaps):.2f})"
                )
        elif expected and got[0] < expected[0] - LARGEST_GAP:
            raise EngineFailed(f"{version.name} answers {text!r} where its trainer saw {case['text']!r}")


def canaries(folder: Path) -> list[Mapping[str, Any]]:
    """The fixed answers that came with an adapter; one plain question without an expectation where none did."""
    try:
        cases = orjson.loads((folder / CANARY_FILE).read_bytes())
    except FileNotFoundError:
        return [{"prompt": "Hello", "text": "", "logprobs": []}]
    except (OSError, ValueError) as error:
        raise BadInput(f"path: {CANARY_FILE} can't be read: {error}", param="path") from None
    return list(cases)


def _name(engine: Engine) -> str:
    return str(getattr(engine, "url", engine.base_model))


def _why(response: "httpx.Response") -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.text[:200]}"

"""Whether the local model answers exactly right, greedily; each answer is computed once and kept on disk.

All searches share one batch of the product's own engine. Only whether an answer is exact counts here, so a row is
dropped as soon as its text can no longer become a right answer; what is kept of it is the text up to there.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.errors import RatchetError
from optimize.rl.chat import plain

if TYPE_CHECKING:
    from optimize.rl.batcher import Batcher, Row
    from optimize.rl.model import LanguageModel


CHUNK = 1024  # prompt positions a step: nobody waits for single answers here


@dataclass(frozen=True)
class Asked:
    """A question under a system prompt, and the answers that are right."""

    system: str
    question: str
    expected: tuple[str, ...]
    longest: int = 16  # tokens

    @property
    def text(self) -> str:
        """What the model reads: as the engine renders an agent's messages for a model without a chat template."""
        messages = [{"role": "system", "content": self.system}, {"role": "user", "content": self.question}]
        return plain(messages if self.system.strip() else messages[1:])


def viable(text: str, expected: Sequence[str]) -> bool:
    """Whether an answer that begins with `text` can still be exactly one of `expected`, white space around it apart."""
    begun = text.lstrip()
    return any(one.startswith(begun) or one == begun.strip() for one in expected)


class Cache:
    """Answers by key in a file of JSON lines that only grows; a line torn by a crash is skipped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, bool] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = bool(entry["right"])
            except (ValueError, KeyError, TypeError):
                continue
        self._file = path.open("a", encoding="utf-8")

    def add(self, key: str, right: bool, text: str) -> None:
        """Keep an answer, at once."""
        self.known[key] = right
        self._file.write(f"\n{json.dumps({'key': key, 'right': right, 'text': text})}")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Answers:
    """The local model behind its cache. Used from one event loop."""

    def __init__(self, directory: Path, cache: Cache, *, batch: int = 128, threads: int = 1) -> None:
        self._directory, self._batch, self._threads = directory, batch, threads
        self._cache = cache
        self._name = fingerprint(directory)
        self._model: tuple[LanguageModel, Batcher] | None = None
        self._running: dict[str, asyncio.Future[bool]] = {}
        self.computed = 0

    def close(self) -> None:
        """Stop computing, and close the cache."""
        if self._model is not None:
            self._model[1].close()
        self._cache.close()

    def _loaded(self) -> "tuple[LanguageModel, Batcher]":
        """The model and its batch; loaded when an answer is missing on disk for the first time."""
        if self._model is None:
            import torch

            from optimize.rl.batcher import Batcher
            from optimize.rl.model import LanguageModel, use_threads

            use_threads(self._threads)
            torch.set_float32_matmul_precision("medium")  # products in bfloat16 where the CPU can, sums in fp32
            model = LanguageModel.load(self._directory)
            self._model = model, Batcher(model, max_batch=self._batch, max_waiting=100_000, chunk=CHUNK)
            self._model[1].start()
        return self._model

    async def right(self, asked: Sequence[Asked]) -> list[bool]:
        """For each question, in order, whether the greedy answer is exactly right."""
        keys = [self._key(one) for one in asked]
        for key, one in zip(keys, asked, strict=True):
            if key not in self._cache.known and key not in self._running:
                self._running[key] = self._start(key, one)
        waiting = {key: self._running[key] for key in keys if key in self._running}
        await asyncio.gather(*waiting.values())
        return [self._cache.known[key] for key in keys]

    def _key(self, asked: Asked) -> str:
        told = json.dumps([self._name, asked.text, asked.expected, asked.longest])
        return hashlib.sha256(told.encode()).hexdigest()[:24]

    def _start(self, key: str, asked: Asked) -> "asyncio.Future[bool]":
        from optimize.rl.batcher import Row
        from optimize.rl.sample import Sampling

        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()

        def done(text: str, error: Any) -> None:
            del self._running[key]
            if error is not None:
                future.set_exception(RuntimeError(str(error)))
                return
            right = text.strip() in asked.expected
            self._cache.add(key, right, text)
            self.computed += 1
            future.set_result(right)

        def told(text: str, error: Any = None) -> None:
            loop.call_soon_threadsafe(done, text, error)

        model, batcher = self._loaded()
        prompt = model.tokenizer.encode(asked.text)
        listener = _Listener(asked, batcher, told)
        row = Row(prompt, Sampling(asked.longest, 0, 1.0, 0, ("\n",)), listener.hear, lead=True)
        listener.row = row
        batcher.submit([row])
        return future


class _Listener:
    """Hears one row out, or drops it once it is wrong for sure. Called in the batcher's thread."""

    def __init__(self, asked: Asked, batcher: "Batcher", told: Callable[..., None]) -> None:
        self.asked, self.batcher, self.told = asked, batcher, told
        self.row: Row | None = None
        self.text = ""

    def hear(self, delta: Any) -> None:
        """One step of the row, or an error."""
        if isinstance(delta, RatchetError):
            self.told(self.text, delta)
            return
        self.text += delta.text
        over = delta.finish is not None
        if not over and not viable(self.text, self.asked.expected) and self.row is not None:
            self.batcher.cancel([self.row])
            over = True
        if over:
            self.row = None  # a row holds megabytes, and in a circle it would stay until the collector comes by
            self.told(self.text)


def fingerprint(directory: Path) -> str:
    """A name for the weights: of the bytes of all *.safetensors."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()[:16]

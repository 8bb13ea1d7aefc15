"""Adapters that come and go while the engine serves: checked first, then attached between two steps, never replaced.

What is served under a name never changes, so a version that was recorded is the one that answered: a name that was
unloaded may come back, with the same weights only (other weights under an old name have left servers answering from
stale caches: vllm-project/vllm#42125).
"""

import asyncio
import hashlib
import re
from pathlib import Path
from typing import Any

from collector.errors import BadInput, Conflict, NotFound
from optimize.rl import adapter as stored
from optimize.rl.adapters import Adapters, Pairs
from optimize.rl.batcher import Batcher

NAME = re.compile(r"[A-Za-z0-9._@:-]{1,128}")


class HotLoads:
    """The routes `load_lora_adapter` and `unload_lora_adapter` without HTTP. One event loop only."""

    def __init__(self, adapters: Adapters, batcher: Batcher, name: str, root: Path | None, base: Path | None) -> None:
        """`root`: the folder of adapters, None for none; `base`: the model's own, by which manifests are checked."""
        self._adapters, self._batcher, self._root, self._base = adapters, batcher, root, base
        self._used: dict[str, str | None] = dict.fromkeys((name, *adapters.names))  # name -> sha256 of its weights
        self._loading = asyncio.Lock()

    async def load(self, body: dict[str, Any]) -> dict[str, Any]:
        """`{"lora_name", "lora_path"}` -> `{"status": "loaded", "lora_name"}`.

        Raises BadInput (a bad name or folder, another base model) and Conflict (the name is or was taken).
        """
        name, path = _text(body, "lora_name"), _text(body, "lora_path")
        if not NAME.fullmatch(name):
            raise BadInput("lora_name: must be 1 to 128 of A-Z a-z 0-9 . _ @ : -", param="lora_name")
        folder = self._inside(path)
        async with self._loading:
            pairs, content = await asyncio.to_thread(self._read, folder)
            if name in self._adapters.names or self._used.get(name, content) != content:
                raise Conflict(f"lora_name: `{name}` is or was something else here; use a new name", param="lora_name")
            await asyncio.wrap_future(self._batcher.attach(name, pairs))
            self._used[name] = content
        return {"status": "loaded", "lora_name": name}

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        """`{"lora_name"}` -> `{"status": "unloaded", "lora_name"}` once no answer uses it. Raises NotFound."""
        name = _text(body, "lora_name")
        if name not in self._adapters.names:
            raise NotFound(f"lora_name: `{name}` is not loaded", param="lora_name")
        await asyncio.wrap_future(self._batcher.detach(name))
        return {"status": "unloaded", "lora_name": name}

    def _read(self, folder: Path) -> tuple[Pairs, str]:
        """The weights, checked against the manifest where there is one, and against the model in any case; and a hash
        of what they are."""
        if self._root is not None and (folder / stored.MANIFEST).exists():
            stored.verify(folder, root=self._root, base=self._base)
        pairs = self._adapters.read(folder)
        digest = hashlib.sha256((folder / stored.CONFIG).read_bytes())
        digest.update((folder / stored.WEIGHTS).read_bytes())
        return pairs, digest.hexdigest()

    def _inside(self, path: str) -> Path:
        if self._root is None:
            raise BadInput("this engine loads no adapters while it serves; start it with --data-dir", param="lora_path")
        folder = Path(path).resolve()
        if not folder.is_relative_to(self._root.resolve()):
            raise BadInput(f"lora_path: adapters are loaded from {self._root} only", param="lora_path")
        return folder


def _text(body: dict[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not value:
        raise BadInput(f"{key}: give a text", param=key)
    return value

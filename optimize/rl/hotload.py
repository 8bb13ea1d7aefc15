"""Adapters that come and go while the engine serves: checked first, then attached between two steps, never replaced.

A name is loaded once. What is served under it never changes, so a version that was recorded is the one that answered
(reloading under the same name has left servers answering from stale caches: vllm-project/vllm#42125).
"""

import asyncio
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
        self._used: set[str] = {name, *adapters.names}
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
            if name in self._used:
                raise Conflict(f"lora_name: `{name}` is or was served here; use a new name", param="lora_name")
            pairs = await asyncio.to_thread(self._read, folder)
            await asyncio.wrap_future(self._batcher.attach(name, pairs))
            self._used.add(name)
        return {"status": "loaded", "lora_name": name}

    async def unload(self, body: dict[str, Any]) -> dict[str, Any]:
        """`{"lora_name"}` -> `{"status": "unloaded", "lora_name"}` once no answer uses it. Raises NotFound."""
        name = _text(body, "lora_name")
        if name not in self._adapters.names:
            raise NotFound(f"lora_name: `{name}` is not loaded", param="lora_name")
        await asyncio.wrap_future(self._batcher.detach(name))
        return {"status": "unloaded", "lora_name": name}

    def _read(self, folder: Path) -> Pairs:
        """The weights, checked against the manifest where there is one, and against the model in any case."""
        if self._root is not None and (folder / stored.MANIFEST).exists():
            stored.verify(folder, root=self._root, base=self._base)
        return self._adapters.read(folder)

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

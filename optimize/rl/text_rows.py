"""Token ids of calls whose engine told none, for methods that only imitate: rendered as our own engine would."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from optimize.rl.calls import Call
from optimize.rl.chat import render


@lru_cache(maxsize=1)
def _tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)


def tokenise(base: Path, call: Call) -> tuple[list[int], list[int]]:
    """`(prompt ids, completion ids)` of a call's messages and answer, ended as the model ends one."""
    tokenizer = _tokenizer(base)
    prompt = render([_plain(message) for message in call.messages], tokenizer)
    ids = tokenizer.encode(prompt.text, add_special_tokens=prompt.special)
    if tokenizer.chat_template:
        answer = [*tokenizer.encode(call.answer or "", add_special_tokens=False), tokenizer.eos_token_id]
    else:
        answer = tokenizer.encode(f" {call.answer}\n", add_special_tokens=False)
    return list(ids), list(answer)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {"role": message.get("role", "user"), "content": content or ""}

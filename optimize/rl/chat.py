"""Chat messages to a prompt: by the model's own chat template, else as plain questions and answers for base models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from collector.errors import BadInput


@dataclass(frozen=True)
class Prompt:
    """A prompt's text, whether the tokenizer adds special tokens, the default stops, whether to drop a lead space."""

    text: str
    special: bool = True
    stop: tuple[str, ...] = ()
    lead: bool = False


def render(messages: Sequence[dict[str, Any]], tokenizer: Any) -> Prompt:
    """The prompt for an assistant's next message. Raises BadInput when the messages do not allow one."""
    if tokenizer.chat_template:
        return Prompt(_by_template(messages, tokenizer), special=False)
    return Prompt(plain(messages), stop=("\n",), lead=True)


def plain(messages: Sequence[dict[str, Any]]) -> str:
    """`{system}`, a blank line, then `Question: …` and `Answer: …` lines, ending in `Answer:` for the model to do."""
    if not messages or messages[-1]["role"] != "user":
        raise BadInput("the last message must be the user's for a model without a chat template", param="messages")
    systems = [m["content"] for m in messages if m["role"] in ("system", "developer")]
    turns = [
        f"Question: {m['content']}\n" if m["role"] == "user" else f"Answer: {m['content']}\n"
        for m in messages
        if m["role"] not in ("system", "developer")
    ]
    head = "\n\n".join(systems)
    return (f"{head}\n\n" if head else "") + "".join(turns) + "Answer:"


def _by_template(messages: Sequence[dict[str, Any]], tokenizer: Any) -> str:
    from jinja2.exceptions import TemplateError

    known = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    try:
        return str(tokenizer.apply_chat_template(known, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise BadInput(f"the model's chat template refuses these messages: {error}", param="messages") from None

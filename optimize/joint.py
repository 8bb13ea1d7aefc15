"""Several prompts as one text, with a heading line a slot.

So whatever pays, caches, logs and reports prompts needs to know nothing of it; only who pins it takes it apart.
"""

import re
from collections.abc import Mapping

from collector.errors import BadInput

HEADING = re.compile(r"^=== slot ([A-Za-z0-9_-]{1,64}) ===\n", re.MULTILINE)


def join(prompts: Mapping[str, str]) -> str:
    """One text of several prompts. Raises BadInput where a prompt holds a heading itself."""
    for slot, text in prompts.items():
        if HEADING.search(text):
            raise BadInput(f"the prompt of {slot} holds a line like === slot name ===", param="slot")
    return "".join(f"=== slot {slot} ===\n{text}\n" for slot, text in prompts.items())


def divide(text: str, slot: str) -> dict[str, str]:
    """The prompts of a joint text by slot; any other text is the prompt of `slot`."""
    pieces = HEADING.split(text)
    if len(pieces) < 3 or pieces[0]:
        return {slot: text}
    return {name: body.removesuffix("\n") for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}

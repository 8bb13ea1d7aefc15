"""From token ids to text as it grows: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

BROKEN = "\ufffd"
CONTEXT = 6


class Detokenizer:
    """Decodes ids one by one. Starts from the prompt's last ids, because some tokenizers drop a text's first space."""

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-CONTEXT:])
        self._from, self._read = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._ids.append(token)
        piece = self._rest()
        if not piece or piece.endswith(BROKEN):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left when no more ids come: at most one broken character."""
        return self._rest()

    def _rest(self) -> str:
        before = self._decode(self._ids[self._from : self._read])
        return self._decode(self._ids[self._from :])[len(before) :]


class Stops:
    """Passes text on up to the first stop string; holds back an end that may be the beginning of one.

    `lead` drops leading spaces: what separates a template's "Answer:" from the answer.
    """

    def __init__(self, stops: Sequence[str], *, lead: bool = False) -> None:
        self._stops = tuple(stops)
        self._lead = lead
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """(text to pass on, whether a stop string was reached)."""
        held = self._held + piece
        # The match that ends first, so that the result does not depend on how the text is cut into pieces.
        found = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self._held = ""
            return self._led(held[: min(found)[1]]), True
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return self._led(held[: len(held) - keep]), False

    def flush(self) -> str:
        """What was held back."""
        held, self._held = self._held, ""
        return self._led(held)

    def _led(self, text: str) -> str:
        if self._lead:
            text = text.lstrip(" ")
            self._lead = not text
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class Vocabulary:
    """Single tokens as text, for log-probabilities."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self.token = lru_cache(maxsize=8192)(self._token)

    def _token(self, token: int) -> tuple[str, list[int] | None]:
        """(text, UTF-8 bytes); bytes are None where the token is a piece of a character in no known spelling."""
        spelled = str(self._tokenizer.convert_ids_to_tokens(token))
        if len(spelled) == 6 and spelled.startswith("<0x") and spelled.endswith(">"):
            byte = int(spelled[3:5], 16)
            return (chr(byte) if byte < 128 else BROKEN), [byte]
        start = len(self._tokenizer.decode(self._anchor))
        text = str(self._tokenizer.decode([*self._anchor, token]))[start:]
        return text, None if BROKEN in text else list(text.encode())

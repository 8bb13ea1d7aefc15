"""Masking of secrets before a line is written: API keys, tokens, private keys, and e-mail addresses where asked for.

Clean text is the common case and pays for substring searches only, most of them for a single rare character; an
expression runs only where its literal was found. Payloads are JSON text, so no expression may swallow a quote or half
of an escape, and a key that follows the escape of a newline is still found. Every expression is linear in the text.
"""

import re
from dataclasses import replace
from typing import Any, TypeVar

from collector.model import Exchange

Call = TypeVar("Call", bound=Exchange)

PAYLOADS = ("input_messages", "output_messages", "tools", "attributes")
SPELLED = ("token_ids", "logprobs")  # they spell the same text again
GIVEN = ("route", "request_model", "response_model", "error_type")  # columns with words of a client's or an upstream's
_MASKED = (*PAYLOADS, *GIVEN)
_SHORT = 1000  # characters; a rare one in a short value must not have the long ones searched
MASK = "[redacted]"
MASK_EMAIL = "[e-mail]"


def _token(literal: str, rest: str) -> "re.Pattern[str]":
    """`literal` at the start, after what is not alphanumeric, or after a JSON escape such as \\n; then `rest`.

    The literal stands first and the look behind it follows, so that the search can jump from literal to literal.
    """
    edge = "|".join(
        (
            f"(?<![A-Za-z0-9]{literal})",
            rf"(?<=\\[nrtbf]{literal})",
            rf"(?<=\\u00[01][0-9a-fA-F]{literal})",
        )
    )
    return re.compile(f"{literal}(?:{edge}){rest}")


# (a rarer character of the literal, the literal, the whole secret)
_TOKENS: tuple[tuple[str, str, "re.Pattern[str]"], ...] = (
    ("-", "sk-", _token("sk-", r"[A-Za-z0-9_-]{16,}")),
    ("_", "sk_", _token("sk_", r"(?:live|test)_[A-Za-z0-9]{16,}")),
    ("K", "AKIA", _token("AKIA", r"[0-9A-Z]{16}(?![0-9A-Z])")),
    ("S", "ASIA", _token("ASIA", r"[0-9A-Z]{16}(?![0-9A-Z])")),
    ("_", "gh", _token("gh", r"[pousr]_[A-Za-z0-9]{20,}")),
    ("_", "github_pat_", _token("github_pat_", r"[A-Za-z0-9_]{20,}")),
    ("-", "xox", _token("xox", r"[abeoprs]-[A-Za-z0-9-]{10,}")),
    ("z", "AIza", _token("AIza", r"[A-Za-z0-9_-]{35}")),
    ("_", "hf_", _token("hf_", r"[A-Za-z0-9]{30,}")),
    ("J", "eyJ", _token("eyJ", r"[A-Za-z0-9_-]{8,1024}\.eyJ[A-Za-z0-9_-]{8,8192}\.[A-Za-z0-9_-]{8,1024}")),
    ("B", "Bearer ", re.compile(r"Bearer [A-Za-z0-9._~+/-]{16,}=*")),
    ("b", "bearer ", re.compile(r"bearer [A-Za-z0-9._~+/-]{16,}=*")),
)
_BY_CHARACTER = tuple(
    (rare, tuple((literal, pattern) for other, literal, pattern in _TOKENS if other == rare))
    for rare in dict.fromkeys(rare for rare, _, _ in _TOKENS)
)
# One of these is in every text that holds one of the literals: fewer, so that a short text is looked through sooner.
_SIGNS = ("sk-", "sk_", "IA", "gh", "xox", "AIza", "hf_", "eyJ", "earer ", "-----BEGIN")
_DIGIT = re.compile(r"[0-9]")
_LIKE_WORDS = ("sk-", "github_pat_", "xox", "Bearer ", "bearer ")
# Header lines, base64, line ends as they are or escaped; the end mark may have been cut off.
_PEM = re.compile(
    r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
    r"(?:[A-Za-z0-9+/=\s:,]|-(?!----)|\\{1,8}[nrt])*"
    r"(?:-----END [A-Z ]{0,30}PRIVATE KEY-----)?"
)
_EMAIL = re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,8}")


def text(value: str, emails: bool = False) -> tuple[str, bool]:
    """`(masked, hit)`. Text without secrets comes back as the same object."""
    if len(value) <= _SHORT and not any(map(value.__contains__, _SIGNS)) and not (emails and "@" in value):
        return value, False
    masked = value
    for rare, tokens in _BY_CHARACTER:
        if rare in value:
            for literal, pattern in tokens:
                if literal in value:
                    masked = pattern.sub(_mask_token, masked)
    if "-" in value and "-----BEGIN" in value:
        masked = _PEM.sub(MASK, masked)
    if emails and "@" in value:
        masked = _EMAIL.sub(_mask_email, masked)
    return (masked, True) if masked != value else (value, False)


def _mask_token(found: "re.Match[str]") -> str:
    """A word such as `sk-something-in-prose` has no digit, a key of that kind always has."""
    secret = found.group()
    if secret.startswith(_LIKE_WORDS) and _DIGIT.search(secret) is None:
        return secret
    return secret[:7] + MASK if secret[1:7] == "earer " else MASK


def _mask_email(found: "re.Match[str]") -> str:
    """Leave the letter of an escape such as \\n in its place: without it the JSON would not parse."""
    at = found.start()
    return found.group()[0] + MASK_EMAIL if at and found.string[at - 1] == "\\" else MASK_EMAIL


def exchange(call: Call, emails: bool = False) -> Call:
    """The call with its payloads masked. A hit drops its token ids and logprobs too: they spell the secret again."""
    changed: dict[str, str] = {}
    for name in PAYLOADS:
        value = getattr(call, name)
        if value is not None:
            masked, hit = text(value, emails)
            if hit:
                changed[name] = masked
    if not changed:
        return call
    return replace(call, token_ids=None, logprobs=None, **changed)  # type: ignore[arg-type]  # only str fields


def payloads(line: dict[str, Any], emails: bool = False) -> None:
    """Masks a span's line in place: payloads, and what a client may have put a key into by mistake. A hit drops its
    token ids and logprobs too."""
    held = [*filter(None, map(line.get, _MASKED))]
    together = "\n".join(held)  # what is short is looked at together
    if len(together) <= _SHORT and not text(together, emails)[1]:
        return
    looks = [value for value in held if len(value) > _SHORT]
    looks.append("\n".join([value for value in held if len(value) <= _SHORT]))
    if any(text(value, emails)[1] for value in looks):
        line.update({name: text(line[name], emails)[0] for name in _MASKED if line.get(name)})
        for name in SPELLED:
            line.pop(name, None)

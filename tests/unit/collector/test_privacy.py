"""Modes of redaction: what is kept of a call, per route and slot."""

import json
from typing import Any

import pytest

from collector import settings
from collector.errors import ConfigError
from collector.privacy import Policy
from collector.settings import Redaction

KEY = "sk-abcdefghijklmnop1234"


def line(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {
        "route": "/v1/chat/completions",
        "prompt_slot": None,
        "input_messages": json.dumps([{"role": "user", "content": text}]),
        "output_messages": json.dumps([{"role": "assistant", "content": f"you said {text}"}]),
        "tools": json.dumps([{"name": "t"}]),
        "attributes": json.dumps({"user": "me", "at": 1760000000000}),
        "token_ids": "[1]",
        "logprobs": "[2]",
        **fields,
    }


def applied(given: dict[str, Any], **rules: Any) -> dict[str, Any]:
    policy = Policy.of(Redaction(**rules))
    assert policy is not None
    policy.apply(given)
    return given


def said(given: dict[str, Any]) -> str:
    return str(json.loads(given["input_messages"])[0]["content"])


def test_the_default_needs_no_policy() -> None:
    assert Policy.of(Redaction()) is None
    assert Policy.of(Redaction(emails=True)) is None


@pytest.mark.parametrize("mode", ["full", "masked", "hash", "none"])
def test_secrets_are_masked_in_every_mode(mode: str) -> None:
    kept = applied(line(f"my key is {KEY}", error_type=KEY), mode=mode, phones=True)
    assert KEY not in json.dumps(kept)
    assert "token_ids" not in kept


def test_full_keeps_what_masked_masks() -> None:
    text = "write to a@example.org or +49 30 1234567, card 4111 1111 1111 1111"
    everything = {"emails": True, "phones": True, "cards": True}
    assert said(applied(line(text), mode="full", **everything)) == text
    masked = applied(line(text), **everything)
    assert said(masked) == "write to [e-mail] or [phone], card [card]"
    assert "logprobs" not in masked, "they spell it again"


def test_hashes_keep_roles_and_tell_equal_contents() -> None:
    kept = applied(line("secret plan"), mode="hash")
    again = applied(line("secret plan"), mode="hash")
    other = applied(line("another plan"), mode="hash")
    assert json.loads(kept["input_messages"])[0]["role"] == "user"
    assert said(kept).startswith("sha256:")
    assert said(kept) == said(again) != said(other)
    assert "plan" not in json.dumps(kept)
    assert not {"tools", "attributes", "token_ids", "logprobs"} & set(kept)


def test_none_keeps_no_content() -> None:
    assert set(applied(line("secret plan"), mode="none")) == {"route", "prompt_slot"}


def test_the_slots_rule_goes_before_the_routes() -> None:
    rules = {"routes": {"/v1/embeddings": "none"}, "slots": {"support": "hash"}}
    policy = Policy(Redaction(**rules))
    assert policy.mode("/v1/embeddings", None) == "none"
    assert policy.mode("/v1/embeddings", "support") == "hash"
    assert policy.mode("/v1/chat/completions", "other") == "masked"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("card 4111-1111-1111-1111.", "card [card]."),
        ("not a card: 4111111111111112", "not a card: 4111111111111112"),
        ("order 12345678901234567890123", "order 12345678901234567890123"),
        ("call (030) 123 45 67 now", "call [phone] now"),
        ("call 555-867-5309", "call [phone]"),
        ("on 2026-11-22 at 10:30", "on 2026-11-22 at 10:30"),
        ("version 1.2.3 costs 1000", "version 1.2.3 costs 1000"),
        ('quoted "+49 30 1234567"\n', 'quoted "[phone]"\n'),
    ],
)
def test_numbers_of_phones_and_cards_are_found_and_others_left(text: str, shown: str) -> None:
    kept = applied(line(text), phones=True, cards=True)
    assert said(kept) == shown
    assert json.loads(kept["attributes"])["at"] == 1760000000000, "JSON's own numbers are no text"


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ConfigError, match=r"store\.redaction\.mode"):
        settings.load(flags={"store.redaction.mode": "some"}, environ={})

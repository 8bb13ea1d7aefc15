import dataclasses
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collector import redact
from tests.unit.collector.rows import call

PEM = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nMIIEpAIBAAKCAQEA75+/abc=\n-----END RSA PRIVATE KEY-----"
SECRETS = [
    "sk-abcdefghijklmnopqrstuvwx0123",
    "sk-proj-abc_DEF-0123456789abcdef",
    "sk-ant-api03-abcdefghij0123456789",
    "sk_live_" + "abcdefghij0123456789",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ASIA" + "IOSFODNN7EXAMPLE",
    "AKIA" + "ABCDEFGHIJKLMNOP",
    "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "ghp_" + "abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_" + "11ABCDEFG0abcdefghijkl_mnopqrstuvwxyz",
    "xoxb-" + "123456789012-abcdefghij",
    "AIza" + "SyA0123456789abcdefghijklmnopqrstuv",
    "hf_" + "abcdefghijklmnopqrstuvwxyz01234567",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
]


@pytest.mark.parametrize("secret", [*SECRETS, PEM])
@pytest.mark.parametrize("around", ["{}", "the key is {}.", "a\n{}\nb", "key={}&x=1", "('{}')", "\t{}"])
def test_secrets_are_masked_wherever_they_stand(secret: str, around: str) -> None:
    payload = json.dumps([{"role": "user", "content": around.format(secret)}])
    masked, hit = redact.text(payload)
    assert hit
    assert json.loads(masked) == [{"role": "user", "content": around.format(redact.MASK)}]


@pytest.mark.parametrize("secret", [*SECRETS, PEM])
def test_secrets_are_masked_inside_arguments_that_are_json_themselves(secret: str) -> None:
    arguments = json.dumps({"text": f"first\n{secret}\nlast"})
    payload = json.dumps([{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}])
    masked, hit = redact.text(payload)
    assert hit
    inner = json.loads(json.loads(masked)[0]["tool_calls"][0]["function"]["arguments"])
    assert secret not in inner["text"]
    assert inner["text"].startswith("first\n")


def test_a_bearer_token_keeps_its_scheme() -> None:
    assert redact.text("Authorization: Bearer abc.def-ghi_jkl/012==") == ("Authorization: Bearer [redacted]", True)


def test_a_key_cut_off_before_its_end_is_masked() -> None:
    payload = json.dumps({"content": PEM[:60]})
    masked, hit = redact.text(payload)
    assert hit
    assert "MII" not in masked
    json.loads(masked)


@pytest.mark.parametrize(
    "text",
    [
        "we use scikit-learn and risk-based-decision-making-processes",
        "sk-learn-is-a-name-without-a-digit",
        "the task-0123456789abcdefghij is done",
        "Bearer of the good news",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "AKIA is a prefix",
        "mail me at someone@example.org",
        "",
    ],
)
def test_clean_text_comes_back_as_the_same_object(text: str) -> None:
    masked, hit = redact.text(text)
    assert masked is text
    assert not hit


def test_emails_are_masked_where_asked_for() -> None:
    payload = json.dumps({"content": "write to\nfoo.bar+x@mail.example.org, or <a@b.co>"})
    masked, hit = redact.text(payload, emails=True)
    assert hit
    assert json.loads(masked)["content"] in (
        "write to\n[e-mail], or <[e-mail]>",
        "write to\nf[e-mail], or <[e-mail]>",
    )


def test_a_hit_drops_token_ids_and_logprobs_of_the_call() -> None:
    tainted = call(1, output_messages=f'[{{"content":"{SECRETS[0]}"}}]', token_ids="[1]", logprobs="[2]")
    masked = redact.exchange(tainted)
    assert (masked.token_ids, masked.logprobs) == (None, None)
    assert masked.output_messages == '[{"content":"[redacted]"}]'
    assert masked.input_messages == tainted.input_messages


def test_a_clean_call_is_the_same_object() -> None:
    clean = call(1, token_ids="[1]", attributes=None)
    assert redact.exchange(clean) is clean
    assert redact.exchange(call(1, input_messages="x@example.org"), emails=True).input_messages == "[e-mail]"


@settings(deadline=None)
@given(st.lists(st.sampled_from([*SECRETS, "clean", "a@b.example", '"}]', "sk-"]), max_size=4), st.booleans())
def test_a_line_is_masked_as_an_exchange_is(parts: list[str], emails: bool) -> None:
    names = dict(zip(redact.PAYLOADS, parts, strict=False))
    given_call = call(1, token_ids="[1]", logprobs="[2]", **{name: names.get(name) for name in redact.PAYLOADS})
    line = {name: value for name, value in dataclasses.asdict(given_call).items() if value is not None}
    redact.payloads(line, emails)
    masked = dataclasses.asdict(redact.exchange(given_call, emails))
    assert line == {name: value for name, value in masked.items() if value is not None}


@given(st.text(), st.sampled_from(SECRETS), st.text())
def test_json_stays_json_and_the_secret_goes(before: str, secret: str, after: str) -> None:
    payload = json.dumps([{"content": f"{before} {secret} {after}"}], ensure_ascii=False)
    masked, hit = redact.text(payload, emails=True)
    assert hit
    assert secret not in masked
    json.loads(masked)


@pytest.mark.parametrize(
    "unit",
    ["sk-", "eyJ", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "a@", "a.", "Bearer ", "\\n", "gh", "xoxb-", "A@B."],
)
def test_adversarial_text_takes_linear_time(unit: str) -> None:
    def seconds(length: int) -> float:
        text = (unit * length)[:length]
        begin = time.process_time()
        redact.text("sk- eyJ K S x z b B J _ @ -----BEGIN" + text, emails=True)
        return time.process_time() - begin

    seconds(1000)
    assert seconds(400_000) < 2.0

from typing import Any

import pytest

from optimize.rl.wire import BadRequest, read_chat, read_completion

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize(
    ("read", "base", "field", "value"),
    [
        (read_chat, CHAT, "model", None),
        (read_chat, CHAT, "temperature", "hot"),
        (read_chat, CHAT, "temperature", -0.1),
        (read_chat, CHAT, "temperature", True),
        (read_chat, CHAT, "top_p", 1.5),
        (read_chat, CHAT, "max_tokens", 0),
        (read_chat, CHAT, "max_completion_tokens", 1.5),
        (read_chat, CHAT, "n", 0),
        (read_chat, CHAT, "n", 1000),
        (read_chat, CHAT, "seed", "x"),
        (read_chat, CHAT, "stop", ""),
        (read_chat, CHAT, "stop", [1]),
        (read_chat, CHAT, "stop", ["a"] * 17),
        (read_chat, CHAT, "stream", "yes"),
        (read_chat, CHAT, "stream_options", True),
        (read_chat, CHAT, "top_logprobs", 3),
        (read_chat, CHAT, "tools", [{"type": "function"}]),
        (read_chat, CHAT, "response_format", {"type": "json_object"}),
        (read_chat, CHAT, "frequency_penalty", 0.5),
        (read_chat, CHAT, "messages", []),
        (read_completion, COMPLETION, "prompt", None),
        (read_completion, COMPLETION, "prompt", []),
        (read_completion, COMPLETION, "prompt", [1, "a"]),
        (read_completion, COMPLETION, "prompt", [[-1]]),
        (read_completion, COMPLETION, "logprobs", 21),
        (read_completion, COMPLETION, "echo", True),
        (read_completion, COMPLETION, "best_of", 3),
    ],
)
def test_a_bad_field_is_named(read: Any, base: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        read(base | {field: value})
    assert caught.value.param == field
    assert caught.value.status == 400


def test_a_bad_message_is_named_by_its_place() -> None:
    for message, param in (
        ({"role": "wizard", "content": "x"}, "messages.1.role"),
        ({"role": "user", "content": 3}, "messages.1.content"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages.1.content"),
    ):
        with pytest.raises(BadRequest) as caught:
            read_chat({"model": "m", "messages": [{"role": "user", "content": "x"}, message]})
        assert caught.value.param == param


def test_null_means_not_given() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "max_tokens", "n", "seed", "stop", "stream", "tools", "logprobs"))
    assert read_chat(CHAT | nulls) == read_chat(CHAT)


def test_text_parts_are_joined_and_the_newer_name_of_the_limit_wins() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"model": "m", "messages": [{"role": "user", "content": parts}], "max_tokens": 9, "max_completion_tokens": 5}
    call = read_chat(body)
    assert call.messages[0]["content"] == "ab"
    assert call.max_tokens == 5


def test_prompts_come_as_text_ids_or_lists_of_either() -> None:
    for given, expected in (("x", ("x",)), (["x", "y"], ("x", "y")), ([1, 2], ((1, 2),)), ([[1], [2]], ((1,), (2,)))):
        assert read_completion(COMPLETION | {"prompt": given}).prompts == expected
    assert read_completion(COMPLETION).max_tokens == 16
    assert read_chat(CHAT).max_tokens is None


def test_a_body_that_is_no_object_is_refused() -> None:
    with pytest.raises(BadRequest, match="JSON object"):
        read_chat([1])

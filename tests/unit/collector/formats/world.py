"""A store with everything in it that an export has to carry."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from collector.client import Local
from tests.unit.collector import rows
from tests.unit.collector.rows import call, write
from tests.unit.collector.test_settle import AGENT, ECHO, RECORDED, TOOL, own

TOOL_CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
FIRST = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
SECOND = [*ASKED, FIRST, {"role": "tool", "tool_call_id": "c1", "content": "2"}]


def reward(number: int, kind: str, target: str, value: float = 1.0, **fields: Any) -> tuple[str, dict[str, Any]]:
    body = {"reward_id": f"rw-{number}", "target_kind": kind, "target_id": target, "value": value, "ts_ns": number}
    return "reward", {"name": "reward", "source": "code", **body, **fields}


def chat(number: int, given: Any, gave: Any, **fields: Any) -> Any:
    """A call with its messages."""
    texts = {"input_messages": json.dumps(given), "output_messages": json.dumps([gave])}
    return call(number, **{**texts, **fields})


RICH = [
    RECORDED,
    AGENT,
    ECHO,
    TOOL,
    reward(1, "span", f"a{1:015x}", 0.5, explanation="of the echo", label="fair"),
    chat(
        10, ASKED, FIRST, episode_id="ep-t", finish_reason="tool_calls", tools='[{"type":"function"}]', input_tokens=9
    ),
    chat(
        11,
        SECOND,
        {"role": "assistant", "content": "2", "finish_reason": "stop", "annotations": []},
        episode_id="ep-t",
        prompt_slot="s",
        prompt_version=2,
        propensity=0.5,
        ttft_ms=12.5,
        cost_usd=0.001,
        stream=True,
        temperature=0.25,
        seed=7,
        token_ids='{"prompt":[1,2],"completion":[[3]]}',
        logprobs="[[-0.5]]",
        attributes='{"variables":{"product":"x"},"metadata":{"a":[1,null]}}',
        request_bytes=100,
        response_bytes=20,
    ),
    reward(2, "episode", "ep-t", 1.0, source="human"),
    reward(3, "response", "chatcmpl-11", 0.25, name="speed"),
    reward(4, "trace", f"{9:032x}", 0.75),
    call(12, trace_id=f"{9:032x}", episode_id="ep-u", operation="responses", start_ns=1_500, end_ns=9_500),
    call(
        13,
        trace_id=f"{9:032x}",
        episode_id="ep-u",
        status="error",
        error_type="timeout",
        http_status=504,
        start_ns=1_510,
    ),
    call(14, episode_id="ep-v", status="cancelled", input_messages='"bare text"', output_messages=None, start_ns=1_530),
    call(
        15,
        episode_id="ep-w",
        operation="embeddings",
        input_messages="[[1,2]]",
        output_messages="not json",
        start_ns=1_540,
    ),
    own(20, None, "execute_tool", trace_id=f"{11:032x}", attributes={"x": [1, True, 0.5], "gen_ai.tool.name": "t"}),
    own(21, 20, "chat", trace_id=f"{11:032x}", response_id="chatcmpl-own", input_tokens=3),
    ("otlp", replace(own(22, 21, "retrieval", trace_id=f"{11:032x}")[1], status="error", error_type="ValueError")),
]


def filled(data_dir: Path) -> Path:
    """RICH in a data directory."""
    write(data_dir, *RICH)
    return data_dir


def opened(data_dir: Path) -> Local:
    return Local(data_dir, rows.settings(data_dir))


def everything(data_dir: Path) -> dict[str, Any]:
    """Each episode as the API shows it, without the id that the journal gives nobody."""
    local = opened(data_dir)
    try:
        ids = [row[0] for row in local.query("SELECT episode_id FROM episodes_v ORDER BY 1")["rows"]]
        assert ids
        return {ident: local.episode(ident) for ident in ids}
    finally:
        local.close()

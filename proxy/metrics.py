"""What one worker counts; `REGISTRY` is what `/metrics` shows. Names follow OTel's GenAI conventions where possible."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from proxy.tally import Durations, Tallies, Tally

REGISTRY = CollectorRegistry()

CALLS = Tallies("ratchet_calls", "Recorded calls", ("operation", "status"), REGISTRY)
INFLIGHT = Gauge("ratchet_calls_in_flight", "Calls being relayed now", registry=REGISTRY)
DURATION = Durations(
    "gen_ai_client_operation_duration_seconds",
    "Seconds from the request's last byte to the answer's last",
    "gen_ai_operation_name",
    (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    REGISTRY,
)
_INPUT, _OUTPUT = ("input",), ("output",)
TOKENS = Tallies("gen_ai_client_token_usage", "Tokens, as the upstream counted them", ("gen_ai_token_type",), REGISTRY)
INJECTED = Tally("ratchet_prompts_injected", "Prompts replaced by the deployed version", REGISTRY)
MATCHED = Tally("ratchet_prompts_matched", "Prompts recognised as a slot's", REGISTRY)
UNMATCHED = Tally("ratchet_prompts_unmatched", "Calls with a prompt that no slot knows", REGISTRY)
FAIL_OPEN = Counter(
    "ratchet_inject_failures", "Prompts relayed as they were because injection failed", ("reason",), registry=REGISTRY
)
CONTINUATIONS = Counter(
    "ratchet_episode_continuations", "Calls whose messages extend an earlier call", ("kind",), registry=REGISTRY
)
JOINED = Counter("ratchet_retries_joined", "SDK retries that joined the call they repeat", registry=REGISTRY)
LIMITED = Counter("ratchet_calls_limited", "Calls refused with 429 for their key's limits", registry=REGISTRY)
CACHED = Counter("ratchet_cache_hits", "Calls answered from the cache", registry=REGISTRY)
TAKEN_OVER = Counter("ratchet_calls_taken_over", "Second attempts after a target failed", registry=REGISTRY)
UNRECORDED = Counter("ratchet_calls_unrecorded", "Calls whose record could not be built", registry=REGISTRY)
OTLP = Counter("ratchet_otlp_items", "What OTLP brought, by what became of it", ("signal", "fate"), registry=REGISTRY)


def count(operation: str, status: str, seconds: float, tokens_in: int | None, tokens_out: int | None) -> None:
    """Counts one finished call."""
    CALLS.values[operation, status] += 1
    DURATION.observe(operation, seconds)
    if tokens_in:
        TOKENS.values[_INPUT] += tokens_in
    if tokens_out:
        TOKENS.values[_OUTPUT] += tokens_out


def count_otlp(signal: str, spans: int, rewards: int, rejected: int, ignored: int) -> None:
    """Counts the items of one export."""
    fates = {"span": spans, "reward": rewards, "rejected": rejected, "ignored": ignored}
    for fate, number in fates.items():
        OTLP.labels(signal, fate).inc(number)

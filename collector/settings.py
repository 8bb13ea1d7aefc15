"""The configuration: one YAML file, a few environment variables, then flags. Unknown keys are errors.

Sections belong to the packages that read them; they live here, on the bottom floor, because one file configures all.
`os.environ/NAME` as a value is replaced by the environment variable NAME, as in LiteLLM's format.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from collector.errors import ConfigError

DEFAULT_URL = "http://127.0.0.1:4000"
CLICKHOUSE = re.compile(r"clickhouses?://([^/@\s]*@)?(\[[0-9a-fA-F:]+\]|[^/@:\s]+)(:\d{1,5})?/[^/?#\s]+/?")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def without_credentials(url: str) -> str:
    """The URL as it may be shown: without a user and a password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class Section(BaseModel):
    """A frozen section that knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Limits(Section):
    """How much a key may use; None: as much as it likes. Minutes are clock minutes, days are UTC's."""

    requests_per_minute: int | None = Field(default=None, gt=0)
    concurrent: int | None = Field(default=None, gt=0)
    tokens_per_day: int | None = Field(default=None, gt=0)
    tokens_total: int | None = Field(default=None, gt=0)
    usd_per_day: float | None = Field(default=None, gt=0)
    usd_total: float | None = Field(default=None, gt=0)


class Key(Section):
    """A Ratchet key: given as it is or by its sha256, with what it may do, and how much of it."""

    name: str
    key: str | None = None
    key_sha256: str | None = Field(default=None, pattern="^[0-9a-fA-F]{64}$")
    scopes: frozenset[Literal["agent", "reward", "admin"]] = frozenset({"agent"})
    limits: Limits = Limits()

    @model_validator(mode="after")
    def _one_of(self) -> "Key":
        if (self.key is None) == (self.key_sha256 is None):
            raise ValueError("give exactly one of `key` and `key_sha256`")
        if self.key is not None and not self.key.strip():
            raise ValueError("`key` is empty: whoever sends none would have it")
        return self


class Server(Section):
    """Where the proxy listens and whom it serves."""

    host: str = "127.0.0.1"
    port: int = Field(default=4000, ge=0, le=65535)
    otlp_port: Annotated[int, Field(ge=0, le=65535)] | Literal["auto"] | None = "auto"
    workers: int = Field(default=1, ge=1, le=64)
    allowed_hosts: tuple[str, ...] = ()
    keys: tuple[Key, ...] = ()
    max_body_mb: float = Field(default=64, gt=0)
    slow_client_timeout: float = Field(default=30, gt=0)

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in LOOPBACK


class Upstream(Section):
    """Where calls go that no entry of `model_list` names."""

    default: str = "https://api.openai.com/v1"
    anthropic: str = "https://api.anthropic.com/v1"
    connect_timeout: float = Field(default=10, gt=0)
    read_timeout: float = Field(default=600, gt=0)
    first_byte_timeout: float | None = Field(default=None, gt=0)
    total_timeout: float | None = Field(default=None, gt=0)
    retries: int = Field(default=1, ge=0, le=1)
    cooldown: float = Field(default=30, ge=0)
    fallbacks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    client: Literal["raw", "aiohttp"] = "raw"

    @field_validator("default", "anthropic")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url.rstrip("/")


class ModelEntry(Section):
    """One entry of LiteLLM's `model_list`: the name that agents ask for, and what it is sent to."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    model_name: str
    litellm_params: dict[str, Any]
    model_info: dict[str, Any] = Field(default_factory=dict)

    @property
    def train(self) -> bool:
        """Whether answers are to be recorded with token ids and logprobs (`model_info.train`)."""
        return self.model_info.get("train") is True

    @field_validator("litellm_params")
    @classmethod
    def _names_model(cls, params: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(params.get("model"), str):
            raise ValueError("needs `model`, for example `anthropic/claude-sonnet-4-5`")
        return params


class EngineEntry(Section):
    """An engine whose adapters Ratchet loads and unloads; calls for `base_model` are sent to it."""

    api_base: str
    base_model: str
    api_key: str | None = None
    timeout: float = Field(default=60, gt=0)
    drain_seconds: float = Field(default=300, ge=0)
    train: bool = True

    @field_validator("api_base")
    @classmethod
    def _http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return url.rstrip("/")

    @property
    def as_model(self) -> ModelEntry:
        """The same as an entry of `model_list`."""
        params = {"model": f"hosted_vllm/{self.base_model}", "api_base": self.api_base, "api_key": self.api_key}
        return ModelEntry(model_name=self.base_model, litellm_params=params, model_info={"train": self.train})


class Match(Section):
    """Which messages a slot's prompt may be found in."""

    model: str | None = None
    role: Literal["system", "developer", "user"] | None = None


class Slot(Section):
    """A prompt known from the start: its text becomes version 1."""

    template: str = Field(min_length=1)
    match: Match = Match()
    train: bool = False


class Cache(Section):
    """Answers kept for calls that are the same to the byte. `seconds` 0: none are."""

    seconds: float = Field(default=0, ge=0)
    max_mb: float = Field(default=64, gt=0)


class Optimizer(Section):
    """The model that writes critiques and edits. None: only proposers that need none are used."""

    model: str | None = None
    api_base: str | None = None
    api_key: str | None = None


class Rewards(Section):
    """How rewards of several names become one number: sum of weight times value. Names without weight count nothing."""

    weights: dict[str, float] = Field(default_factory=lambda: {"reward": 1.0})


class Gate(Section):
    """The held-out test that a candidate must pass."""

    alpha: float = Field(default=0.05, gt=0, lt=1)
    min_samples: int = Field(default=10, ge=2)
    method: Literal["fixed", "anytime"] = "fixed"
    span: float = Field(default=1.0, gt=0)  # largest difference of two rewards, which anytime has to know
    max_cost: float | None = Field(default=None, gt=0)  # ratios to the prompt in force
    max_latency: float | None = Field(default=None, gt=0)
    max_length: float | None = Field(default=None, gt=0)


Privacy = Literal["full", "masked", "hash", "none"]


class Redaction(Section):
    """What is masked before a line is written. Secrets always are. A slot's mode goes before a route's."""

    mode: Privacy = "masked"
    routes: dict[str, Privacy] = Field(default_factory=dict)
    slots: dict[str, Privacy] = Field(default_factory=dict)
    emails: bool = False
    phones: bool = False
    cards: bool = False


class Storage(Section):
    """Where the journal and the projection live, and how long what is in them."""

    data_dir: Path = Path("data")
    collector: str | None = None  # the URL of another host's server: this one has no store, and sends its journal there
    collector_key: SecretStr | None = None
    url: SecretStr | None = None  # clickhouse://[user[:password]@]host[:port]/database; None: a DuckDB file in data_dir
    archive_after: int | None = Field(default=2, ge=1)  # days
    retention: int | None = Field(default=None, ge=1)  # days
    memory_limit_mb: int = Field(default=1024, ge=64)
    query_timeout: float = Field(default=30, gt=0)
    max_answer_mb: float = Field(default=16, gt=0)
    redaction: Redaction = Redaction()

    @field_validator("url")
    @classmethod
    def _is_clickhouse(cls, url: SecretStr | None) -> SecretStr | None:
        given = "" if url is None else url.get_secret_value()
        if given and not CLICKHOUSE.fullmatch(given):
            raise ValueError("must be clickhouse://[user[:password]@]host[:port]/database, or clickhouses:// for TLS")
        return url if given else None

    @field_serializer("url", "collector_key", when_used="json")
    def _as_it_is(self, secret: SecretStr | None) -> str | None:
        """To the server's own processes, over a pipe; whatever else shows settings shows no password."""
        return None if secret is None else secret.get_secret_value()

    @field_validator("collector")
    @classmethod
    def _http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        if not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        # Anywhere: a password that holds / or # ends where the path or the fragment begins.
        if "@" in url:
            raise ValueError("must hold no user and password; give store.collector_key")
        return url.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _one_place(self) -> "Storage":
        if self.collector is not None and self.url is not None:
            raise ValueError("`url` belongs into the configuration of the collector that `collector` names")
        return self


class OtlpOut(Section):
    """Where recorded spans and rewards are sent as OTLP; without `endpoint`, nowhere."""

    endpoint: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    protocol: Literal["http/protobuf"] = "http/protobuf"
    content: Literal["full", "none"] = "full"
    rewards: Literal["logs", "spans", "phoenix"] = "logs"
    timeout: float = Field(default=10, gt=0)

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError("must start with http:// or https://")
        return None if url is None else url.rstrip("/").removesuffix("/v1/traces")


class Export(Section):
    """What leaves this machine by itself."""

    otlp: OtlpOut = OtlpOut()


class Settings(Section):
    """Everything. `load` builds it; nothing else reads the environment or the file."""

    server: Server = Server()
    upstream: Upstream = Upstream()
    model_list: tuple[ModelEntry, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    slots: dict[str, Slot] = Field(default_factory=dict)
    cache: Cache = Cache()
    optimizer: Optimizer = Optimizer()
    rewards: Rewards = Rewards()
    gate: Gate = Gate()
    store: Storage = Storage()
    export: Export = Export()

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """Every model with a target of its own: `model_list`, and each engine's base model."""
        return (*self.model_list, *(engine.as_model for engine in self.engines))

    @model_validator(mode="after")
    def _fallbacks_are_known(self) -> "Settings":
        known = {entry.model_name for entry in self.models}
        for model, others in self.upstream.fallbacks.items():
            for name in (model, *others):
                if name not in known:
                    raise ValueError(f"upstream.fallbacks: `{name}` is no model_name of model_list")
        return self

    @model_validator(mode="after")
    def _key_off_loopback(self) -> "Settings":
        if not self.server.loopback and not self.server.keys:
            raise ValueError(
                f"server.keys: listening on {self.server.host} needs at least one key; add one, or listen on 127.0.0.1"
            )
        return self


def load(
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """Defaults, then the file (`path` or RATCHET_CONFIG), then RATCHET_DATA_DIR, then `flags` such as
    {"server.port": 4100}; flags that are None are not given.

    Raises ConfigError that names the key, and for an unknown key the nearest known one.
    """
    env = os.environ if environ is None else environ
    path = path or env.get("RATCHET_CONFIG")
    tree = _read(Path(path)) if path else {}
    if env.get("RATCHET_DATA_DIR"):
        _put(tree, "store.data_dir", env["RATCHET_DATA_DIR"])
    for dotted, value in (flags or {}).items():
        if value is not None:
            _put(tree, dotted, value)
    tree = _from_environment(tree, env, "")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise _explain(error) from None


def _read(path: Path) -> dict[str, Any]:
    import yaml  # who is handed its settings needs none

    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}", param="config") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}", param="config") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of sections, for example `server:`", param="config")
    return {section: ({} if value is None else value) for section, value in tree.items()}


def _put(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _from_environment(value: Any, env: Mapping[str, str], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _from_environment(item, env, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_environment(item, env, f"{where}.{index}") for index, item in enumerate(value)]
    if isinstance(value, str) and value.startswith("os.environ/"):
        name = value.removeprefix("os.environ/")
        if name not in env:
            raise ConfigError(f"{where}: the environment variable {name} is not set", param=where)
        return env[name]
    return value


def _explain(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown key `{where}`{_nearest(first['loc'])}", param=where)
    message = str(first["msg"]).removeprefix("Value error, ")
    return ConfigError(f"{where}: {message}" if where else message, param=where or None)


def _nearest(location: tuple[int | str, ...]) -> str:
    model: Any = Settings
    for part in location[:-1]:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        model = next((arg for arg in get_args(model) if isinstance(arg, type) and issubclass(arg, BaseModel)), model)
    if not (isinstance(model, type) and issubclass(model, BaseModel)):
        return ""
    prefix = ".".join(str(part) for part in location[:-1])
    close = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1, cutoff=0.4)
    if close:
        return f"; did you mean `{f'{prefix}.{close[0]}'.lstrip('.')}`?"
    return "; known here: " + ", ".join(f"`{name}`" for name in model.model_fields)

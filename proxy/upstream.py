"""Where a call goes, and the raw relay to it: bytes out, bytes back, over pooled connections.

They are the own client's (`upstream.client: raw`), or aiohttp's: by choice, and where only it will do, for a forward
proxy of the environment or a base URL with credentials.
"""

import asyncio
import io
import os
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from operator import itemgetter
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from collector.settings import ModelEntry, Settings
from collector.settings import Upstream as UpstreamSettings
from proxy import http1
from proxy.balance import Balance, Group, Member
from proxy.errors import BadRequest, Header, UpstreamError
from proxy.http1_errors import ClosedEarly, ConnectFailed, ConnectTimeout, InvalidRequest, ReadTimeout, TransportError
from proxy.http1_protocol import Connection
from proxy.http1_response import Response
from proxy.reply import HOP, RawReply, Reply, broken, late

# Of a request: what belongs to this hop, what is asked anew, and what is a secret of this server.
_NOT_SENT = HOP | {b"host", b"content-length", b"accept-encoding", b"expect", b"cookie"}
_CREDENTIALS = frozenset((b"authorization", b"x-api-key", b"api-key"))
_NOT_SENT_OWN = _NOT_SENT | _CREDENTIALS
_USUAL = (b"keep-alive", b"close")  # in Connection: nothing that names another header
_MOST_NAMES = 1024
_PLAIN = (b"accept-encoding", b"identity")
_RAW = {"openai": "https://api.openai.com/v1", "hosted_vllm": None, "openai_like": None, "litellm_proxy": None}
_HOSTS = {"api.openai.com": "openai", "api.anthropic.com": "anthropic"}
_ROUTER = frozenset(("weight", "order", "rpm", "tpm", "max_parallel_requests"))
_STALE_SECONDS = 1.0
_AS_FILE = 1 << 20
_BROKEN = (aiohttp.ClientError, ConnectionError, TransportError)
_LATE = (TimeoutError, ConnectTimeout, ReadTimeout)
_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


@dataclass(frozen=True)
class Target:
    """Where a call goes. `model`: the name to send instead of the client's. `headers`: credentials of the config, which
    replace the client's where the target is `own` or the client's is a Ratchet key. `params`: LiteLLM's, for a provider
    that needs translation; None for a raw relay."""

    base: str
    provider: str
    model: str | None = None
    own: bool = False  # whether the client's credentials stay behind
    headers: tuple[tuple[str, str], ...] = ()
    params: Mapping[str, Any] | None = None
    proxy: str | None = None
    train: bool = False  # whether token ids and logprobs are to be recorded


class Plain(NamedTuple):
    """A target that the own client speaks to, and its base as that client wants it."""

    target: Target
    base: http1.Target


@dataclass(slots=True)
class Request:
    """What is sent. `attempts` counts the times it was."""

    target: Target
    method: str
    tail: str
    query: str = ""
    headers: list[Header] = field(default_factory=list)
    body: bytes = b""
    attempts: int = 0
    once: bool = False  # whether another target takes over where this one fails
    service: str = "openai"
    given: list[Header] = field(default_factory=list)  # the client's headers, from which another target's are made
    keyed: bool = False
    unpacked: bool = False
    stripping: bool = False  # whether the usage that the answer will tell was not asked for by the client
    under_way: Response | None = None  # the answer to a first attempt that was made already
    ago: float = 0.0  # seconds since that


class AiohttpReply(Reply):
    """An answer over aiohttp."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        super().__init__(response.status, response.raw_headers)
        self._response = response

    async def read(self) -> bytes:
        """The whole body, as it came."""
        try:
            return await self._response.read()
        except TimeoutError as error:
            raise late() from error
        except _BROKEN as error:
            raise broken() from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body's bytes as they arrive."""
        content = self._response.content
        while True:
            try:
                chunk = await content.readany()
            except TimeoutError as error:
                raise late() from error
            except _BROKEN as error:
                raise broken() from error
            if not chunk:
                return
            yield chunk

    def close(self) -> None:
        """Gives the connection back if the answer was read whole, else closes it, which cancels the call upstream."""
        self._response.close()


class Upstream:
    """The upstreams of one configuration: `route` picks one, `send` calls it. One event loop only; `close` ends it."""

    def __init__(self, settings: Settings, environ: Mapping[str, str] | None = None) -> None:
        env = os.environ if environ is None else environ
        self._settings = settings.upstream
        self._defaults = {
            "openai": _default(settings.upstream.default, _bearer(env.get("OPENAI_API_KEY"))),
            "anthropic": _default(settings.upstream.anthropic, _anthropic_key(env.get("ANTHROPIC_API_KEY"))),
        }
        self._models = tuple(dict.fromkeys(entry.model_name for entry in settings.models))
        known = [(entry, _target(entry, env)) for entry in settings.models]
        spoken = [(entry, _anthropic(target)) for entry, target in known if target.provider == "anthropic"]
        self._balance = {"openai": _balance(known, settings.upstream), "anthropic": _balance(spoken, settings.upstream)}
        self._urls: dict[tuple[str, str], URL] = {}
        self._session: aiohttp.ClientSession | None = None
        self._client = http1.Client(
            connect_timeout=self._settings.connect_timeout, read_timeout=self._settings.read_timeout, resend=False
        )
        self._bases: dict[str, http1.Target | None] = {}
        self._plain: dict[tuple[str, str | None], Plain | None] = {}

    @property
    def models(self) -> tuple[str, ...]:
        """The configured model names."""
        return self._models

    def route(self, service: str, model: str | None) -> Target:
        """The target for a model, spoken to in the dialect of `service` (openai | anthropic). Raises BadRequest."""
        if model not in self._models:
            return self._defaults[service]
        target = self._balance[service].first(model)
        if target is None:
            raise BadRequest(f"`{model}` does not speak Anthropic's messages; use chat/completions", param="model")
        return target

    @property
    def retries(self) -> int:
        """How often a call is sent again that nothing came of."""
        return self._settings.retries

    def shared(self, service: str, model: str | None) -> bool:
        """Whether another target can take over a call for the model."""
        return self._balance[service].shared(model)

    def after(self, service: str, model: str, failed: Target) -> Target | None:
        """The target that takes over from one that failed; None where there is none."""
        return self._balance[service].after(model, failed)

    @property
    def session(self) -> aiohttp.ClientSession:
        """Made on first use, because it belongs to the running loop."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(
                    total=None,
                    sock_connect=self._settings.connect_timeout,
                    sock_read=self._settings.read_timeout,
                ),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            )
        return self._session

    def plain(self, service: str, model: str | None) -> "Plain | None":
        """The target where a call for the model is relayed raw and nothing else; None for any other call."""
        name = model if model in self._models else None
        if (service, name) in self._plain:
            return self._plain[service, name]
        first = self._settings.first_byte_timeout
        target = None if first is not None or self.shared(service, name) else self._routed(service, name)
        base = None if target is None or target.params is not None or target.train else self._base(target)
        found = None if base is None or target is None else Plain(target, base)
        self._plain[service, name] = found
        return found

    def _routed(self, service: str, model: str | None) -> Target | None:
        try:
            return self.route(service, model)
        except BadRequest:
            return None

    def ready(self, plain: "Plain") -> Connection | None:
        """A connection that a call can be sent on at once; None where there is none."""
        return self._client.ready(plain.base.origin)

    def unused(self, connection: Connection) -> None:
        """Nothing was sent on it after all."""
        self._client.unused(connection)

    def lines(self, plain: "Plain", tail: str, query: str, headers: list[Header]) -> bytes:
        """The head of a POST, up to the length of its body. Raises InvalidRequest."""
        return self._client.lines(b"POST", plain.base, _path(tail, query), headers)

    async def close(self) -> None:
        """Closes all connections."""
        await self._client.close()
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(self, request: Request) -> Reply:
        """The head of the answer. Raises UpstreamError or UpstreamTimeout.

        Sent again only when nothing came back: the connection could not be made, or a pooled one turned out to be dead
        at once. An upstream that was silent for longer may have done the work, and would bill it twice.
        """
        while True:
            request.attempts += 1
            sent = time.monotonic() - request.ago
            try:
                if self._settings.first_byte_timeout is None:
                    return await self._once(request)
                async with asyncio.timeout(self._settings.first_byte_timeout):
                    return await self._once(request)
            except _LATE as error:
                told = late()
                told.untouched = isinstance(error, ConnectTimeout | aiohttp.ConnectionTimeoutError)
                raise told from error
            except _BROKEN as error:
                untouched = _untouched(error, time.monotonic() - sent)
                if request.once or request.attempts > self._settings.retries or not untouched:
                    host = urlsplit(request.target.base).hostname
                    broke = UpstreamError(f"the upstream {host} can't be reached: {_why(error)}")
                    broke.untouched = untouched
                    raise broke from error
                await asyncio.sleep(0.02)

    async def _once(self, request: Request) -> Reply:
        if request.under_way is not None:
            begun, request.under_way, request.ago = request.under_way, None, 0.0
            await begun.head()
            return RawReply(begun)
        base = self._base(request.target)
        if base is None:
            return await self._by_aiohttp(request)
        path = _path(request.tail, request.query)
        response = await self._client.request(
            request.method.encode(), base, path, request.headers, request.body, fresh=request.attempts > 1
        )
        return RawReply(response)

    def _base(self, target: Target) -> http1.Target | None:
        """The target as the own client wants it; None where aiohttp has to do it."""
        if target.proxy is not None or self._settings.client != "raw":
            return None
        if target.base not in self._bases:
            try:
                self._bases[target.base] = http1.Target.parse(target.base)
            except InvalidRequest:
                self._bases[target.base] = None
        return self._bases[target.base]

    async def _by_aiohttp(self, request: Request) -> Reply:
        # aiohttp warns of large bytes, which it writes at once; a file it writes in pieces.
        body: Any = request.body if len(request.body) < _AS_FILE else io.BytesIO(request.body)
        response = await self.session.request(
            request.method,
            self._url(request),
            data=body or None,
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers],
            allow_redirects=False,
            proxy=request.target.proxy,
        )
        return AiohttpReply(response)

    def _url(self, request: Request) -> URL:
        """Parsed once for the few paths without a query; never normalised, since the upstream knows its own URLs."""
        key = (request.target.base, request.tail)
        url = self._urls.get(key)
        if url is None:
            url = URL(f"{request.target.base}/{request.tail}", encoded=True)
            if len(self._urls) < 256:
                self._urls[key] = url
        return URL(f"{url}?{request.query}", encoded=True) if request.query else url


class _Fates(dict[bytes, bool]):
    """Whether a header of a name goes upstream. Clients use few names, so each is looked at once."""

    def __init__(self, left_out: frozenset[bytes]) -> None:
        super().__init__()
        self._left_out = left_out

    def __missing__(self, name: bytes) -> bool:
        fate = name not in self._left_out and not name.startswith(b"x-ratchet-")
        if len(self) < _MOST_NAMES:
            self[name] = fate
        return fate


_WITH_CREDENTIALS, _WITHOUT_CREDENTIALS = _Fates(_NOT_SENT), _Fates(_NOT_SENT_OWN)
_NAME = itemgetter(0)


def headers_for(target: Target, given: list[Header], *, keyed: bool, unpacked: bool) -> list[Header]:
    """The client's headers as they go upstream: without this hop's, without ours, credentials by the target's rule."""
    own = keyed or target.own
    names = [*map(_NAME, given)]
    if unpacked or names.count(b"connection") > 1 or dict(given).get(b"connection", _USUAL[0]) not in _USUAL:
        named = [value for name, value in given if name == b"connection"]
        extra = {name.strip() for value in named for name in value.lower().split(b",")}
        fates = _Fates((_NOT_SENT_OWN if own else _NOT_SENT) | extra | ({b"content-encoding"} if unpacked else set()))
    else:
        fates = _WITHOUT_CREDENTIALS if own else _WITH_CREDENTIALS
    sent = [*compress(given, map(fates.__getitem__, names)), _PLAIN]
    return [*sent, *_encoded(target.headers)] if own else sent


@lru_cache
def _encoded(headers: tuple[tuple[str, str], ...]) -> list[Header]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]


@lru_cache
def _path(tail: str, query: str) -> bytes:
    """As it goes over the wire."""
    path = f"/{tail}?{query}" if query else f"/{tail}"
    return (path if path.isascii() else quote(path.encode("latin-1"), safe=_VISIBLE)).encode()


def _balance(known: list[tuple[ModelEntry, Target]], settings: UpstreamSettings) -> Balance[Target]:
    """Entries of one name are a group. LiteLLM's `weight` is an entry's share of the calls."""
    groups: dict[str, list[Member[Target]]] = {}
    for entry, target in known:
        weight = entry.litellm_params.get("weight", 1)
        sound = isinstance(weight, int | float) and weight > 0
        groups.setdefault(entry.model_name, []).append(Member(target, float(weight) if sound else 1.0))
    fallbacks = settings.fallbacks
    whole = {name: Group(members, fallbacks.get(name, ())) for name, members in groups.items()}
    return Balance(whole, settings.cooldown)


def _default(base: str, headers: tuple[tuple[str, str], ...]) -> Target:
    """The client's own key goes along, unless it is a Ratchet key: then `headers`, the environment's, do."""
    host = urlsplit(base).hostname or ""
    return Target(base, _HOSTS.get(host, host), headers=headers, proxy=_proxy(base))


def _target(entry: ModelEntry, env: Mapping[str, str]) -> Target:
    params = entry.litellm_params
    provider, slash, name = str(params["model"]).partition("/")
    base = params.get("api_base") or params.get("base_url") or (_RAW.get(provider) if slash else None)
    if not slash or provider not in _RAW or base is None:
        return Target(str(base or ""), provider if slash else "litellm", own=True, params=_without_router(params))
    key = params.get("api_key") or (env.get("OPENAI_API_KEY") if provider == "openai" else None)
    extra = tuple((str(k), str(v)) for k, v in (params.get("extra_headers") or {}).items())
    base = str(base).rstrip("/")
    headers = (*_bearer(key), *extra)
    return Target(base, provider, name, own=True, headers=headers, proxy=_proxy(base), train=entry.train)


def _without_router(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """What LiteLLM's router reads in an entry is no parameter of a call."""
    return {name: value for name, value in params.items() if name not in _ROUTER}


def _anthropic(target: Target) -> Target:
    """An entry `anthropic/NAME` needs no translation for a client that speaks Anthropic's own dialect."""
    params = target.params or {}
    base = (target.base or "https://api.anthropic.com").rstrip("/")
    base = base if base.endswith("/v1") else base + "/v1"
    name = str(params["model"]).partition("/")[2]
    headers = _anthropic_key(params.get("api_key") or os.environ.get("ANTHROPIC_API_KEY"))
    return Target(base, "anthropic", name, own=True, headers=headers, proxy=_proxy(base))


def _bearer(key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),) if key else ()


def _anthropic_key(key: str | None) -> tuple[tuple[str, str], ...]:
    return (("x-api-key", key),) if key else ()


def _proxy(base: str) -> str | None:
    """The HTTP proxy that the environment names for a base URL. Read once: aiohttp would read it on every call."""
    url = urlsplit(base)
    if not url.hostname or proxy_bypass(url.hostname):
        return None
    return getproxies().get(url.scheme)


def _untouched(error: BaseException, seconds: float) -> bool:
    """Whether nothing came of a request: it was not sent, or its connection ended at once and without an answer."""
    if isinstance(error, aiohttp.ClientConnectorError | ConnectFailed):
        return True
    if isinstance(error, TransportError):
        return isinstance(error, ClosedEarly) and not error.bytes_seen and seconds < _STALE_SECONDS
    return seconds < _STALE_SECONDS


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__

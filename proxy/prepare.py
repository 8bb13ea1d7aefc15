"""From what the client sent to what goes upstream: identity, versions, injection, target."""

import logging

import orjson

from collector import template
from collector.errors import NotFound
from proxy import adapters, inject, members, metrics, openings, prompt_ids, slots
from proxy import table as tables
from proxy.answer import judge
from proxy.dialects.base import Json, Prompt
from proxy.identity import Identity
from proxy.openings import Opening
from proxy.paths import pinned
from proxy.record import Applied, Call
from proxy.slots import Match
from proxy.table import Table
from proxy.versions import Slot, Snapshot, Versions

log = logging.getLogger(__name__)


class Body:
    """The request's body on its way: the bytes to send, and the same parsed (None: it is no JSON object). `stripping`:
    the usage that the answer will tell was not asked for by the client."""

    stripping = False

    def __init__(self, raw: bytes, parsed: Json | None = None) -> None:
        """`parsed`: what parsing `raw` gave, where that was done already."""
        self.raw = raw
        self.parsed: Json | None = parsed if parsed is not None else parse(raw) if raw else None


def parse(raw: bytes) -> Json | None:
    """The JSON object in a body; None if there is none."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def aim(call: Call, body: Body, provider: str, model: str | None) -> None:
    """Notes where the call goes; the name of the model is changed where the target, or an adapter, has its own."""
    call.provider = provider
    model = call.upstream_model = call.adapter.served if call.adapter else model
    if model is not None and model != call.reading.model and body.parsed is not None:
        body.raw = inject.replace(body.raw, body.parsed, ("model",), model)


def with_usage(call: Call, raw: bytes) -> bytes | None:
    """The body of a call for a stream, asking for its usage too, whose chunk is then to be stripped again; None where
    that isn't needed or can't be done."""
    if call.body is None or not (call.reading.stream and call.dialect.usage_option):
        return None
    return inject.ask_for_usage(raw, call.body)


def read_answer(call: Call, copy: bytes | None, status: int) -> None:
    """What a whole answer says, and whether it is one of an error. `copy`: readable."""
    reply = parse(copy) if copy else None
    if reply is not None:
        call.summary = call.dialect.summarise(reply)
    judge(call, status)


class Prompts:
    """Puts the episode's versions in the place of the prompts that a call brings. Fails open, and counts it."""

    def __init__(self, versions: Versions, table: Table) -> None:
        self._versions = versions
        self._table = table

    async def apply(self, call: Call, body: Body, named: str | None) -> None:
        """Changes `body` where a prompt is a slot's; notes in `call` which versions it is served.

        `named`: the slot of the header `x-ratchet-slot`; its word is enough, whatever the prompt says. Raises NotFound
        for a pinned version that doesn't exist, and Unavailable if that can't be found out.
        """
        pins, texts = pinned(call.route.pins), {}
        for slot, version in pins.items():
            texts[slot] = await self._pinned(slot, version)
        snapshot, revision = await self._snapshot(call.identity)
        if snapshot.adapters:
            call.adapter = adapters.deal(snapshot, call.reading.model, pins, call.identity.episode_id, revision)
        if body.parsed is not None and "prompt_id" in body.parsed and call.dialect.operation in prompt_ids.OPERATIONS:
            await self._ask(call, body, pins, snapshot, revision)
            return
        wanted = {*pins, *((named,) if named else ())}
        matches = slots.find(
            snapshot, call.reading.prompts, call.reading.model, only=wanted if named else None, prefer=pins
        )
        if named and named not in {match.known.slot for match in matches}:
            explicit = slots.named(snapshot, named, call.reading.prompts)
            matches += [explicit] if explicit else []
        for match in matches:
            slot = match.known.slot
            if slot in pins:
                self._inject(call, body, match, texts[slot], _pin(match, pins[slot]))
            else:
                self._deal(call, body, match, snapshot.slots[slot], revision)
        if call.reading.prompts and not matches:
            metrics.UNMATCHED.inc()
        found = {match.known.slot for match in matches} | ({call.adapter.slot} if call.adapter else set())
        for _ in wanted - found:
            metrics.FAIL_OPEN.labels("not_matched").inc()

    def at_once(self, call: Call, body: Body, opening: Opening | None) -> bool:
        """The same for a call that pins and names nothing. False where a revision would have to be awaited: then
        nothing has changed. `opening`: how the body begins, where that is known under the deployments in force."""
        now = self._versions.current
        revision = self._revision(call.identity, now)
        if revision > now.revision:
            return False
        reading = call.reading
        if opening is not None and revision == now.revision and _alone(reading.prompts, now):
            _open(call, body, opening)
            return True
        if now.adapters:
            call.adapter = adapters.deal(now, reading.model, {}, call.identity.episode_id, revision)
        matches = slots.find(now, reading.prompts, reading.model)
        for match in matches:
            self._deal(call, body, match, now.slots[match.known.slot], revision)
        if reading.prompts and not matches:
            metrics.UNMATCHED.value += 1
        return True

    def _deal(self, call: Call, body: Body, match: Match, slot: Slot, revision: int) -> None:
        choice = slot.choose(call.identity.episode_id, revision)
        if choice is not None:
            served = Applied(slot.name, choice.version, None, choice.propensity, match.values)
            self._inject(call, body, match, slot.texts[choice.version], served)

    async def _ask(self, call: Call, body: Body, pins: dict[str, str], snapshot: Snapshot, revision: int) -> None:
        """The prompt that the body asks for by `prompt_id`. Raises BadRequest, or NotFound for an unknown slot."""
        parsed = body.parsed or {}
        asked = prompt_ids.read(parsed)
        slot = snapshot.slots.get(asked.slot)
        choice = slot.choose(call.identity.episode_id, revision) if slot is not None else None
        if slot is None or choice is None:
            raise NotFound(f"there is no prompt slot `{asked.slot}`", param="prompt_id", code="slot_not_found")
        if slot.name in pins:
            text = await self._pinned(slot.name, pins[slot.name])
            number, candidate = _numbered(pins[slot.name])
            served = Applied(slot.name, number, candidate, 1.0, asked.values)
        else:
            text = slot.texts[choice.version]
            served = Applied(slot.name, choice.version, None, choice.propensity, asked.values)
        prompt_ids.check(asked, slot, text)
        raw = members.without(body.raw, parsed, *prompt_ids.NAMES)
        rendered = template.render(text, asked.values)
        body.raw = prompt_ids.place(raw, parsed, call.dialect.operation, slot.role, rendered)
        metrics.INJECTED.inc()
        call.applied.append(served)

    async def _snapshot(self, identity: Identity) -> tuple[Snapshot, int]:
        """The episode's revision, and a snapshot that knows it."""
        now = self._versions.current
        revision = self._revision(identity, now)
        return (now if revision <= now.revision else await self._versions.reach(revision)), revision

    def _revision(self, identity: Identity, now: Snapshot) -> int:
        """That of the episode's first call, whichever worker served it."""
        key, mine = tables.key("sticky", identity.episode_id), now.revision.to_bytes(8, "big")
        if identity.source == "new":
            self._table.add(key, mine)
            return now.revision
        return int.from_bytes(self._table.put_if_absent(key, mine), "big")

    async def _pinned(self, slot: str, version: str) -> str:
        text = await self._text(slot, version)
        if text is None:
            await self._versions.refresh()
            text = await self._text(slot, version)
        if text is not None:
            return text
        known = self._known(slot)
        if known is None:
            raise NotFound(f"there is no slot `{slot}`", param="with", code="slot_not_found")
        have = ", ".join(str(number) for number in sorted(known.texts))
        message = f"slot `{slot}` has no version `{version}`; it has {have}"
        raise NotFound(message, param="with", code="version_not_found")

    async def _text(self, slot: str, version: str) -> str | None:
        known = self._known(slot)
        if known is None:
            return None
        if version.startswith("c-"):
            return await self._versions.candidate(slot, version)
        return known.texts.get(int(version))

    def _known(self, slot: str) -> Slot | None:
        snapshot = self._versions.current
        return snapshot.slots.get(slot) or snapshot.adapters.get(slot)

    def _inject(self, call: Call, body: Body, match: Match, text: str, served: Applied) -> None:
        metrics.MATCHED.inc()
        rendered = slots.render(match, text)
        if rendered is None or body.parsed is None:
            metrics.FAIL_OPEN.labels("missing_variable").inc()
            return
        try:
            raw = inject.replace(body.raw, body.parsed, match.prompt.path, rendered)
        except Exception:
            metrics.FAIL_OPEN.labels("error").inc()
            log.exception("the prompt of slot %s could not be injected", match.known.slot)
            return
        if raw is not body.raw:
            metrics.INJECTED.inc()
            body.raw = raw
        call.applied.append(served)


def _alone(prompts: list[Prompt], now: Snapshot) -> bool:
    """Whether no prompt but that of the first message can be a slot's."""
    texts = [one.text for one in prompts if len(one.text) in now.lengths and one.path != openings.PATH]
    return now.exact.keys().isdisjoint(texts) if texts else True


def _open(call: Call, body: Body, opening: Opening) -> None:
    """Puts in place of the body's beginning what goes upstream."""
    if not opening.applied:
        metrics.UNMATCHED.value += 1
        return
    call.applied += opening.applied
    metrics.MATCHED.value += 1
    if opening.goes is not opening.came and body.parsed is not None:
        metrics.INJECTED.value += 1
        body.raw = opening.goes + body.raw[len(opening.came) :]
        body.parsed["messages"][0] = opening.message


def _pin(match: Match, version: str) -> Applied:
    number, candidate = _numbered(version)
    return Applied(match.known.slot, number, candidate, 1.0, match.values)


def _numbered(version: str) -> tuple[int | None, str | None]:
    """`(number, candidate)` of a pin: one of them is set."""
    return (None, version) if version.startswith("c-") else (int(version), None)

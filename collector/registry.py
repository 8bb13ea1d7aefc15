"""The registry of slots, versions and deployments: a fold of journal events, held in memory.

Commands are pure: they check, and return the events to journal; `apply` folds an event once it is on disk. So what the
registry says is never ahead of what survives a crash.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from collector.errors import BadInput, Conflict, NotFound
from collector.keys import Keys
from collector.model import Deployment, Version

Event = tuple[str, dict[str, Any]]

SLOT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
EVENTS = ("version", "candidate", "deployment", "key")
_MATCH_ROLES = ("system", "developer", "user")


def template_hash(template: str) -> str:
    """First 12 hex digits of the sha256 of a prompt's text."""
    return hashlib.sha256(template.encode()).hexdigest()[:12]


def check_slot_name(slot: str) -> str:
    """The name, if it is one. Raises BadInput."""
    if not SLOT_NAME.fullmatch(slot):
        raise BadInput(f"slot name {slot!r} must be 1 to 64 of A-Z a-z 0-9 _ -", param="slot")
    return slot


@dataclass
class _Slot:
    versions: list[Version] = field(default_factory=list)
    candidates: dict[str, str] = field(default_factory=dict)
    arms: dict[int, float] = field(default_factory=dict)
    before: list[dict[int, float]] = field(default_factory=list)  # arms that rollbacks lead back to, latest last
    revision: int = 0

    @property
    def kind(self) -> str:
        return self.versions[0].kind if self.versions else "prompt"

    @property
    def match(self) -> dict[str, str]:
        """What the latest version that says so wants."""
        return next((version.match for version in reversed(self.versions) if version.match), {})


class Registry:
    """Slots by name, and the audit log. Not thread-safe: its owner holds a lock."""

    def __init__(self, events: Iterable[tuple[str, Mapping[str, Any]]] = ()) -> None:
        self._slots: dict[str, _Slot] = {}
        self._log: list[Deployment] = []
        self.keys = Keys()
        self._snapshot: dict[str, Any] | None = None
        self.serial = 0  # counts every change of the snapshot: deployments, and versions that are not live yet
        for event, fields in events:
            self.apply(event, fields)

    @property
    def revision(self) -> int:
        """The number of the latest deployment; 0 before the first."""
        return self._log[-1].revision if self._log else 0

    # Reading

    def snapshot(self) -> dict[str, Any]:
        """What a proxy needs: {"revision", "serial", "slots", "log", "keys", "keyed"}, JSON-safe. Shared: do not change
        it."""
        if self._snapshot is None:
            self._snapshot = {
                "revision": self.revision,
                "serial": self.serial,
                "slots": {name: _slot_for_proxy(slot) for name, slot in self._slots.items() if slot.versions},
                "log": [_log_for_proxy(deployment) for deployment in self._log],
                "keys": self.keys.in_force(),
                "keyed": self.keys.any,
            }
        return self._snapshot

    def slots(self) -> list[dict[str, Any]]:
        """Every slot with its live arms, by name."""
        return [
            {
                "slot": name,
                "kind": slot.kind,
                "match": slot.match,
                "versions": len(slot.versions),
                "candidates": len(slot.candidates),
                "live": _arms_json(slot.arms),
                "revision": slot.revision,
            }
            for name, slot in sorted(self._slots.items())
        ]

    def versions(self, slot: str) -> list[dict[str, Any]]:
        """The versions of a slot, ascending, each with its live share. Raises NotFound."""
        found = self._slot(slot)
        return [{**asdict(version), "live": found.arms.get(version.version, 0.0)} for version in found.versions]

    def version(self, slot: str, version: int) -> dict[str, Any]:
        """One version with its live share. Raises NotFound."""
        found = self._slot(slot)
        return {**asdict(self._version(slot, version)), "live": found.arms.get(version, 0.0)}

    def templates(self) -> list[str]:
        """The text of every prompt version."""
        return [one.template for slot in self._slots.values() for one in slot.versions if one.template is not None]

    def candidate(self, slot: str, candidate: str) -> str:
        """The template of a prompt under search. Raises NotFound."""
        template = self._slot(slot).candidates.get(candidate)
        if template is None:
            raise NotFound(f"slot {slot} has no candidate {candidate}", param="candidate")
        return template

    def log(self, slot: str | None = None) -> list[dict[str, Any]]:
        """The audit log, ascending."""
        return [
            {**asdict(deployment), "arms": _arms_json(deployment.arms)}
            for deployment in self._log
            if slot in (None, deployment.slot)
        ]

    def adapters(self, since_ns: int | None = None) -> list[Version]:
        """Adapter versions: all, or those that an episode which began after `since_ns` may use or a rollback needs."""
        found: list[Version] = []
        for name, slot in sorted(self._slots.items()):
            if slot.kind == "adapter":
                numbers = range(1, len(slot.versions) + 1) if since_ns is None else self._in_use(name, slot, since_ns)
                found += [slot.versions[number - 1] for number in numbers]
        return found

    def _in_use(self, name: str, slot: _Slot, since_ns: int) -> list[int]:
        """The live arms, those that the next rollback leads to, and all in force at some time after `since_ns`."""
        used = {*slot.arms, *(slot.before[-1] if slot.before else {})}
        for deployment in reversed([line for line in self._log if line.slot == name]):
            used |= set(deployment.arms)
            if deployment.ts_ns <= since_ns:
                break
        return sorted(used)

    # Commands

    def add_version(self, version: Version) -> tuple[int, list[Event]]:
        """`(number, events)` of a version whose own number is ignored; content that is known keeps its number.

        The first version of a prompt slot is deployed at once: it is the agent's own text, so nothing changes.
        Raises BadInput (name, kind, match, parent) and Conflict (the slot is of another kind).
        """
        check_slot_name(version.slot)
        _check_content(version)
        known = self._slots.get(version.slot, _Slot())
        if known.versions and known.kind != version.kind:
            raise Conflict(f"slot {version.slot} holds {known.kind} versions", param="kind")
        if version.parent is not None and not 1 <= version.parent <= len(known.versions):
            raise BadInput(f"parent: slot {version.slot} has no version {version.parent}", param="parent")
        number = next((other.version for other in known.versions if other.hash == version.hash), None)
        events: list[Event] = []
        if number is None:
            number = len(known.versions) + 1
            events.append(("version", {**asdict(version), "version": number}))
        if version.kind == "prompt" and not known.arms:
            events.append(self._initial(version.slot, 1, version.created_ns))
        return number, events

    def missing_initial(self, now_ns: int) -> list[Event]:
        """Deployments of prompt slots whose first version was stored but not deployed when a process died."""
        lost = [name for name, slot in self._slots.items() if slot.versions and slot.kind == "prompt" and not slot.arms]
        return [self._initial(name, 1, now_ns, offset) for offset, name in enumerate(lost)]

    def add_candidate(self, slot: str, template: str, now_ns: int) -> tuple[str, list[Event]]:
        """`(id, events)`: "c-" and the template's hash; no events when it is known. Raises BadInput, Conflict."""
        check_slot_name(slot)
        if not template:
            raise BadInput("template: is empty", param="template")
        known = self._slots.get(slot, _Slot())
        if known.versions and known.kind != "prompt":
            raise Conflict(f"slot {slot} holds {known.kind} versions", param="slot")
        candidate = f"c-{template_hash(template)}"
        if candidate in known.candidates:
            return candidate, []
        body = {"slot": slot, "candidate": candidate, "template": template, "ts_ns": now_ns}
        return candidate, [("candidate", body)]

    def promote(
        self,
        slot: str,
        version: int,
        traffic: float,
        now_ns: int,
        *,
        evidence: str = "manual",
        job_id: str | None = None,
        note: str | None = None,
    ) -> list[Event]:
        """The deployment that deals `traffic` of new episodes to `version` and the rest to what is live now.

        No event when that is so already. Raises NotFound, BadInput (traffic), Conflict (nothing to share with).
        """
        found = self._slot(slot)
        self._version(slot, version)
        if isinstance(traffic, bool) or not math.isfinite(traffic) or not 0 < traffic <= 1:
            raise BadInput("traffic: must be above 0 and at most 1", param="traffic")
        arms = {version: 1.0}
        if traffic < 1:
            others = {arm: share for arm, share in found.arms.items() if arm != version}
            if not others:
                raise Conflict(f"slot {slot}: no other version is live to take the rest; use traffic 1")
            current = max(others, key=lambda arm: (others[arm], -arm))
            arms = {version: float(traffic), current: round(1 - traffic, 12)}
        if arms == found.arms:
            return []
        return [self._deployment(slot, "promote", arms, now_ns, evidence, job_id, note)]

    def rollback(
        self,
        slot: str,
        now_ns: int,
        *,
        evidence: str = "manual",
        job_id: str | None = None,
        note: str | None = None,
    ) -> list[Event]:
        """The deployment of the arms before the last promote that was not rolled back. Raises NotFound, Conflict."""
        found = self._slot(slot)
        if not found.before:
            raise Conflict(f"slot {slot}: there is nothing to roll back to")
        return [self._deployment(slot, "rollback", found.before[-1], now_ns, evidence, job_id, note)]

    # Folding

    def apply(self, event: str, fields: Mapping[str, Any]) -> None:
        """Fold one stored event; an event that was folded before changes nothing."""
        if event == "key":
            self.keys.apply(fields)
            self._snapshot = None
            self.serial += 1
            return
        slot = self._slots.setdefault(fields["slot"], _Slot())
        if event == "candidate":
            slot.candidates[fields["candidate"]] = fields["template"]
            return
        self._snapshot = None
        self.serial += 1
        if event == "version" and fields["version"] == len(slot.versions) + 1:
            slot.versions.append(Version(**{key: fields[key] for key in Version.__slots__ if key in fields}))
        elif event == "deployment" and fields["revision"] > self.revision:
            self._deploy(slot, Deployment(**{**_known(fields), "arms": _arms(fields["arms"])}))

    def _deploy(self, slot: _Slot, deployment: Deployment) -> None:
        if deployment.action == "promote":
            slot.before.append(slot.arms)
        elif deployment.action == "rollback" and slot.before:
            slot.before.pop()
        slot.arms = deployment.arms
        slot.revision = deployment.revision
        self._log.append(deployment)

    def _initial(self, slot: str, version: int, now_ns: int, offset: int = 0) -> Event:
        event, fields = self._deployment(slot, "initial", {version: 1.0}, now_ns, "initial", None, None)
        return event, {**fields, "revision": fields["revision"] + offset}

    def _deployment(
        self,
        slot: str,
        action: str,
        arms: dict[int, float],
        now_ns: int,
        evidence: str,
        job_id: str | None,
        note: str | None,
    ) -> Event:
        fields = {
            "revision": self.revision + 1,
            "slot": slot,
            "action": action,
            "arms": _arms_json(arms),
            "ts_ns": now_ns,
            "evidence": evidence,
            "job_id": job_id,
            "note": note,
        }
        return "deployment", fields

    def _slot(self, slot: str) -> _Slot:
        found = self._slots.get(slot)
        if found is None:
            known = ", ".join(sorted(self._slots)) or "there are none yet"
            raise NotFound(f"no slot {slot!r}; known: {known}", param="slot")
        return found

    def _version(self, slot: str, version: int) -> Version:
        versions = self._slot(slot).versions
        if not 1 <= version <= len(versions):
            raise NotFound(f"slot {slot} has no version {version}; it has {len(versions)}", param="version")
        return versions[version - 1]


def _check_content(version: Version) -> None:
    if version.kind == "prompt" and not version.template:
        raise BadInput("template: a prompt version needs a text", param="template")
    if version.kind == "adapter" and not (version.base_model and version.path):
        raise BadInput("an adapter version needs `base_model` and `path`", param="path")
    for key, value in version.match.items():
        if key not in ("model", "role") or not value:
            raise BadInput(f"match: {key!r} is not one of model, role", param="match")
    if version.match.get("role", "system") not in _MATCH_ROLES:
        raise BadInput(f"match.role: must be one of {', '.join(_MATCH_ROLES)}", param="match.role")


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in Deployment.__slots__ if key in fields}


def _arms(arms: Mapping[Any, float]) -> dict[int, float]:
    return {int(version): float(share) for version, share in arms.items()}


def _arms_json(arms: Mapping[int, float]) -> dict[str, float]:
    return {str(version): share for version, share in arms.items()}


def _slot_for_proxy(slot: _Slot) -> dict[str, Any]:
    names = ("version", "hash", "template", "base_model", "path")
    versions = [
        {name: getattr(version, name) for name in names if getattr(version, name) is not None}
        for version in slot.versions
    ]
    return {"kind": slot.kind, "match": slot.match, "versions": versions}


def _log_for_proxy(deployment: Deployment) -> dict[str, Any]:
    names = ("revision", "slot", "action", "ts_ns")
    return {**{name: getattr(deployment, name) for name in names}, "arms": _arms_json(deployment.arms)}

"""Which adapter version a call is served by: pure, on the snapshot.

A call belongs to an adapter slot when it asks for the slot's model (`match.model`, else the base model). What it is
served by goes by its own name at the engine, so a flip changes the name that new episodes' calls ask for, and nothing
is ever replaced under a name.
"""

from collections.abc import Mapping

from proxy.record import Applied
from proxy.versions import Snapshot


def deal(
    snapshot: Snapshot, model: str | None, pins: Mapping[str, str], episode_id: str, revision: int
) -> Applied | None:
    """The version for this call, pinned or dealt to its episode; None: the model is served as it is.

    A pin that the slot doesn't have is none: pins were checked before.
    """
    slot = next((slot for slot in snapshot.adapters.values() if slot.model == model), None)
    if slot is None:
        return None
    number = int(pins[slot.name]) if pins.get(slot.name, "").isdigit() else 0
    if number in slot.texts:
        return Applied(slot.name, number, None, 1.0, {}, slot.texts[number])
    choice = slot.choose(episode_id, revision)
    return choice and Applied(slot.name, choice.version, None, choice.propensity, {}, slot.texts[choice.version])

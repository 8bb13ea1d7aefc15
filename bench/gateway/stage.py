"""Where the run takes place: the folder, the CPUs, the upstream, and how each target is brought up."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bench.gateway import figures, ours, peers, process
from bench.gateway.cores import cores
from bench.gateway.load import Address
from bench.gateway.process import NotStarted, Target

TITLES = {
    "floor": "floor: raw ASGI + aiohttp, records nothing",
    "ours": "Ratchet, everything on",
    "unrecorded": "Ratchet, recording off",
    "tensorzero": "TensorZero 2026.6.0 embedded, observability off",
    "portkey": "Portkey 1.15.2",
    "litellm": "LiteLLM proxy 1.106.2",
}
PEERS = tuple(peers.COMMANDS)
BOOTS = 3

Say = Callable[[str], None]


class Stage:
    """One run's surroundings. `absent`: why a target takes no part; `boots`: seconds of each start, on all CPUs."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.cores = cores()
        self.upstream = ""
        self.absent: dict[str, str] = {}
        self.boots: dict[str, list[float]] = {}
        self._made = 0

    def fresh(self, name: str) -> Path:
        """A path that does not exist yet."""
        self._made += 1
        return self.folder / f"{self._made:02d}-{name}"

    @contextlib.contextmanager
    def scripted(self) -> Iterator[Target]:
        """The upstream; itself as the target that is called directly."""
        log = self.folder / "upstream.log"
        with process.running([sys.executable, "-m", "bench.gateway.upstream"], log, self.cores.load) as running:
            port = process.port_of(running, log)
            self.upstream = f"http://127.0.0.1:{port}/v1"
            yield Target(figures.DIRECT, Address(port))

    @contextlib.contextmanager
    def target(self, name: str, cpus: set[int]) -> Iterator[Target]:
        """A gateway of this name, answering. Raises NotStarted."""
        if name == "floor":
            bringing_up = self._floor(cpus)
        elif name in PEERS:
            bringing_up = peers.served(name, self.fresh(name), self.upstream, cpus)
        else:
            bringing_up = ours.served(self.fresh(name), self.upstream, cpus, recording=name == figures.OURS)
        with bringing_up as target:
            yield target

    @contextlib.contextmanager
    def _floor(self, cpus: set[int]) -> Iterator[Target]:
        log = self.fresh("floor.log")
        began = time.monotonic()
        with process.running([sys.executable, "-m", "bench.gateway.floor", self.upstream], log, cpus) as running:
            target = Target("floor", Address(process.port_of(running, log)), running)
            yield process.answering(target, log, began)

    def install(self, names: Sequence[str]) -> list[str]:
        """The names without the peers that cannot be installed."""
        present = []
        for name in names:
            try:
                if name in PEERS:
                    self.say(f"{name}: installed?")
                    peers.install(name)
                present.append(name)
            except peers.Absent as absent:
                self.absent[name] = str(absent)
        return present

    def boot(self, names: Sequence[str]) -> list[str]:
        """Start each target alone on all CPUs and end it again, peers once. The names of those that answered."""
        present = []
        for name in names:
            if name == "unrecorded":  # the same server
                present.append(name)
                continue
            self.say(f"{name}: boot")
            try:
                for _ in range(1 if name in PEERS else BOOTS):
                    with self.target(name, self.cores.every) as target:
                        self.boots.setdefault(name, []).append(target.boot)
                present.append(name)
            except NotStarted as error:
                self.absent[name] = reason(error)
        return present

    def up(self, stack: contextlib.ExitStack, names: Sequence[str]) -> list[Target]:
        """All targets that start, on the CPU that is theirs, for as long as the stack lives."""
        targets = []
        for name in names:
            self.say(f"{name}: start")
            try:
                targets.append(stack.enter_context(self.target(name, self.cores.target)))
            except NotStarted as error:
                self.absent[name] = reason(error)
        return targets


def reason(error: NotStarted) -> str:
    """The last line that a target printed."""
    said = [line for line in str(error).splitlines() if line.strip()]
    return f"did not start: {said[-1][:300]}" if said else "did not start"

"""What every benchmark writes: `bench/results/{name}.json` (figures, bounds, which are met), its picture, and a table.

A figure that was not measured is left out, never guessed: its bound then counts as not met.
"""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass
class Result:
    """The figures of one benchmark. `must`: name -> ("<=" or ">=", bound); `notes`: anything worth keeping beside."""

    name: str
    must: Mapping[str, tuple[str, float]]
    measures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def met(self) -> dict[str, bool]:
        """For each bound, whether its figure was measured and keeps it."""
        return {name: self._keeps(name, sign, bound) for name, (sign, bound) in self.must.items()}

    def _keeps(self, name: str, sign: str, bound: float) -> bool:
        value = self.measures.get(name)
        if value is None:
            return False
        return value <= bound if sign == "<=" else value >= bound

    def write(self, seconds: float, folder: Path = RESULTS) -> Path:
        """Write the JSON and return its path; `seconds` is the whole run's wall time."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        body = {
            "measures": self.measures,
            "must": {name: list(bound) for name, bound in self.must.items()},
            "met": self.met(),
            "machine": machine(),
            "seconds": round(seconds, 1),
            "notes": self.notes,
        }
        path.write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")
        return path

    def show(self, console: Console | None = None) -> None:
        """Print every figure beside its bound."""
        table = Table("measure", "value", "must", "met", title=f"bench {self.name}")
        met = self.met()
        for name in dict.fromkeys([*self.must, *self.measures]):
            value = self.measures.get(name)
            bound = " ".join(str(part) for part in self.must[name]) if name in self.must else ""
            shown = "not measured" if value is None else f"{value:.4g}"
            table.add_row(name, shown, bound, {True: "yes", False: "NO"}.get(met[name], "") if name in met else "")
        (console or Console()).print(table)


def machine() -> dict[str, Any]:
    """What the figures were taken on: no names, no paths."""
    return {
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "arch": platform.machine(),
        "python": platform.python_version(),
    }

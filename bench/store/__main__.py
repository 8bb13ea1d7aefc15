"""`python -m bench.store`: every figure of the store, its picture and its JSON, in one run of some minutes."""

import argparse
import time
from pathlib import Path

import orjson

from bench.result import RESULTS, Result
from bench.store import batches, browse, ingest, live, long, million, peers

MUST = {
    "faults_lost_or_doubled": ("<=", 0.0),
    "record_p99_ms_idle": ("<=", 1.0),
    "record_p99_ms_heavy_query": ("<=", 2.0),
    "ingest_x_executemany": (">=", 10.0),
    "bytes_json_columns_x": (">=", 5.0),
    "bytes_sqlite_x": (">=", 10.0),
    "episodes_x_sqlite": (">=", 10.0),
    "page_ms": ("<=", 50.0),
    "visible_max_s": ("<=", 2.0),
    "rebuild_identical": (">=", 1.0),
    "phoenix_ingest_x": (">=", 10.0),
}


def main() -> None:
    """Read the flags, measure, write."""
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=__doc__)
    parser.add_argument("--spans", type=int, default=1_000_000, help="narrow spans of the reading figures")
    parser.add_argument("--wide", type=int, default=40_000, help="6 KB spans of the ingest figures")
    parser.add_argument("--sample", type=int, default=2_000, help="of them, for executemany")
    parser.add_argument("--long", type=int, default=10_000, help="15 KB calls of long histories")
    parser.add_argument("--batches", type=int, default=8, help="batches of the loader's CPU a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="of recording, twice")
    # Of fewer, the second for which a segment stays open is most of our time.
    parser.add_argument("--phoenix", type=int, default=3_000, help="spans sent to Arize Phoenix; 0: leave it out")
    flags = parser.parse_args()
    began = time.monotonic()
    result = Result("store", MUST)
    result.notes["wide_spans"], result.notes["narrow_spans"] = flags.wide, flags.spans
    live.measure(result, flags.seconds, 200, 20)
    browse.start(result, flags.rounds)
    ingest.measure(result, flags.wide, flags.sample, flags.rounds)
    batches.measure(result, flags.batches)
    long.measure(result, flags.long)
    million.measure(result, flags.spans, flags.rounds)
    _faults(result)
    if flags.phoenix:
        peers.measure(result, flags.phoenix)
    result.write(time.monotonic() - began)
    picture(result, RESULTS / "store.svg")
    result.show()


def _faults(result: Result) -> None:
    """What the last `make faults` counted in the raw tables, over its kills."""
    try:
        found = orjson.loads((RESULTS / "faults.json").read_bytes())["measures"]
    except FileNotFoundError:
        result.notes["faults"] = "absent: `make faults` has not been run here"
        return
    result.notes["faults"] = f"by `make faults`, {found['kills']:.0f} kills"
    result.measures["faults_lost_or_doubled"] = sum(
        value for name, value in found.items() if name.endswith(("_lost", "_doubled"))
    )


def picture(result: Result, path: Path) -> None:
    """How many times each bound is kept, on a logarithmic axis; left of 1 it is not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in MUST if result.measures.get(name) and MUST[name][1]]
    kept = []
    for name in names:
        sign, bound = MUST[name]
        value = result.measures[name]
        kept.append(value / bound if sign == ">=" else bound / value)
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(names) + 1.2))
    axes.barh(names, kept, color=["#2a7f62" if ratio >= 1 else "#b23a48" for ratio in kept])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("times better than the bound")
    axes.invert_yaxis()
    for number, name in enumerate(names):
        axes.annotate(f" {result.measures[name]:.3g}", (kept[number], number), va="center", fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    main()

"""The table and the picture."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from bench.gateway import figures
from bench.gateway.payloads import scenarios
from bench.gateway.rounds import Samples
from bench.gateway.stage import TITLES, Stage
from bench.gateway.stats import Figure
from bench.result import Result, machine

# What a column shows: (heading, scenario, measure, form)
COLUMNS = (
    ("JSON c=16, CPU µs", "json_c16", "cpu_us", "{:,.0f}"),
    ("6 KB c=16, CPU µs", "json_6kb", "cpu_us", "{:,.0f}"),
    ("SSE c=4, CPU µs", "sse_unpaced", "cpu_us", "{:,.0f}"),
    ("SSE paced c=16, CPU µs", "sse_paced", "cpu_us", "{:,.0f}"),
    ("JSON c=1, CPU µs", "json_c1", "cpu_us", "{:,.0f}"),
    ("RPS c=16", "json_c16", "rps", "{:,.0f}"),
    ("added p50 c=1, ms", "json_c1", "added_p50_ms", "{:.2f}"),
    ("added p99 c=1, ms", "json_c1", "added_p99_ms", "{:.2f}"),
    ("added TTFT c=4, ms", "sse_unpaced", "added_ttft_ms", "{:.2f}"),
)
_HOW = (
    "One gateway's whole process tree on one CPU, upstream and load generator on another; all targets kept running, "
    "each scenario on all of them in turn. CPU is the scheduler's own count (schedstat) of the whole tree, collector "
    "and loader included, until every record is loaded, over all calls sent. Ratios are taken within a round.",
    "The floor reads model and stream, forwards the body with two headers, and passes the answer on.",
    "Ratchet: a key, a slot whose second prompt version is injected into every call, redaction, durable journal, "
    "collector, usage asked for in streams and stripped again. Recording off: the same with a recorder that forgets; "
    "the product has no such switch.",
    "TensorZero: the HTTP port that its embedded gateway opens for its patched OpenAI client, no database, "
    "observability off. Portkey: its npm package on Node, with the HTTP server of its lock file, since streams fail "
    "with newer ones. LiteLLM: its proxy, one worker, a master key, no database, no callbacks.",
)
_BUSY = (
    "The machine was busy with other work: calls a second, latency and boot times are far from those of a quiet one, "
    "and CPU times are swollen."
)
_PICTURED = ("floor", "ours", "tensorzero", "portkey", "litellm")


def markdown(result: Result, samples: Samples, stage: Stage, memory: Mapping[str, int]) -> str:
    """The tables: figures by target, ratios beside their bounds, and how it was measured."""
    return "\n".join([*_figures(samples, stage, memory), "", *_bounds(result), "", *_notes(result, samples), ""])


def _figures(samples: Samples, stage: Stage, memory: Mapping[str, int]) -> list[str]:
    heads = ["", *(column[0] for column in COLUMNS), "RSS of the tree, MB", "boot, s"]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, title in TITLES.items():
        if name in stage.absent:
            rows.append(f"| {title} | absent: {stage.absent[name]} |")
        elif name in memory:
            cells = [cell(figures.shown(samples, column[1], name, column[2]), column[3]) for column in COLUMNS]
            boots = stage.boots.get(name)
            cells += [f"{memory[name] / 1e6:,.0f}", f"{median(boots):.1f}" if boots else ""]
            rows.append(f"| {title} | " + " | ".join(cells) + " |")
    return rows


def cell(figure: Figure | None, form: str) -> str:
    """The median and, in brackets, what the rounds lay between."""
    if figure is None:
        return "-"
    return f"{form.format(figure.median)} ({form.format(figure.low)}..{form.format(figure.high)})"


def _bounds(result: Result) -> list[str]:
    rows = ["| measure | value | rounds | must | met |", "|---|---|---|---|---|"]
    met = result.met()
    for name in dict.fromkeys([*result.must, *result.measures]):
        value, spread = result.measures.get(name), result.notes["spread"].get(name)
        bound = f"{result.must[name][0]} {result.must[name][1]:.3g}" if name in result.must else ""
        row = [name, "not measured" if value is None else f"{value:.3g}"]
        row += [f"{spread[0]:.3g}..{spread[1]:.3g}" if spread else "", bound]
        rows.append("| " + " | ".join([*row, "" if name not in met else "yes" if met[name] else "no"]) + " |")
    return rows


def _notes(result: Result, samples: Samples) -> list[str]:
    notes, load = result.notes, result.notes["load_average"]
    lines = [f"{notes['rounds']} interleaved rounds, medians (lowest..highest); {machine()['cpus']} CPUs."]
    if load:
        lines.append(f"Load average meanwhile {load['low']:.1f} to {load['high']:.1f}, median {load['median']:.1f}.")
        if load["median"] > 2 * (machine()["cpus"] or 1):  # the bench alone keeps each of its two CPUs busy
            lines.append(_BUSY)
    kept = notes["integrity"]
    if kept:
        lines.append(
            f"Ours: {kept['sent']:,} calls sent, {kept['lines']:,} journal lines, {kept['spans']:,} spans, "
            f"{kept['distinct']:,} distinct, {kept['injected']:,} with the promoted prompt."
        )
    lines += _parts(samples)
    lines += [f"{what}: failed, not counted: {why}" for what, why in notes["failed"].items()]
    return [f"- {line}" for line in (*lines, *_HOW)]


def _parts(samples: Samples) -> list[str]:
    lines = []
    for scenario in scenarios():
        worker = figures.shown(samples, scenario.name, figures.OURS, "cpu_worker_us")
        collector = figures.shown(samples, scenario.name, figures.OURS, "cpu_collector_us")
        if worker and collector:
            shares = f"the worker takes {worker.median:,.0f} µs a call, the collector {collector.median:,.0f} µs"
            lines.append(f"Ours, {scenario.title}: {shares}.")
    return lines


def picture(samples: Samples, path: Path) -> None:
    """CPU time a call by scenario and gateway, on a logarithmic axis, as SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(figsize=(9, 4.2))
    names = [name for name in _PICTURED if samples.of("json_c16", name, "cpu_us")]
    width = 0.8 / max(len(names), 1)
    for place, name in enumerate(names):
        for group, scenario in enumerate(scenarios()):
            value = figures.shown(samples, scenario.name, name, "cpu_us")
            if value is None:
                continue
            at = group + (place - (len(names) - 1) / 2) * width
            color = f"C{_PICTURED.index(name)}"
            axes.vlines(at, value.low, value.high, color=color)
            axes.plot(at, value.median, "o", color=color)
            label = f"{value.median:,.0f}"
            axes.annotate(label, (at, value.high), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yscale("log")
    axes.set_xticks(range(len(scenarios())), [scenario.title for scenario in scenarios()])
    axes.set_ylabel("CPU µs a call, whole process tree")
    handles = [Patch(color=f"C{_PICTURED.index(name)}") for name in names]
    titles = [TITLES[name] for name in names]
    axes.legend(handles, titles, fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)

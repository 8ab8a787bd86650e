"""What the prefix-reuse demo found: a table, a plot and a JSON file."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples._client import Answer, CacheUse
from examples._workload import Kind, Request

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABEL_WIDTH = 36
CELL_WIDTH = 30
SPEEDUP_WIDTH = 10

_ROWS = {
    Kind.FIRST: "first time",
    Kind.REPEAT: "repeated at once",
    Kind.RETURN: "back after eviction from the device",
}
_ALWAYS_SHOWN = ("matched_blocks", "onboarded_blocks", "offloaded_blocks", "failed_ops")
"""What is shown of the connector's summary also when it is 0."""

_COLOURS = ("#b4532a", "#1f6f8b", "#6a4c93")
_MARKERS = {Kind.FIRST: "o", Kind.REPEAT: "v", Kind.RETURN: "s"}


@dataclass(frozen=True)
class Run:
    """One server's answers, in the order of the requests, and what its caches did."""

    name: str
    requests: Sequence[Request]
    answers: Sequence[Answer]
    cache: CacheUse
    summary: dict[str, float]
    """The connector's own counters; empty without one."""
    moved_blocks: dict[str, int] = field(default_factory=dict)
    """Blocks moved along each route, such as disk_to_host, where the log names every copy."""
    hit: str = "host hit"
    """What a hit beyond the device's own cache is called."""

    def ttfts(self, kind: Kind) -> list[float]:
        """Return the seconds to the first token of all requests of `kind`."""
        return [answer.ttft_s for request, answer in self.pairs() if request.kind is kind]

    def source(self, kind: Kind) -> str:
        """Say where the prompt tokens of the requests of `kind` came from."""
        answers = [answer for request, answer in self.pairs() if request.kind is kind]
        prompt_tokens = sum(answer.prompt_tokens for answer in answers)
        cached = sum(answer.cached_tokens for answer in answers) / max(1, prompt_tokens)
        if cached < 0.05:
            return "cold" if kind is Kind.FIRST else "recomputed"
        name = "device hit" if kind is Kind.REPEAT else self.hit
        return name if cached > 0.75 else f"{cached:.0%} {name}"

    def pairs(self) -> list[tuple[Request, Answer]]:
        """Return each request with its answer."""
        return list(zip(self.requests, self.answers, strict=True))

    def numbers(self) -> dict[str, object]:
        """Return everything for the JSON file."""
        requests = []
        for request, answer in self.pairs():
            about = {"kind": request.kind.value, "prefix": request.prefix, "round": request.round}
            requests.append({**about, **asdict(answer)})
        return {
            "name": self.name,
            "cache": asdict(self.cache),
            "summary": self.summary,
            "requests": requests,
        }


def differing(baseline: Run, cached: Run) -> list[int]:
    """Return the numbers (from 1) of the requests that the servers answered with other tokens."""
    pairs = zip(baseline.answers, cached.answers, strict=True)
    return [
        number
        for number, (one, other) in enumerate(pairs, start=1)
        if (one.token_ids, one.text) != (other.token_ids, other.text)
    ]


def speedup(baseline: Run, cached: Run, kind: Kind) -> float:
    """Return how many times faster the median first token of `kind` came with the connector."""
    return ratio_of_medians(baseline.ttfts(kind), cached.ttfts(kind))


def saving(run: Run) -> float:
    """Return how many times faster than a cold prefix a returning one was, on the same server."""
    return ratio_of_medians(run.ttfts(Kind.FIRST), run.ttfts(Kind.RETURN))


def ratio_of_medians(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return how many times longer `slow` took."""
    return statistics.median(slow) / statistics.median(fast)


def table(baseline: Run, cached: Run) -> str:
    """Return the one table of the demo."""
    header = row("time to first token, median (range)", baseline.name, cached.name, "speed-up")
    lines = [header, "-" * len(header)]
    for kind, label in _ROWS.items():
        one, other = (
            f"{seconds_cell(run.ttfts(kind))} {run.source(kind)}" for run in (baseline, cached)
        )
        lines.append(row(label, one, other, f"{speedup(baseline, cached, kind):.1f}x"))
    for tier in ("device", "host"):
        label = f"prompt tokens from the {tier} cache"
        lines.append(row(label, _share(baseline, tier), _share(cached, tier)))
    for key, value in cached.summary.items():
        if value or key in _ALWAYS_SHOWN:
            lines.append(row(key.replace("_", " "), "-", f"{value:,}"))
    total = len(baseline.answers)
    same = total - len(differing(baseline, cached))
    lines.append(row("answers with the same tokens", "", f"{same} of {total}"))
    return "\n".join(lines)


def write_json(path: Path, setup: dict[str, object], baseline: Run, cached: Run) -> None:
    """Write all numbers: the setup, every request of both servers, and what the table shows."""
    content = {
        "setup": setup,
        "speedup": {kind.value: speedup(baseline, cached, kind) for kind in Kind},
        "speedup_over_cold_on_the_same_server": {
            run.name: saving(run) for run in (baseline, cached)
        },
        "differing_requests": differing(baseline, cached),
        "runs": [run.numbers() for run in (baseline, cached)],
    }
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_plot(path: Path, title: str, runs: Sequence[Run], restart: int | None = None) -> None:
    """Draw the time to the first token of every request of all runs.

    restart: the number of the last request before the last run's server was started anew.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run, colour in zip(runs, _COLOURS, strict=False):
        _draw_run(axes, run, colour)
    _shade_rounds(axes, runs[0].requests)
    if restart is not None:
        _mark_restart(axes, restart, runs[-1])
    _label_axes(axes, title, len(runs))
    figure.savefig(path)


def row(label: str, first: str, second: str, last: str = "") -> str:
    """Return one row of the table."""
    cells = f"{first:>{CELL_WIDTH}}{second:>{CELL_WIDTH}}{last:>{SPEEDUP_WIDTH}}"
    return f"{label:<{LABEL_WIDTH}}{cells}".rstrip()


def seconds_cell(values: Sequence[float]) -> str:
    """Return some times as one cell of the table."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f}-{max(values):.2f})"


def _share(run: Run, tier: str) -> str:
    """Return a tier's part of all prompt tokens."""
    hits: int = getattr(run.cache, f"{tier}_hits")
    return f"{hits / run.cache.device_queries:.0%}" if run.cache.device_queries else "-"


def _draw_run(axes: "Axes", run: Run, colour: str) -> None:
    """Draw one server's times: a marker and a line for each kind of request."""
    kinds = [request.kind for request in run.requests]
    for kind, marker in _MARKERS.items():
        numbers = [number for number, other in enumerate(kinds, start=1) if other is kind]
        label = f"{run.name}: {run.source(kind)}"
        axes.plot(numbers, run.ttfts(kind), marker, color=colour, markersize=6, label=label)
        axes.plot(numbers, run.ttfts(kind), color=colour, linewidth=1, alpha=0.5)


def _shade_rounds(axes: "Axes", requests: Sequence[Request]) -> None:
    """Shade every second round and name each at the top."""
    rounds = [request.round for request in requests]
    top = axes.get_xaxis_transform()
    for this in sorted(set(rounds)):
        left = rounds.index(this) + 0.5
        right = left + rounds.count(this)
        if this % 2 == 0:
            axes.axvspan(left, right, color="0.95", zorder=0, linewidth=0)
        name = f"round {this}" if this else "each prefix twice in a row"
        axes.text((left + right) / 2, 0.98, name, transform=top, ha="center", va="top", size=8)


def _mark_restart(axes: "Axes", restart: int, run: Run) -> None:
    label = f"{run.name}: server restarted"
    axes.axvline(restart + 0.5, color=_COLOURS[2], linestyle=":", linewidth=1.2, label=label)


def _label_axes(axes: "Axes", title: str, num_runs: int) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.1, high * 1.6)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.01)
    axes.set_title(title, loc="left", size=10)
    axes.set_xlabel("request, in the order sent")
    axes.set_ylabel("time to first token (s)")
    axes.grid(axis="y", color="0.85", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    axes.legend(frameon=False, fontsize=8, ncols=num_runs, **place)

"""What the leader's decisions cost, through the connector's own hooks; no bytes are copied.

Beside each figure: a floor measured in turn with it (the least such a decision could do in
Python), and where known what NVIDIA Dynamo's KVBM, whose leader is compiled, takes for the same.
Those references are quoted: they were measured on another machine of this kind. Times are the
thread's own processor time, which leaves out what other processes took.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import fmean

from benchmarks import arrivals
from benchmarks.arrivals import BLOCK_SIZE, NUM_BLOCKS, full_side
from benchmarks.decoding import NUM_REQUESTS, DecodingBatch
from benchmarks.report import Aim, Ratio, Result, at_most, text_table, time_figure
from benchmarks.timing import Timed, interleaved

KVBM_COLD_MS, KVBM_RESIDENT_MS, KVBM_STEP_MS = 0.6, 1.4, 0.56
FASTER, WITHIN_TWICE = at_most(1.0), at_most(2.0)
LOOK_UPS, DIGESTS, COMPARISONS = "1,000 look-ups", "1,000 digests", "256 comparisons"
HEADER = (
    *("decision", "best ms", "median ms", "floor", "floor ms", "best/floor"),
    *("KVBM ms (quoted)", "best/KVBM", "aim", "met"),
)


@dataclass(frozen=True)
class Decision:
    """One row of the table. kvbm_ms: quoted."""

    name: str
    floor: str
    kvbm_ms: float | None = None
    aim: Aim | None = None


MATCHES = (
    Decision("engine keys: match, 1,000 blocks cold", LOOK_UPS, KVBM_COLD_MS, FASTER),
    Decision("engine keys: match, 1,000 blocks resident", LOOK_UPS, KVBM_RESIDENT_MS, FASTER),
    Decision("engine keys: pin, plan and end that load", LOOK_UPS),
    Decision("own chain: match, 1,000 blocks cold (lazy)", DIGESTS, KVBM_COLD_MS, WITHIN_TWICE),
    Decision("own chain: match, 1,000 blocks resident", DIGESTS, KVBM_RESIDENT_MS, WITHIN_TWICE),
    Decision("own chain: hash 1,000 blocks", DIGESTS),
)
STEPS = (
    Decision("256 decodes, no block completes", COMPARISONS, KVBM_STEP_MS, FASTER),
    Decision("256 decodes, 16 blocks complete (mean of 16)", COMPARISONS, KVBM_STEP_MS, FASTER),
    Decision("256 decodes, 256 blocks complete at once", COMPARISONS),
)


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure arrivals and steps; `scratch` is not used."""
    repeats, cycles = (20, 3) if quick else (300, 40)
    settings = {"block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS, "num_decodes": NUM_REQUESTS}
    result = Result("leader", {**settings, "repeats": repeats, "cycles": cycles})
    matches = _matches()
    gc.collect()
    gc.freeze()  # as vLLM does before it serves
    rows = list(_rows(result, MATCHES, interleaved(matches, repeats)))
    rows += _rows(result, STEPS, _steps(cycles))
    gc.unfreeze()
    result.table = text_table(HEADER, rows)
    return result


def _matches() -> dict[str, Timed]:
    tokens, keys = arrivals.new_tokens(), arrivals.random_keys(NUM_BLOCKS)
    engine = full_side(engine_keys=True, resident=keys)
    chain = full_side(engine_keys=False, resident=arrivals.own_keys(tokens))
    cold = arrivals.arrivals(arrivals.new_tokens(), arrivals.random_keys(NUM_BLOCKS))
    warm = arrivals.arrivals(tokens, keys)
    timed = (
        arrivals.matching(engine, cold, 0),
        arrivals.matching(engine, warm, NUM_BLOCKS),
        arrivals.loading(engine, warm),
        arrivals.matching(chain, cold, 0),
        arrivals.matching(chain, warm, NUM_BLOCKS),
        arrivals.hashing(tokens),
    )
    floors = {LOOK_UPS: arrivals.look_ups(engine, keys), DIGESTS: arrivals.digests(tokens)}
    names = [decision.name for decision in MATCHES]
    return dict(zip(names, timed, strict=True)) | floors


def _steps(cycles: int) -> dict[str, list[float]]:
    """Seconds of each kind of step, from two batches that take `cycles` blocks in turn."""
    usual, mean, worst = (decision.name for decision in STEPS)
    seconds: dict[str, list[float]] = {usual: [], mean: [], worst: [], COMPARISONS: []}
    max_steps = (cycles + 1) * BLOCK_SIZE
    aligned = DecodingBatch(full_side(engine_keys=True), max_steps=max_steps, phase=lambda i: 0)
    staggered = DecodingBatch(
        full_side(engine_keys=True), max_steps=max_steps, phase=lambda i: i % BLOCK_SIZE
    )
    for cycle in range(cycles + 1):
        together = [(aligned.decode(), staggered.decode()) for _ in range(BLOCK_SIZE)]
        if not cycle:
            continue
        seconds[mean].append(fmean(step.seconds for _, step in together))
        steps = [step for step, _ in together]
        seconds[usual] += [s.seconds for s in steps if not s.num_ops and not s.num_results]
        planning = fsum(step.planning_seconds for step in steps if step.num_ops)
        reporting = fsum(step.reporting_seconds for step in steps)
        seconds[worst].append(planning + reporting)
        seconds[COMPARISONS].append(aligned.compare())
    return seconds


def _rows(
    result: Result, decisions: Sequence[Decision], seconds: dict[str, list[float]]
) -> Iterator[list[str]]:
    """Add the figures and ratios of some decisions to `result`; their rows of the table."""
    figures = {name: time_figure(name, "ms", taken) for name, taken in seconds.items()}
    result.figures += figures.values()
    for decision in decisions:
        own, floor = figures[decision.name], figures[decision.floor]
        to_floor = Ratio(f"{decision.name}: to {decision.floor}", own.best / floor.best)
        result.ratios.append(to_floor)
        cells = [decision.name, f"{own.best:.3f}", f"{own.median:.3f}", decision.floor]
        cells += [f"{floor.best:.3f}", f"{to_floor.value:.1f}"]
        yield [*cells, *_reference_cells(result, decision, own.best)]


def _reference_cells(result: Result, decision: Decision, best_ms: float) -> list[str]:
    if decision.kvbm_ms is None:
        return ["", "", "", ""]
    ratio = Ratio(f"{decision.name}: to KVBM's quoted", best_ms / decision.kvbm_ms, decision.aim)
    result.ratios.append(ratio)
    return [f"{decision.kvbm_ms}", f"{ratio.value:.2f}", str(decision.aim or ""), ratio.verdict]

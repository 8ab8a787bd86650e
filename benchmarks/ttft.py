"""Time to first token of a host hit, beside recomputing and the engine's own device hit.

Two engines in one interleaved run: vLLM alone, and vLLM with the connector. Prompts rotate
through a device cache that holds two of them, so that each return finds its blocks evicted.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import TTFT, write_checkpoint
from benchmarks.engines import KVBM_TRANSFER_CONFIG, Answer, Engine
from benchmarks.report import (
    Aim,
    Figure,
    Ratio,
    Result,
    at_least,
    at_most,
    text_table,
    time_figure,
)

NUM_PROMPTS = 4
BLOCK_SIZE = 128
ROUNDS, QUICK_ROUNDS = 5, 1
OPTIONS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 72,
    "max_model_len": 4608,
    "max_num_batched_tokens": 4608,
}
RECOMPUTE, COLD = "recompute", "first time, with connector"
HOST_HIT, DEVICE_HIT = "host hit", "device hit"
CONNECTOR_DEVICE_HIT = "device hit, with connector"
HEADER = ("prompt", "best ms", "median ms", "other tokens", "ratio", "aim", "met")

Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """Prompts of one length. The aims are for a host hit."""

    prompt_tokens: int
    shape: str
    recompute_over_host: Aim | None
    host_over_device: Aim


CASES = (
    # vLLM's own hit leaves the last block of an aligned prompt to recompute; ours does not.
    Case(4096, "whole blocks", at_least(45), at_most(0.25)),
    Case(4096 + 50, "50 past a block", None, at_most(1.15)),
)


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure both lengths of prompt."""
    num_rounds = QUICK_ROUNDS if quick else ROUNDS
    settings = {"rounds": num_rounds, "prompts": NUM_PROMPTS, "block_size": BLOCK_SIZE}
    result = Result("ttft", settings)
    rows: list[list[str]] = []
    for case in CASES:
        seconds, differing, counters = _measure_case(case, num_rounds, scratch)
        figures = {kind: _figure(case, kind, taken) for kind, taken in seconds.items()}
        ratios = list(_ratios(case, figures))
        result.figures += figures.values()
        result.ratios += ratios
        result.settings[f"{case.prompt_tokens} tokens: counters"] = counters
        result.settings[f"{case.prompt_tokens} tokens: differing answers"] = dict(differing)
        rows += _rows(case, figures, differing, ratios)
    result.table = text_table(HEADER, rows)
    return result


def _measure_case(case: Case, num_rounds: int, scratch: Path) -> tuple[Seconds, Counter[str], str]:
    """Seconds of each kind of request; both engines are new, so that prompts are cold once."""
    model = write_checkpoint(scratch / "ttft-model", TTFT)
    plain = Engine(model, OPTIONS, {})
    with_transfer = {**OPTIONS, "kv_transfer_config": KVBM_TRANSFER_CONFIG}
    kvbm = Engine(model, with_transfer, {"DYN_KVBM_CPU_CACHE_GB": "2"})
    try:
        plain.wait_ready()
        kvbm.wait_ready()
        return *_measure(plain, kvbm, num_rounds, case.prompt_tokens), kvbm.counters()
    finally:
        plain.close()
        kvbm.close()


def _measure(
    plain: Engine, kvbm: Engine, num_rounds: int, prompt_tokens: int
) -> tuple[Seconds, Counter[str]]:
    """Seconds of each kind of request, and how many of its answers differ from recomputing.

    With bfloat16 the size of the piece that is computed changes a token now and then, in the
    engine's own hits too; what is computed in one piece never differs.
    """
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    differing: Counter[str] = Counter()
    prompts = make_prompts(prompt_tokens)
    for round_index in range(num_rounds + 1):
        for prompt in prompts:
            answers = {
                RECOMPUTE: plain.generate([prompt], 1),
                COLD if round_index == 0 else HOST_HIT: kvbm.generate([prompt], 1),
                DEVICE_HIT: plain.generate([prompt], 1),
                CONNECTOR_DEVICE_HIT: kvbm.generate([prompt], 1),
            }
            right = answers[RECOMPUTE].tokens
            for kind, answer in answers.items():
                check_source(kind, answer, prompt_tokens)
                differing[kind] += answer.tokens != right
                if round_index or kind == COLD:
                    seconds[kind].append(answer.seconds)
    return seconds, differing


def check_source(kind: str, answer: Answer, prompt_tokens: int) -> None:
    """Raise where a prompt did not come from where its kind says."""
    (found,) = answer.num_cached_tokens
    is_whole_hit = found >= (prompt_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    if found if kind in (RECOMPUTE, COLD) else not is_whole_hit:
        raise RuntimeError(f"{kind}: {found} of {prompt_tokens} tokens came from a cache")


def make_prompts(prompt_tokens: int) -> list[list[int]]:
    """NUM_PROMPTS prompts without a common block."""
    source = random.Random(0)
    return [[source.randrange(256) for _ in range(prompt_tokens)] for _ in range(NUM_PROMPTS)]


def _figure(case: Case, kind: str, seconds: list[float]) -> Figure:
    return time_figure(f"{case.prompt_tokens} tokens: {kind}", "ms", seconds)


def _ratios(case: Case, figures: dict[str, Figure]) -> Iterator[Ratio]:
    recompute, host, device = (figures[kind] for kind in (RECOMPUTE, HOST_HIT, DEVICE_HIT))
    prefix = f"{case.prompt_tokens} tokens:"
    first, second = f"{prefix} recompute / host hit", f"{prefix} host hit / device hit"
    yield Ratio(first, recompute.best / host.best, case.recompute_over_host)
    yield Ratio(f"{first}, median", recompute.median / host.median)
    yield Ratio(second, host.best / device.best, case.host_over_device)
    yield Ratio(f"{second}, median", host.median / device.median)


def _rows(
    case: Case, figures: dict[str, Figure], differing: Counter[str], ratios: list[Ratio]
) -> Iterator[list[str]]:
    yield [f"{case.prompt_tokens} tokens, {case.shape}", *[""] * 6]
    yield from figure_rows(figures, differing, ratios)


def figure_rows(
    figures: dict[str, Figure], differing: Counter[str], ratios: list[Ratio]
) -> Iterator[list[str]]:
    """Table rows of what was timed, and of the ratios."""
    for kind, figure in figures.items():
        times = f"{figure.best:.1f}", f"{figure.median:.1f}"
        yield [f"  {kind}", *times, str(differing[kind]), "", "", ""]
    for ratio in ratios:
        name = ratio.name.partition(": ")[2]
        aim = str(ratio.aim) if ratio.aim else ""
        yield [f"  {name}", "", "", "", f"{ratio.value:.2f}", aim, ratio.verdict]

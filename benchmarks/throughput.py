"""Serving without any hit, with the connector and without: what offloading costs.

Two engines answer batches of prompts that nobody asked before, pair by pair, in alternating
order. Every batch is offloaded; after some of them the host tier is full and evicts as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.checkpoint import TTFT, write_checkpoint
from benchmarks.engines import KVBM_TRANSFER_CONFIG, Answer, Engine
from benchmarks.report import Ratio, Result, at_least, rate_figure, text_table

BLOCK_SIZE = 128
NUM_PROMPTS = 8
PROMPT_TOKENS = 512
OUTPUT_TOKENS = 32
PAIRS, QUICK_PAIRS = 24, 3
HOST_GB = 1.0  # about 7 batches
TOKENS_PER_BATCH = NUM_PROMPTS * (PROMPT_TOKENS + OUTPUT_TOKENS)
OPTIONS: dict[str, Any] = {
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 72,
    "max_model_len": 1024,
    "max_num_batched_tokens": 4608,
}
PLAIN, CONNECTOR = "vLLM", "vLLM with connector"
AIM = at_least(0.98)

Seconds = dict[str, list[float]]


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure pairs of batches."""
    num_pairs = QUICK_PAIRS if quick else PAIRS
    model = write_checkpoint(scratch / "ttft-model", TTFT)
    with_connector = {**OPTIONS, "kv_transfer_config": KVBM_TRANSFER_CONFIG}
    plain = Engine(model, OPTIONS, {})
    kvbm = Engine(model, with_connector, {"DYN_KVBM_CPU_CACHE_GB": str(HOST_GB)})
    try:
        plain.wait_ready()
        kvbm.wait_ready()
        seconds, num_differing = _measure({PLAIN: plain, CONNECTOR: kvbm}, num_pairs)
        return _result(seconds, num_differing, kvbm.counters())
    finally:
        plain.close()
        kvbm.close()


def _measure(engines: dict[str, Engine], num_pairs: int) -> tuple[Seconds, int]:
    """Seconds of each engine's batches, and how many prompts the two answered differently."""
    seconds: Seconds = {name: [] for name in engines}
    num_differing = 0
    for index, prompts in enumerate(_batches(num_pairs + 1)):
        answers: dict[str, Answer] = {}
        for name in engines if index % 2 else reversed(engines):
            answers[name] = engines[name].generate(prompts, OUTPUT_TOKENS)
            if hits := sum(answers[name].num_cached_tokens):
                raise RuntimeError(f"{name} found {hits} tokens of new prompts in a cache")
        pairs = zip(answers[PLAIN].tokens, answers[CONNECTOR].tokens, strict=True)
        num_differing += sum(one != other for one, other in pairs)
        for name, answer in answers.items() if index else ():
            seconds[name].append(answer.seconds)
    return seconds, num_differing


def _batches(count: int) -> Iterator[list[list[int]]]:
    source = random.Random(0)
    for _ in range(count):
        yield [[source.randrange(256) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]


def _result(seconds: Seconds, num_differing: int, counters: str) -> Result:
    settings = {
        "prompts": NUM_PROMPTS,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "pairs": len(seconds[PLAIN]),
        "differing_answers": num_differing,
        "counters": counters,
    }
    result = Result("throughput", settings)
    figures = [rate_figure(name, "tokens/s", TOKENS_PER_BATCH, seconds[name]) for name in seconds]
    result.figures += figures
    result.ratios += _ratios(seconds)
    result.table = "\n\n".join(_tables(result, num_differing))
    return result


def _ratios(seconds: Seconds) -> list[Ratio]:
    """Throughput with the connector to that without."""
    pairwise = [a / b for a, b in zip(seconds[PLAIN], seconds[CONNECTOR], strict=True)]
    lower, _, upper = quantiles(pairwise, n=4)
    of_medians = median(seconds[PLAIN]) / median(seconds[CONNECTOR])
    return [
        Ratio("ratio of medians", of_medians, AIM),
        Ratio("median of pairwise ratios", median(pairwise), AIM),
        Ratio("lower quartile of pairwise ratios", lower),
        Ratio("upper quartile of pairwise ratios", upper),
    ]


def _tables(result: Result, num_differing: int) -> Iterator[str]:
    rows = [(f.name, f"{f.best:.0f}", f"{f.median:.0f}") for f in result.figures]
    yield text_table(("engine", "best tokens/s", "median tokens/s"), rows)
    ratios = [
        (r.name, f"{r.value:.3f}", str(r.aim) if r.aim else "", r.verdict) for r in result.ratios
    ]
    yield text_table(("with connector / without", "", "aim", "met"), ratios)
    if num_differing:
        yield f"{num_differing} answers differ between the engines: rounding of bfloat16, or a bug"

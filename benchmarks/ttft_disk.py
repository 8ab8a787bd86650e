"""Time to first token of a disk hit, beside recomputing, a host hit and the engine's device hit.

The prompts and shapes of the `ttft` benchmark, on three engines in one interleaved run: vLLM alone,
vLLM with a host tier that holds all prompts, and vLLM with one that holds two of four, above a disk
tier without admission filter. LRU and the rotation see to it that a prompt that returns has left
host, so that all of its blocks come from disk; the leader's counters are checked at each one.

Disk hits and host hits compute the same pieces of a prompt: their tokens must be equal.
"""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import TTFT, write_checkpoint
from benchmarks.engines import KVBM_TRANSFER_CONFIG, Answer, Engine
from benchmarks.report import Figure, Ratio, Result, at_most, text_table, time_figure
from benchmarks.ttft import (
    BLOCK_SIZE,
    CASES,
    DEVICE_HIT,
    HEADER,
    HOST_HIT,
    NUM_PROMPTS,
    OPTIONS,
    RECOMPUTE,
    check_source,
    figure_rows,
    make_prompts,
)

ROUNDS, QUICK_ROUNDS = 5, 1
DISK_HIT = "disk hit"
HOST_BLOCKS, DISK_BLOCKS = 80, 160
WARM_UP_TOKENS = 24
"""Each is a step, in which blocks can be sent to disk; too few to complete another block."""

QUEUED_BLOCKS = 32
"""Of the last prompt, that may still have to be written when its answer is complete."""

CHECKED_TOKENS = 16
AIM = at_most(1.5)

Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Engines:
    plain: Engine
    host: Engine
    disk: Engine


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure both lengths of prompt."""
    num_rounds = QUICK_ROUNDS if quick else ROUNDS
    settings = {
        "rounds": num_rounds,
        "prompts": NUM_PROMPTS,
        "block_size": BLOCK_SIZE,
        "host_blocks": HOST_BLOCKS,
        "disk_blocks": DISK_BLOCKS,
    }
    result = Result("ttft_disk", settings)
    rows: list[list[str]] = []
    for case in CASES:
        seconds, differing, moved = _measure_case(case.prompt_tokens, num_rounds, scratch)
        prefix = f"{case.prompt_tokens} tokens:"
        figures = {
            kind: time_figure(f"{prefix} {kind}", "ms", taken) for kind, taken in seconds.items()
        }
        ratios = list(_ratios(prefix, figures))
        result.figures += figures.values()
        result.ratios += ratios
        result.settings[f"{prefix} moved blocks"] = moved
        result.settings[f"{prefix} answers unlike recomputed ones"] = dict(differing)
        rows.append([f"{case.prompt_tokens} tokens, {case.shape}", *[""] * 6])
        rows += figure_rows(figures, differing, ratios)
    result.table = text_table(HEADER, rows)
    return result


def _measure_case(
    prompt_tokens: int, num_rounds: int, scratch: Path
) -> tuple[Seconds, Counter[str], dict[str, int]]:
    """Seconds of each kind of request, answers unlike recomputed ones, blocks that disk moved."""
    model = write_checkpoint(scratch / "ttft-model", TTFT)
    prompts = make_prompts(prompt_tokens)
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(dir=scratch, prefix="cache-"))
        engines = _start(model, directory, stack)
        _warm_up(engines, prompts)
        seconds, differing = _measure(engines, prompts, num_rounds)
        _check_longer_answers(engines, prompts)
        return seconds, differing, engines.disk.moved_blocks()


def _start(model: Path, directory: str, stack: ExitStack) -> Engines:
    with_transfer = {**OPTIONS, "kv_transfer_config": KVBM_TRANSFER_CONFIG}
    disk_environment = {
        "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": str(HOST_BLOCKS),
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": str(DISK_BLOCKS),
        "DYN_KVBM_DISK_CACHE_DIR": directory,
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
    }
    engines = [
        Engine(model, OPTIONS, {}),
        Engine(model, with_transfer, {"DYN_KVBM_CPU_CACHE_GB": "2"}),
        Engine(model, with_transfer, disk_environment),
    ]
    for engine in engines:
        stack.callback(engine.close)
    for engine in engines:
        engine.wait_ready()
    return Engines(*engines)


def _warm_up(engines: Engines, prompts: list[list[int]]) -> None:
    """Compute every prompt once on each engine, and have all of them written to disk.

    A block that host had to refuse would be computed later, in another piece, and differ.
    """
    for prompt in prompts:
        for engine in (engines.plain, engines.host, engines.disk):
            engine.generate([prompt], WARM_UP_TOKENS)
    moved, wanted = engines.disk.moved_blocks(), sum(map(_num_blocks, prompts))
    if moved["device_to_host"] != wanted or moved["host_to_disk"] < wanted - QUEUED_BLOCKS:
        raise RuntimeError(f"not all {wanted} blocks went to host and disk: {moved}")


def _measure(
    engines: Engines, prompts: list[list[int]], num_rounds: int
) -> tuple[Seconds, Counter[str]]:
    """One unmeasured round, then the others."""
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    differing: Counter[str] = Counter()
    for round_index in range(num_rounds + 1):
        for prompt in prompts:
            answers = {
                RECOMPUTE: engines.plain.generate([prompt], 1),
                HOST_HIT: engines.host.generate([prompt], 1),
                DISK_HIT: _disk_hit(engines.disk, prompt, 1),
                DEVICE_HIT: engines.plain.generate([prompt], 1),
            }
            for kind, answer in answers.items():
                check_source(kind, answer, len(prompt))
                differing[kind] += answer.tokens != answers[RECOMPUTE].tokens
                if round_index:
                    seconds[kind].append(answer.seconds)
            _check_same(answers[HOST_HIT], answers[DISK_HIT])
    return seconds, differing


def _check_longer_answers(engines: Engines, prompts: list[list[int]]) -> None:
    """One token says little: compare more of them, untimed."""
    for prompt in prompts:
        host = engines.host.generate([prompt], CHECKED_TOKENS)
        disk = _disk_hit(engines.disk, prompt, CHECKED_TOKENS)
        check_source(HOST_HIT, host, len(prompt))
        check_source(DISK_HIT, disk, len(prompt))
        _check_same(host, disk)


def _disk_hit(engine: Engine, prompt: list[int], max_tokens: int) -> Answer:
    """Raises where not all of the prompt's blocks came up from disk for it."""
    before = engine.moved_blocks().get("disk_to_host", 0)
    answer = engine.generate([prompt], max_tokens)
    found = engine.moved_blocks().get("disk_to_host", 0) - before
    if found != _num_blocks(prompt):
        raise RuntimeError(f"{found} of {_num_blocks(prompt)} blocks of a prompt came from disk")
    return answer


def _check_same(host_hit: Answer, disk_hit: Answer) -> None:
    if host_hit.tokens != disk_hit.tokens:
        raise RuntimeError(
            f"a disk hit was answered with {disk_hit.tokens}, a host hit with {host_hit.tokens}"
        )


def _num_blocks(prompt: list[int]) -> int:
    return len(prompt) // BLOCK_SIZE


def _ratios(prefix: str, figures: dict[str, Figure]) -> Iterator[Ratio]:
    disk = figures[DISK_HIT]
    recompute = figures[RECOMPUTE]
    yield Ratio(f"{prefix} recompute / disk hit", recompute.best / disk.best)
    yield Ratio(f"{prefix} recompute / disk hit, median", recompute.median / disk.median)
    for kind, aim in ((DEVICE_HIT, AIM), (HOST_HIT, None)):
        name, other = f"{prefix} disk hit / {kind}", figures[kind]
        yield Ratio(name, disk.best / other.best, aim)
        yield Ratio(f"{name}, median", disk.median / other.median)

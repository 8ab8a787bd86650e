"""Bandwidth of block copies between device and host memory, beside a plain memcpy.

The device is memory of this machine, one page a layer and block; block ids on it are shuffled. The
memcpy moves as many bytes between the same two pieces of memory in one contiguous run, with one
thread and with two. "Busy" is the same beside a Python thread that holds the GIL whenever it can.
"""

from __future__ import annotations

import ctypes
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Aim, Figure, Ratio, Result, at_least, rate_figure, text_table
from benchmarks.timing import Timed, busy_thread, interleaved, whole
from kvbm_core.build import cpu_engine
from kvbm_core.config import KvbmConfig
from kvbm_core.host_memory import HostArena
from kvbm_core.layout import KvLayout, Plane
from kvbm_core.transfer.cpu import CpuTransferEngine
from kvbm_core.transfer.pages import BlockCopier, ForeachCopier, NativeCopier, cpu_copier
from kvbm_core.types import Blocks, Tier, TransferOp

NUM_LAYERS = 8
TOTAL_BYTES = 2**27
PAGE_KIB = (16, 64, 256, 2048)
ROUNDS = 15
QUICK_ROUNDS = 3
GB = 1e9
AIM = at_least(0.9)

MEMCPY, MEMCPY_2 = "memcpy", "memcpy, 2 threads"
ENGINE, NATIVE, FOREACH = "engine", "native copier", "foreach copier"
METHODS = (MEMCPY, MEMCPY_2, ENGINE, NATIVE, FOREACH)


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    page_kib: int
    to_host: bool
    is_busy: bool

    def __str__(self) -> str:
        direction = "device→host" if self.to_host else "host→device"
        return f"{self.page_kib} KiB, {direction}, {'busy' if self.is_busy else 'idle'}"


@dataclass(frozen=True)
class Memory:
    """Both sides of the copies at one page size; as many blocks as make up TOTAL_BYTES."""

    layout: KvLayout
    device: torch.Tensor
    host: torch.Tensor
    device_ids: list[int]
    host_ids: list[int]


def run(*, quick: bool, scratch: Path) -> Result:
    """Measure every case; `scratch` is not used."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    settings = {"total_bytes": TOTAL_BYTES, "num_layers": NUM_LAYERS, "rounds": rounds}
    result = Result("copies", settings)
    rows = []
    for case, seconds in _measure(rounds):
        figures = {name: _figure(case, name, taken) for name, taken in seconds.items()}
        ratios = list(_ratios(case, figures))
        result.figures += figures.values()
        result.ratios += ratios
        rows.append(_row(case, figures, ratios))
    columns = [f"{MEMCPY} GB/s", "2 threads", ENGINE, "native", "foreach"]
    columns += ["engine/memcpy", "median", "engine/2 threads", "aim", "met"]
    result.table = text_table(("page, direction", *columns), rows)
    return result


def _measure(rounds: int) -> Iterator[tuple[Case, dict[str, list[float]]]]:
    for page_kib in PAGE_KIB:
        with _memory(page_kib * 1024) as memory, _engine(memory) as engine:
            _check(memory, engine)
            for to_host, is_busy in itertools.product((True, False), (False, True)):
                with _methods(memory, engine, to_host) as methods, busy_thread(is_busy):
                    yield Case(page_kib, to_host, is_busy), interleaved(methods, rounds)


@contextmanager
def _memory(page_bytes: int) -> Iterator[Memory]:
    """A device of twice the blocks that are copied, and a host arena that holds those."""
    num_blocks = TOTAL_BYTES // (page_bytes * NUM_LAYERS)
    num_device_blocks = 2 * num_blocks
    layer_bytes = num_device_blocks * page_bytes
    planes = [Plane(0, layer * layer_bytes, page_bytes, page_bytes) for layer in range(NUM_LAYERS)]
    layout = KvLayout(tuple(planes), num_device_blocks, 16, "uint8")
    device = torch.arange(2 * TOTAL_BYTES // 8).view(torch.uint8)  # no two pages are alike
    device_ids = random.Random(0).sample(range(num_device_blocks), num_blocks)
    arena = HostArena(num_blocks, layout.block_bytes, pinned=False)
    arena.open()
    try:
        yield Memory(layout, device, arena.tensor, device_ids, list(range(num_blocks)))
    finally:
        arena.close()


@contextmanager
def _engine(memory: Memory) -> Iterator[CpuTransferEngine]:
    engine = cpu_engine(KvbmConfig(), memory.layout, [memory.device], memory.host)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _methods(
    memory: Memory, engine: CpuTransferEngine, to_host: bool
) -> Iterator[dict[str, Timed]]:
    """Method → one copy of all blocks by it."""
    addresses = memory.host.data_ptr(), memory.device.data_ptr()
    dst, src = addresses if to_host else reversed(addresses)
    half = TOTAL_BYTES // 2
    with ThreadPoolExecutor(2) as threads:
        methods: dict[str, Callable[[], object]] = {
            MEMCPY: lambda: ctypes.memmove(dst, src, TOTAL_BYTES),
            MEMCPY_2: lambda: list(
                threads.map(lambda at: ctypes.memmove(dst + at, src + at, half), (0, half))
            ),
            ENGINE: lambda: _through_engine(engine, memory, to_host),
        }
        for name, copier in _copiers(memory).items():
            methods[name] = _copy_by(copier, memory, to_host)
        yield {name: whole(copy) for name, copy in methods.items()}


def _copiers(memory: Memory) -> dict[str, BlockCopier]:
    """Both copiers; without the C extension only one."""
    arguments = memory.layout, [memory.device], memory.host
    copiers: dict[str, BlockCopier] = {FOREACH: ForeachCopier(*arguments)}
    if isinstance(native := cpu_copier(*arguments), NativeCopier):
        copiers[NATIVE] = native
    return copiers


def _copy_by(copier: BlockCopier, memory: Memory, to_host: bool) -> Callable[[], None]:
    return lambda: copier.copy(memory.device_ids, memory.host_ids, to_host=to_host)


_op_ids = itertools.count(1)


def _through_engine(engine: CpuTransferEngine, memory: Memory, to_host: bool) -> None:
    device = Blocks.of(Tier.DEVICE, memory.device_ids)
    host = Blocks.of(Tier.HOST, memory.host_ids)
    src, dst = (device, host) if to_host else (host, device)
    op = TransferOp(next(_op_ids), "benchmark", src, dst)
    engine.submit(op)
    engine.wait([op.op_id])
    (result,) = engine.poll()
    if not result.ok:
        raise RuntimeError(f"the engine's copy failed: {result.error}")


def _check(memory: Memory, engine: CpuTransferEngine) -> None:
    """Raise where the engine does not copy what it is timed for."""
    memory.host.zero_()
    _through_engine(engine, memory, to_host=True)
    for host_id, device_id in zip(memory.host_ids, memory.device_ids, strict=True):
        pages = [memory.device[start : start + size] for start, size in _pages(memory, device_id)]
        if not torch.equal(memory.host[host_id], torch.cat(pages)):
            raise RuntimeError(f"block {device_id} did not arrive whole")


def _pages(memory: Memory, device_id: int) -> Iterator[tuple[int, int]]:
    for plane in memory.layout.planes:
        yield plane.offset_bytes + device_id * plane.stride_bytes, plane.page_bytes


def _figure(case: Case, method: str, seconds: list[float]) -> Figure:
    return rate_figure(f"{case}: {method}", "GB/s", TOTAL_BYTES / GB, seconds)


def _ratios(case: Case, figures: dict[str, Figure]) -> Iterator[Ratio]:
    """Each of ours to both memcpys, by best and by median; the engine's to one thread has the
    aim."""
    for ours, limit in itertools.product((ENGINE, NATIVE, FOREACH), (MEMCPY, MEMCPY_2)):
        if ours not in figures:
            continue
        aim: Aim | None = AIM if (ours, limit) == (ENGINE, MEMCPY) else None
        name = f"{case}: {ours}/{limit}"
        yield Ratio(name, figures[ours].best / figures[limit].best, aim)
        yield Ratio(f"{name}, median", figures[ours].median / figures[limit].median)


def _row(case: Case, figures: dict[str, Figure], ratios: list[Ratio]) -> list[str]:
    speeds = [f"{figures[name].best:.2f}" if name in figures else "-" for name in METHODS]
    one, one_median, two = ratios[:3]
    return [
        str(case),
        *speeds,
        f"{one.value:.2f}",
        f"{one_median.value:.2f}",
        f"{two.value:.2f}",
        str(AIM),
        one.verdict,
    ]

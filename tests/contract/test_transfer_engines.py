"""One suite over every transfer engine: what `kvbm_core.transfer.port` promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

from kvbm_core.build import ENGINES
from kvbm_core.config import KvbmConfig
from kvbm_core.layout import KvLayout, Plane
from kvbm_core.transfer.port import TransferEngine
from kvbm_core.types import Blocks, OpResult, Tier, TransferOp

NUM_DEVICE_BLOCKS, NUM_HOST_BLOCKS, PAGE = 6, 8, 4096
LAYERS = 3
LAYOUT = KvLayout(
    tuple(Plane(layer, 0, PAGE, PAGE) for layer in range(LAYERS)), NUM_DEVICE_BLOCKS, 16, "uint8"
)
WAIT_SECONDS = 60


@dataclass
class Bench:
    engine: TransferEngine
    regions: list[torch.Tensor]
    host: torch.Tensor

    def device_block(self, index: int) -> torch.Tensor:
        pages = [region.view(NUM_DEVICE_BLOCKS, PAGE)[index] for region in self.regions]
        return torch.cat(pages).cpu()

    def results(self, count: int) -> list[OpResult]:
        found: list[OpResult] = []
        while len(found) < count:
            self.engine.wait_any(WAIT_SECONDS)
            found += self.engine.poll()
        return found


def bench_of(name: str, device: str, pinned: bool) -> Bench:
    torch.manual_seed(0)
    regions = [
        torch.randint(0, 255, (NUM_DEVICE_BLOCKS * PAGE,), dtype=torch.uint8, device=device)
        for _ in range(LAYERS)
    ]
    host = torch.randint(0, 255, (NUM_HOST_BLOCKS, LAYERS * PAGE), dtype=torch.uint8)
    host = host.pin_memory() if pinned else host
    return Bench(ENGINES[name](KvbmConfig(), LAYOUT, regions, host), regions, host)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    on_gpu = request.param == "cuda"
    bench = bench_of(request.param, request.param, on_gpu)
    yield bench
    bench.engine.close()


def offload(op_id: int, device: list[int], host: list[int]) -> TransferOp:
    return TransferOp(op_id, ("r",), Blocks.of(Tier.DEVICE, device), Blocks.of(Tier.HOST, host))


def onboard(op_id: int, host: list[int], device: list[int]) -> TransferOp:
    return TransferOp(op_id, ("r",), Blocks.of(Tier.HOST, host), Blocks.of(Tier.DEVICE, device))


def test_an_offload_moves_whole_blocks(bench: Bench) -> None:
    bench.engine.submit(offload(1, [4, 0], [2, 7]))
    (result,) = bench.results(1)
    assert (result.op_id, result.ok, result.num_bytes) == (1, True, 2 * LAYOUT.block_bytes)
    assert torch.equal(bench.host[2], bench.device_block(4))
    assert torch.equal(bench.host[7], bench.device_block(0))


def test_an_onboard_moves_whole_blocks_and_no_other(bench: Bench) -> None:
    before = [bench.device_block(i) for i in range(NUM_DEVICE_BLOCKS)]
    bench.engine.submit(onboard(1, [5, 1], [3, 2]))
    assert bench.results(1)[0].ok
    for index, host_block in ((3, 5), (2, 1)):
        before[index] = bench.host[host_block].clone()
    after = [bench.device_block(i) for i in range(NUM_DEVICE_BLOCKS)]
    assert all(map(torch.equal, before, after))


def test_every_op_has_one_result(bench: Bench) -> None:
    for op_id in range(1, 21):
        make: Callable[[int, list[int], list[int]], TransferOp] = offload if op_id % 2 else onboard
        bench.engine.submit(make(op_id, [op_id % NUM_DEVICE_BLOCKS], [op_id % NUM_DEVICE_BLOCKS]))
    assert sorted(result.op_id for result in bench.results(20)) == list(range(1, 21))
    assert bench.engine.poll() == []


def test_waiting_for_an_op_means_it_has_ended(bench: Bench) -> None:
    bench.engine.submit(offload(1, [1], [1]))
    bench.engine.submit(offload(2, [2], [2]))
    bench.engine.wait({1, 2, 99})
    assert {result.op_id for result in bench.engine.poll()} == {1, 2}


def test_an_op_out_of_range_fails_alone(bench: Bench) -> None:
    bench.engine.submit(offload(1, [NUM_DEVICE_BLOCKS], [0]))
    bench.engine.submit(offload(2, [0], [NUM_HOST_BLOCKS]))
    bench.engine.submit(offload(3, [1], [1]))
    results = {result.op_id: result for result in bench.results(3)}
    assert [results[op_id].ok for op_id in (1, 2, 3)] == [False, False, True]
    assert results[1].num_bytes == 0


def test_nothing_in_flight_is_not_waited_for(bench: Bench) -> None:
    bench.engine.wait_any(WAIT_SECONDS)
    bench.engine.wait([1])
    assert bench.engine.poll() == []

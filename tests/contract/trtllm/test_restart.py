"""A disk tier under TensorRT-LLM: what a process left there is back in host in the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.trtllm.kvbm import again, serve
from tests.contract.trtllm.llm_request import Request
from tests.contract.trtllm.test_engine import shared_prompts


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("is_kept", [True, False])
def test_blocks_of_the_process_before_come_back_unasked(
    tmp_path: Path, num_ranks: int, is_kept: bool
) -> None:
    env = {
        "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS": "64",
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
        "DYN_KVBM_DISK_CACHE_PERSIST": str(is_kept),
        "DYN_KVBM_DISK_ENGINE": "threads",
    }
    requests = shared_prompts(6)
    others = [Request(500 + i, (900 + i,) * 9) for i in range(2)]
    # A plan a step: what a wave's last step admits is written in the steps of the next one.
    first = serve([requests, others], env=env, num_ranks=num_ranks)
    assert not first.num_matched_tokens
    later = [Request(510 + i, (950 + i,) * 9) for i in range(2)]
    second = serve([later, again(requests)], env=env, num_ranks=num_ranks)
    assert bool(second.num_matched_tokens) == is_kept

"""A rank's half of the connector: vLLM's worker hooks as calls of the Worker.

Runs in the rank's process, on its thread. Hooks raise on the unexpected: see `guard`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kvbm_connectors.vllm.layout import layout_of
from kvbm_connectors.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm_core.build import build_worker, count_host_blocks, disk_place
from kvbm_core.config import KvbmConfig
from kvbm_core.wire import StepPlan, decode_plan, encode
from kvbm_core.worker import Worker

_NOTHING = StepPlan()


class WorkerSide:
    """One rank's worker; it exists once vLLM has registered its KV cache tensors.

    identity, engine_id: see DiskPlace; needed where there is a disk tier.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        block_size: int,
        num_device_blocks: int,
        rank: int,
        num_ranks: int,
        ranks_per_node: int,
        identity: str = "",
        engine_id: str = "",
    ) -> None:
        self._config = config
        self._block_size = block_size
        self._num_device_blocks = num_device_blocks
        self._rank = rank
        self._num_ranks = num_ranks
        self._ranks_per_node = ranks_per_node
        self._identity = identity
        self._engine_id = engine_id
        self._worker: Worker | None = None
        self.handshake: KvbmHandshake | None = None

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            raise RuntimeError("vLLM has not registered its KV cache tensors yet")
        return self._worker

    def open(self, kv_caches: Mapping[str, torch.Tensor]) -> None:
        """Take vLLM's tensors and open host memory. Raises ConfigError or LayoutMismatch."""
        layout, regions = layout_of(
            kv_caches, num_blocks=self._num_device_blocks, block_size=self._block_size
        )
        num_host_blocks = count_host_blocks(
            self._config,
            block_bytes=layout.block_bytes,
            num_ranks=self._num_ranks,
            ranks_per_node=self._ranks_per_node,
        )
        self._worker = build_worker(
            self._config,
            layout,
            regions,
            rank=self._rank,
            num_host_blocks=num_host_blocks,
            disk=disk_place(
                self._config,
                block_bytes=layout.block_bytes,
                identity=self._identity,
                engine_id=self._engine_id,
                num_ranks=self._num_ranks,
            ),
        )
        store = self._worker.disk
        self.handshake = KvbmHandshake(
            self._rank,
            num_host_blocks,
            self._num_device_blocks,
            layout.block_bytes,
            layout.fingerprint(),
            None if store is None else store.take_inventory(),
        )

    def begin(self, metadata: Any) -> None:
        """Before the forward and before anything writes device blocks."""
        assert isinstance(metadata, KvbmMetadata)
        self.worker.begin(decode_plan(metadata.plan) if metadata.plan else _NOTHING)
        for request_id, device_ids in metadata.failed_loads:
            self.worker.fail_load(request_id, device_ids)

    def worker_metadata(self) -> KvbmWorkerMetadata | None:
        report = self.worker.take_report()
        return None if report is None else KvbmWorkerMetadata((encode(report),))

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

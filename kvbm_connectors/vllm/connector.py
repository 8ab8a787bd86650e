"""The class that vLLM loads: every hook hands over to one of its two halves.

Source of the interface: vllm/distributed/kv_transfer/kv_connector/v1/base.py, vLLM 0.30 to 0.32.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.distributed.parallel_state import get_pp_group, get_tp_group

from kvbm_connectors.vllm import compatibility, translate
from kvbm_connectors.vllm.identity import weights_identity
from kvbm_connectors.vllm.metadata import KvbmHandshake, KvbmWorkerMetadata
from kvbm_connectors.vllm.scheduler_side import SchedulerSide
from kvbm_connectors.vllm.worker_side import WorkerSide
from kvbm_core import logs
from kvbm_core.config import KvbmConfig

if TYPE_CHECKING:
    import torch


class DynamoConnector(KVConnectorBase_V1):
    """Keeps completed KV blocks in host memory and brings them back.

    vLLM makes one with role SCHEDULER and one a rank with role WORKER.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        compatibility.check_version(vllm.__version__, KVConnectorBase_V1)
        compatibility.check_engine(vllm_config, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config = KvbmConfig.load(env=os.environ, options=transfer.kv_connector_extra_config)
        logs.configure(config.log_level)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        if role is KVConnectorRole.SCHEDULER:
            compatibility.warn_about_policy(transfer.kv_load_failure_policy)
            self._scheduler = _scheduler_side(config, vllm_config, kv_cache_config)
        else:
            self._worker = _worker_side(config, vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    @property
    def scheduler_side(self) -> SchedulerSide:
        assert self._scheduler is not None, "a hook of the scheduler was called on a worker"
        return self._scheduler

    @property
    def worker_side(self) -> WorkerSide:
        assert self._worker is not None, "a hook of a worker was called on the scheduler"
        return self._worker

    # Scheduler

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: Mapping[tuple[int, int], KvbmHandshake]
    ) -> None:
        self.scheduler_side.open(list(metadata.values()))

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return self.scheduler_side.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self.scheduler_side.allocated(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self.scheduler_side.build_metadata(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        self.scheduler_side.apply(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        self.scheduler_side.finish(request, block_ids)
        return False, None

    def has_pending_push_work(self) -> bool:
        return self.scheduler_side.has_work()

    def reset_cache(self) -> bool:
        return self.scheduler_side.reset()

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        self.worker_side.open(kv_caches)

    def get_handshake_metadata(self) -> KvbmHandshake | None:
        return self.worker_side.handshake

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        self.worker_side.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        self.worker_side.worker.submit_onboards()

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: loads end before their request is scheduled."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing: whole blocks are offloaded after the forward."""

    def wait_for_save(self) -> None:
        self.worker_side.worker.submit_offloads()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        worker = self.worker_side.worker
        worker.poll()
        return set(), worker.take_received()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self.worker_side.worker.take_load_errors()

    def build_connector_worker_meta(self) -> KvbmWorkerMetadata | None:
        return self.worker_side.worker_metadata()

    # Both

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._worker is not None:
            self._worker.close()


def _scheduler_side(config: KvbmConfig, vllm_config: Any, kv_cache_config: Any) -> SchedulerSide:
    block_size = _block_size(kv_cache_config)
    hash_block_size = getattr(kv_cache_config, "hash_block_size", None) or block_size
    return SchedulerSide(
        config,
        block_size=block_size,
        num_ranks=vllm_config.parallel_config.world_size,
        namespace=translate.namespace_of(
            vllm_config, block_size, weights_identity(vllm_config) if config.has_disk else ""
        ),
        engine_keys=translate.uses_engine_keys(
            config.block_keys,
            vllm_config.cache_config.prefix_caching_hash_algo,
            is_a_hash_a_block=hash_block_size == block_size,
            has_disk=config.has_disk,
        ),
        prefix_caching=bool(vllm_config.cache_config.enable_prefix_caching),
    )


def _worker_side(config: KvbmConfig, vllm_config: Any, kv_cache_config: Any) -> WorkerSide:
    parallel = vllm_config.parallel_config
    tensor, pipeline = get_tp_group(), get_pp_group()
    engines_per_node = max(1, parallel.data_parallel_size_local)
    block_size = _block_size(kv_cache_config)
    identity = ""
    if config.has_disk:
        namespace = translate.namespace_of(vllm_config, block_size, weights_identity(vllm_config))
        identity = f"{namespace.model}; keys {namespace.fingerprint()}"
    return WorkerSide(
        config,
        block_size=block_size,
        num_device_blocks=kv_cache_config.num_blocks,
        rank=pipeline.rank_in_group * tensor.world_size + tensor.rank_in_group,
        num_ranks=parallel.world_size,
        ranks_per_node=parallel.local_world_size * engines_per_node,
        identity=identity,
        engine_id=str(vllm_config.kv_transfer_config.engine_id),
    )


def _block_size(kv_cache_config: Any) -> int:
    return int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)

"""The two classes that TensorRT-LLM loads: every hook hands over to its half.

Source of the interface: `tensorrt_llm/_torch/pyexecutor/kv_cache_connector.py`, 1.1 to 1.3. The
engine makes both in threads, before it has a pool; rank 0 has both, the others a worker.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any

import tensorrt_llm
import torch
from tensorrt_llm._utils import mpi_broadcast, mpi_rank

from kvbm_connectors.trtllm import compatibility, translate
from kvbm_connectors.trtllm.interface import KvCacheConnectorScheduler, KvCacheConnectorWorker
from kvbm_connectors.trtllm.leader_side import LeaderSide
from kvbm_connectors.trtllm.metadata import Meeting, StepMetadata
from kvbm_connectors.trtllm.worker_side import WorkerSide
from kvbm_core import logs
from kvbm_core.channel.rendezvous import DirectRendezvous
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import ConfigError, KvbmError
from kvbm_core.hashing import CacheNamespace
from kvbm_core.kvbm_leader import KvbmLeader

# What the leader of this process has to say to the worker beside it, which got the same arguments.
_meetings: dict[int, Meeting] = {}


class DynamoKVBMConnectorLeader(KvCacheConnectorScheduler):
    """Decides on rank 0 which blocks are kept in host memory, and which come back."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        config = _configure(llm_args)
        self._side: LeaderSide | None = None
        try:
            self._side, meeting = _open_leader(config, llm_args)
        except (KvbmError, OSError) as error:
            # Every rank must hear of it, not only this one: see `register_kv_caches`.
            meeting = Meeting(problem=f"rank 0 has no leader: {error}")
        _meetings[id(llm_args)] = meeting
        atexit.register(self.shutdown)

    @property
    def leader_side(self) -> LeaderSide:
        assert self._side is not None, "a leader that could not be opened serves no request"
        return self._side

    def wait_for_initialization(self) -> None:
        self.leader_side.wait()

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return self.leader_side.match(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        self.leader_side.allocated(request, block_ids)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        return self.leader_side.build_metadata(scheduler_output)

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        self.leader_side.finish(request)
        return False

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        _meetings.pop(id(self._llm_args), None)
        if self._side is not None:
            self._side.close()


class DynamoKVBMConnectorWorker(KvCacheConnectorWorker):
    """Copies a rank's blocks between its KV pool and host memory."""

    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        config, parallel = _configure(llm_args), llm_args.parallel_config
        self._num_ranks = int(parallel.world_size)
        self.worker_side = WorkerSide(
            config,
            block_size=int(llm_args.kv_cache_config.tokens_per_block),
            rank=int(mpi_rank()),
            num_ranks=self._num_ranks,
            ranks_per_node=min(self._num_ranks, _gpus_per_node(llm_args)),
            loads_async=_loads_async(config, llm_args),
            waits_for_offloads=compatibility.reuses_parts_of_blocks(llm_args),
        )
        atexit.register(self.shutdown)

    def register_forward_pass_callable(self) -> Callable[[], None]:
        """The end of each forward, replayed graphs included, which call no layer hooks."""
        return self.worker_side.submit_offloads

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        meeting = _meetings.get(id(self._llm_args))
        if self._num_ranks > 1:
            meeting = mpi_broadcast(meeting, root=0)
        if meeting is None:
            meeting = Meeting(problem="rank 0 has no connector_scheduler_class of this module")
        self.worker_side.open(kv_cache_tensor, meeting)

    def bind_connector_meta(self, metadata: object) -> None:
        super().bind_connector_meta(metadata)
        self.worker_side.begin(metadata)

    def start_load_kv(self, stream: Any) -> None:
        self.worker_side.start_loads(stream)

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        """Nothing: loads end before the forward that needs them."""

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        """Nothing: whole blocks are offloaded after the forward."""

    def wait_for_save(self, stream: Any) -> None:
        self.worker_side.end_forward(stream)

    def get_finished(
        self, finished_gen_req_ids: Sequence[int], started_loading_req_ids: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        return self.worker_side.finished(finished_gen_req_ids, started_loading_req_ids)

    def shutdown(self) -> None:
        atexit.unregister(self.shutdown)
        self.worker_side.close()


def _configure(llm_args: Any) -> KvbmConfig:
    """On every rank alike: what is wrong is wrong on all of them."""
    config = KvbmConfig.load(env=os.environ, options={})
    logs.configure(config.log_level)
    compatibility.check_version(tensorrt_llm.__version__)
    compatibility.check_engine(llm_args)
    is_spread = llm_args.parallel_config.world_size > _gpus_per_node(llm_args)
    if is_spread and config.leader_zmq_host is None and not os.environ.get("ETCD_ENDPOINTS"):
        raise ConfigError(
            "leader_zmq_host",
            None,
            "the ranks are on several machines and can't reach a leader on this one only",
            "Set DYN_KVBM_LEADER_ZMQ_HOST to rank 0's address, or ETCD_ENDPOINTS.",
        )
    return config


def _loads_async(config: KvbmConfig, llm_args: Any) -> bool:
    """An engine that copies parts of blocks by itself may copy into a block that a request gave up
    while it was loaded: no fence comes before that, so no load may outlive its step."""
    if compatibility.reuses_parts_of_blocks(llm_args):
        return False
    return config.trtllm_load_mode == "async"


def _gpus_per_node(llm_args: Any) -> int:
    return int(getattr(llm_args, "gpus_per_node", None) or llm_args.parallel_config.world_size)


def _open_leader(config: KvbmConfig, llm_args: Any) -> tuple[LeaderSide, Meeting]:
    parallel = llm_args.parallel_config
    namespace = _namespace(config, llm_args)
    identity = f"{namespace.model}; keys {namespace.fingerprint()}"
    needs_network = config.leader_zmq_host is not None
    needs_network |= parallel.world_size > _gpus_per_node(llm_args)
    kvbm = KvbmLeader(
        config,
        num_ranks=int(parallel.world_size),
        block_size=namespace.block_size,
        identity=identity,
        rendezvous=None if needs_network else DirectRendezvous(),
        # Fences alone protect blocks: from 1.2 on, not every end of a request is told.
        engine_holds_blocks=False,
        engine_shares_blocks=False,
        engine_can_wait=False,
    )
    kvbm.open()
    if compatibility.reuses_parts_of_blocks(llm_args):
        compatibility.warn_about_partial_reuse()
    side = LeaderSide(
        kvbm,
        namespace,
        loads_async=_loads_async(config, llm_args),
        is_chunked=bool(getattr(llm_args, "enable_chunked_prefill", False)),
    )
    return side, Meeting(kvbm.address.encode(), identity)


def _namespace(config: KvbmConfig, llm_args: Any) -> CacheNamespace:
    weights = ""
    if config.has_disk:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        weights = translate.weights_identity(llm_args, device)
    return translate.namespace_of(llm_args, tensorrt_llm.__version__, weights)

"""The scheduler's half of the connector: vLLM's hooks as calls of the Leader.

Runs in the scheduler's process, on its thread. Invariant: no hook raises and none waits.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvbm_connectors.vllm import translate
from kvbm_connectors.vllm.guard import guarded
from kvbm_connectors.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm_core.build import build_leader
from kvbm_core.config import BYTES_PER_GB, KvbmConfig
from kvbm_core.errors import LayoutMismatch
from kvbm_core.hashing import CacheNamespace
from kvbm_core.leader import Leader
from kvbm_core.types import BlockHash, BlockId
from kvbm_core.wire import decode_report, encode

logger = logging.getLogger("kvbm_connectors.vllm")

_EMPTY = KvbmMetadata()


class SchedulerSide:
    """One engine's leader behind vLLM's scheduler hooks.

    block_size: tokens. engine_keys: use vLLM's own block hashes as keys. The leader exists once
    the workers have said how much memory they have.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        block_size: int,
        num_ranks: int,
        namespace: CacheNamespace,
        engine_keys: bool,
    ) -> None:
        self.failed_hooks: Counter[str] = Counter()
        self._config = config
        self._block_size = block_size
        self._num_ranks = num_ranks
        self._namespace = namespace
        self._engine_keys = engine_keys
        self._leader: Leader | None = None
        self._stranded: list[tuple[str, tuple[BlockId, ...]]] = []

    @property
    def leader(self) -> Leader:
        if self._leader is None:
            raise RuntimeError("the workers have not announced their host memory yet")
        return self._leader

    def open(self, handshakes: Sequence[KvbmHandshake]) -> None:
        """Build the leader from what every rank announced. Raises LayoutMismatch."""
        ranks = sorted(handshake.rank for handshake in handshakes)
        shapes = {(h.num_device_blocks, h.fingerprint) for h in handshakes}
        if ranks != list(range(self._num_ranks)) or len({blocks for blocks, _ in shapes}) > 1:
            raise LayoutMismatch(
                f"{self._num_ranks} ranks are expected, {ranks} announced themselves with "
                f"device blocks and layouts {sorted(shapes)}"
            )
        num_host_blocks = min(handshake.num_host_blocks for handshake in handshakes)
        self._leader = build_leader(
            self._config,
            num_host_blocks=num_host_blocks,
            block_size=self._block_size,
            num_ranks=self._num_ranks,
        )
        self._announce(handshakes, num_host_blocks)

    @guarded(lambda *_: (0, False))
    def match(self, request: Any, num_device_tokens: int) -> tuple[int | None, bool]:
        if request.skip_reading_prefix_cache:
            self._slot_of(request)
            return 0, False
        self._slot_of(request)
        num_tokens = self.leader.match(request.request_id, num_device_tokens)
        return num_tokens, bool(num_tokens)

    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        device_ids = blocks.get_block_ids()[0]
        self._allocated(request, device_ids, num_external_tokens)

    def _strand(self, request: Any, device_ids: Sequence[BlockId], num_external: int) -> None:
        """vLLM now waits for a load that will not start: have the workers fail it."""
        if num_external:
            self._stranded.append((request.request_id, tuple(device_ids)))

    @guarded(_strand)
    def _allocated(self, request: Any, device_ids: Sequence[BlockId], num_external: int) -> None:
        self._slot_of(request)
        self.leader.allocated(request.request_id, num_external, device_ids)

    @guarded(lambda side, _: KvbmMetadata(failed_loads=side.take_stranded()))
    def build_metadata(self, output: Any) -> KvbmMetadata:
        leader = self.leader
        state = output.kv_connector_block_state
        plan = leader.plan_step(
            translate.progress_of(output),
            lambda request_id: state.get_block_ids(request_id)[0],
            reissued=translate.reissued_by(output, self._block_size)
            if leader.num_ops_in_flight
            else (),
            idle=not output.total_num_scheduled_tokens,
        )
        if not plan and not self._stranded:
            return _EMPTY
        return KvbmMetadata(encode(plan) if plan else b"", self.take_stranded())

    def take_stranded(self) -> tuple[tuple[str, tuple[BlockId, ...]], ...]:
        stranded, self._stranded = tuple(self._stranded), []
        return stranded

    @guarded(lambda *_: None)
    def apply(self, worker_metadata: Any) -> None:
        if isinstance(worker_metadata, KvbmWorkerMetadata):
            for payload in worker_metadata.reports:
                self.leader.apply(decode_report(payload))

    @guarded(lambda *_: False)
    def finish(self, request: Any, device_ids: Sequence[BlockId]) -> bool:
        """Whether vLLM must keep the request's device blocks until it is reported drained."""
        return self.leader.finish(request.request_id, request.num_computed_tokens, device_ids)

    @guarded(lambda *_: False)
    def has_work(self) -> bool:
        return bool(self._stranded) or (self._leader is not None and self._leader.has_work())

    @guarded(lambda *_: False)
    def reset(self) -> bool:
        self.leader.reset()
        return True

    def close(self) -> None:
        """Log the summary."""
        if self._leader is not None:
            self._leader.counters.num_hook_errors = sum(self.failed_hooks.values())
            logger.info("kvbm summary: %s", self._leader.counters.summary())
            self._leader = None

    def _slot_of(self, request: Any) -> None:
        if not self.leader.has_slot(request.request_id):
            self.leader.create_slot(
                request.request_id, self._keys_of(request), request.num_prompt_tokens
            )

    def _keys_of(self, request: Any) -> Sequence[BlockHash]:
        if self._engine_keys:
            keys: Sequence[BlockHash] = request.block_hashes
            return keys
        return translate.chain_of(request, self._namespace)

    def _announce(self, handshakes: Sequence[KvbmHandshake], num_host_blocks: int) -> None:
        block_bytes = sum(handshake.block_bytes for handshake in handshakes)
        num_device_blocks = handshakes[0].num_device_blocks
        logger.info(
            "kvbm: host tier of %d blocks of %d tokens, %.2f GB over %d rank(s), device cache "
            "%d blocks; layout %s, namespace %s, keys %s, eviction %s",
            num_host_blocks,
            self._block_size,
            num_host_blocks * block_bytes / BYTES_PER_GB,
            self._num_ranks,
            num_device_blocks,
            handshakes[0].fingerprint,
            self._namespace.fingerprint(),
            "engine" if self._engine_keys else "chain",
            self._config.eviction_policy,
        )
        if num_host_blocks < num_device_blocks:
            logger.warning(
                "the host tier (%d blocks) is smaller than the device cache (%d blocks): what the "
                "device evicts has mostly left host by then, so offloads cost bandwidth and bring "
                "few hits. Give at least DYN_KVBM_CPU_CACHE_GB=%.1f.",
                num_host_blocks,
                num_device_blocks,
                num_device_blocks * block_bytes / BYTES_PER_GB + 0.05,
            )
        for setting in self._config.ignored:
            logger.warning("%s has no effect in this release", setting)

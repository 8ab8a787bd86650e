"""The scheduler's half of the connector: vLLM's hooks as calls of the Leader.

Runs in the scheduler's process, on its thread. Invariant: no hook raises and none waits; once a
hook that changes the leader has raised, the leader's books can't be trusted and the cache is off
until restart: requests are served without it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvbm_connectors.guard import guarded
from kvbm_connectors.summary import SummaryLog
from kvbm_connectors.vllm import translate
from kvbm_connectors.vllm.identity import Adapters
from kvbm_connectors.vllm.metadata import KvbmHandshake, KvbmMetadata, KvbmWorkerMetadata
from kvbm_core.announce import announce
from kvbm_core.build import build_leader
from kvbm_core.config import KvbmConfig
from kvbm_core.errors import LayoutMismatch
from kvbm_core.hashing import CacheNamespace
from kvbm_core.leader import Leader
from kvbm_core.types import BlockHash, BlockId
from kvbm_core.wire import decode_report, encode

logger = logging.getLogger("kvbm_connectors.vllm")

_EMPTY = KvbmMetadata()


class SchedulerSide:
    """One engine's leader behind vLLM's scheduler hooks.

    block_size: tokens. engine_keys: use vLLM's own block hashes as keys. prefix_caching: of vLLM
    itself. The leader exists once the workers have said how much memory they have.
    """

    def __init__(
        self,
        config: KvbmConfig,
        *,
        block_size: int,
        num_ranks: int,
        namespace: CacheNamespace,
        engine_keys: bool,
        prefix_caching: bool = True,
    ) -> None:
        self.failed_hooks: Counter[str] = Counter()
        self._config = config
        self._block_size = block_size
        self._num_ranks = num_ranks
        self._namespace = namespace
        self._adapters = Adapters()
        self._engine_keys = engine_keys
        self._prefix_caching = prefix_caching
        self._num_matched_device_tokens = 0
        self._leader: Leader | None = None
        self._stranded: list[tuple[str, tuple[BlockId, ...]]] = []
        self._is_off = False
        self._summary: SummaryLog | None = None

    @property
    def is_off(self) -> bool:
        """Whether an unexpected exception has switched the cache off."""
        return self._is_off

    @property
    def leader(self) -> Leader:
        if self._leader is None:
            raise RuntimeError("the workers have not announced their host memory yet")
        return self._leader

    def open(self, handshakes: Sequence[KvbmHandshake]) -> None:
        """Build the leader from what every rank announced. Raises LayoutMismatch."""
        foreign = [type(h).__name__ for h in handshakes if not isinstance(h, KvbmHandshake)]
        if foreign:
            raise LayoutMismatch(
                f"the workers announced themselves with {', '.join(foreign)}: another connector's "
                "handshake was passed on to this one. Make DynamoConnector the first child."
            )
        ranks = sorted(handshake.rank for handshake in handshakes)
        shapes = {(h.num_device_blocks, h.fingerprint) for h in handshakes}
        if ranks != list(range(self._num_ranks)) or len({blocks for blocks, _ in shapes}) > 1:
            raise LayoutMismatch(
                f"{self._num_ranks} ranks are expected, {ranks} announced themselves with "
                f"device blocks and layouts {sorted(shapes)}"
            )
        without_disk = [h.rank for h in handshakes if (h.disk is None) == self._config.has_disk]
        if without_disk:
            raise LayoutMismatch(
                f"ranks {without_disk} and the scheduler do not agree on whether there is a disk "
                "tier: set the same DYN_KVBM_DISK_* for all processes, on every node"
            )
        num_host_blocks = min(handshake.num_host_blocks for handshake in handshakes)
        self._leader = build_leader(
            self._config,
            num_host_blocks=num_host_blocks,
            block_size=self._block_size,
            block_bytes=max(handshake.block_bytes for handshake in handshakes),
            num_ranks=self._num_ranks,
            inventories=[h.disk for h in handshakes if h.disk is not None],
            # Holding them would make reset_prefix_cache fail after an offline generate, whose
            # engine takes no further step, and leave KV of old weights on the device.
            engine_holds_blocks=False,
            engine_shares_blocks=self._prefix_caching,
        )
        keys = "engine" if self._engine_keys else "chain"
        announce(
            self._leader,
            self._config,
            handshakes,
            block_size=self._block_size,
            keys=f"namespace {self._namespace.fingerprint()}, keys {keys}",
        )
        self._summary = SummaryLog(logger, self._leader.counters)

    def _ignore(self, request: Any, _: int) -> tuple[int, bool]:
        """A request whose keys can't be computed costs only itself."""
        if self._leader is not None and self._leader.has_slot(request.request_id):
            self._leader.ignore(request.request_id)
        return 0, False

    @guarded(_ignore)
    def match(self, request: Any, num_device_tokens: int) -> tuple[int | None, bool]:
        if self._is_off:
            return 0, False
        if not self.leader.has_slot(request.request_id):
            self._create_slot(request)
        self._num_matched_device_tokens = num_device_tokens
        may_read = not request.skip_reading_prefix_cache
        num_tokens = self.leader.match(request.request_id, num_device_tokens, may_read=may_read)
        return num_tokens, bool(num_tokens)

    def _strand(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM now waits for a load that will not start: have the workers fail it."""
        self._switch_off()
        if num_external_tokens:
            # vLLM allocates right after it matched; blocks before these are shared with others.
            start = self._num_matched_device_tokens // self._block_size
            device_ids = tuple(blocks.get_block_ids()[0][start:])
            self._stranded.append((request.request_id, device_ids))

    @guarded(_strand)
    def allocated(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if not self._is_off and self.leader.has_slot(request.request_id):
            device_ids = blocks.get_block_ids()[0]
            self.leader.allocated(request.request_id, num_external_tokens, device_ids)

    def _metadata_without_plan(self, _: Any) -> KvbmMetadata:
        self._switch_off()
        return KvbmMetadata(failed_loads=self._take_stranded())

    @guarded(_metadata_without_plan)
    def build_metadata(self, output: Any) -> KvbmMetadata:
        if self._leader is None:
            return _EMPTY
        self._note_progress(output)
        if self._summary is not None:
            self._summary.write_if_due(self.failed_hooks.total())
        is_idle = not output.total_num_scheduled_tokens
        plan = self.leader.take_plan(idle=is_idle, now_seconds=time.monotonic())
        if not plan and not self._stranded:
            return _EMPTY
        return KvbmMetadata(encode(plan) if plan else b"", self._take_stranded())

    def _take_stranded(self) -> tuple[tuple[str, tuple[BlockId, ...]], ...]:
        """Each is reported once: vLLM forgets the request with its report."""
        stranded, self._stranded = tuple(self._stranded), []
        return stranded

    def _switch_off(self, *_: Any) -> None:
        if not self._is_off:
            self._is_off = True
            if self._leader is not None and self._leader.cascade is not None:
                self._leader.cascade.retire()
            logger.error("the KV cache tiers are off until restart; serving goes on without them")

    @guarded(_switch_off)
    def _note_progress(self, output: Any) -> None:
        if self._is_off:
            return
        leader, state = self.leader, output.kv_connector_block_state
        # Which blocks are written for the first time matters only while ops are in flight.
        is_busy = leader.num_ops_in_flight
        leader.note_progress(
            translate.progress_of(output),
            lambda request_id: state.get_block_ids(request_id)[0],
            translate.reissued_by(output, self._block_size) if is_busy else (),
        )

    @guarded(_switch_off)
    def apply(self, worker_metadata: Any) -> None:
        if isinstance(worker_metadata, KvbmWorkerMetadata):
            for payload in worker_metadata.reports:
                self.leader.apply(decode_report(payload))

    @guarded(_switch_off)
    def finish(self, request: Any, device_ids: Sequence[BlockId]) -> None:
        """vLLM frees the request's device blocks now; what offloads still read is fenced."""
        if not self._is_off:
            self.leader.finish(request.request_id, request.num_computed_tokens, device_ids)

    def has_work(self) -> bool:
        if self._is_off or self._leader is None:
            return bool(self._stranded)
        return self._leader.has_work()

    def _reset_without_leader(self) -> bool:
        self._switch_off()
        return False

    @guarded(_reset_without_leader)
    def reset(self) -> bool:
        """Forget all blocks; False where that failed."""
        self.leader.reset()
        return True

    def close(self) -> None:
        """Log the summary; nothing may be asked of the leader any more."""
        if self._summary is not None:
            self._summary.write(self.failed_hooks.total())
        self._leader, self._summary = None, None

    def _create_slot(self, request: Any) -> None:
        keys = self._keys_of(request)
        self.leader.create_slot(
            request.request_id, keys, request.num_prompt_tokens, translate.priorities_of(request)
        )

    def _keys_of(self, request: Any) -> Sequence[BlockHash]:
        if self._engine_keys:
            keys: Sequence[BlockHash] = request.block_hashes
            return keys
        return translate.chain_of(request, self._namespace, self._adapters)

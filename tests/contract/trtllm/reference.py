"""A small connector that conforms: full blocks in files, loaded and saved in step or behind.

It shows that the harness can be satisfied, and the mutants are made from it. Configured by the
environment: REFERENCE_STORE is a folder; REFERENCE_LOAD and REFERENCE_SAVE are "sync" or "async".
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorrt_llm._utils import mpi_rank, mpi_world_size

try:
    from tensorrt_llm._torch.pyexecutor.connectors.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )
except ImportError:
    from tensorrt_llm._torch.pyexecutor.kv_cache_connector import (
        KvCacheConnectorScheduler,
        KvCacheConnectorWorker,
    )


@dataclass(frozen=True)
class Copy:
    request_id: int
    key: str
    block_id: int


@dataclass
class Metadata:
    """handed_out: block ids whose old contents are about to be overwritten."""

    loads: list[Copy] = field(default_factory=list)
    saves: list[Copy] = field(default_factory=list)
    handed_out: list[int] = field(default_factory=list)


class Store:
    """A file per key and rank; a file is there when it is complete."""

    def __init__(self) -> None:
        self._folder = Path(os.environ["REFERENCE_STORE"])

    def holds(self, key: str, num_ranks: int) -> bool:
        return all((self._folder / f"{key}.{rank}").exists() for rank in range(num_ranks))

    def read(self, key: str, rank: int) -> bytes:
        return (self._folder / f"{key}.{rank}").read_bytes()

    def write(self, key: str, rank: int, data: bytes) -> None:
        part = self._folder / f"{key}.{rank}.part"
        part.write_bytes(data)
        part.replace(self._folder / f"{key}.{rank}")


@dataclass
class Slot:
    """What the leader knows of a request; its tokens and blocks grow by the deltas it is told."""

    root: bytes
    prompt: list[int]
    num_local: int
    num_matched: int = 0
    tokens: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_saved: int = 0


class Leader(KvCacheConnectorScheduler):
    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self._size = llm_args.kv_cache_config.tokens_per_block
        self._num_ranks = mpi_world_size()
        self._store = Store()
        self._loads_async = os.environ.get("REFERENCE_LOAD") == "async"
        self._saves_async = os.environ.get("REFERENCE_SAVE") == "async"
        self._slots: dict[int, Slot] = {}
        self._metadata = Metadata()

    def keys(self, root: bytes, tokens: Sequence[int]) -> list[str]:
        keys, parent = [], root
        for end in range(self._size, len(tokens) + 1, self._size):
            block = np.asarray(tokens[end - self._size : end], dtype=np.int64).tobytes()
            parent = hashlib.blake2b(parent + block, digest_size=16).digest()
            keys.append(parent.hex())
        return keys

    def root_of(self, request: Any) -> bytes:
        salt = getattr(request, "cache_salt", None) or getattr(request, "cache_salt_id", None)
        return repr((salt, request.lora_task_id, request.multimodal_hashes)).encode()

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        slot = Slot(self.root_of(request), request.get_tokens(0), num_computed_tokens)
        self._slots[request.request_id] = slot
        slot.num_saved = num_computed_tokens // self._size
        if num_computed_tokens % self._size:
            return 0, False
        slot.num_matched = self.count_matched(slot)
        slot.num_saved += slot.num_matched // self._size
        return slot.num_matched, self._loads_async and slot.num_matched > 0

    def count_matched(self, slot: Slot) -> int:
        first, last = slot.num_local // self._size, (len(slot.prompt) - 1) // self._size
        keys = self.keys(slot.root, slot.prompt)[first:last]
        found = (i for i, key in enumerate(keys) if not self._store.holds(key, self._num_ranks))
        return next(found, len(keys)) * self._size

    def update_state_after_alloc(self, request: Any, block_ids: list[int]) -> None:
        slot = self._slots[request.request_id]
        first = slot.num_local // self._size
        self._metadata.handed_out += block_ids[first:]
        self._metadata.loads += self.loads_of(request.request_id, slot, block_ids)

    def loads_of(self, request_id: int, slot: Slot, block_ids: Sequence[int]) -> list[Copy]:
        keys = self.keys(slot.root, slot.prompt)
        first = slot.num_local // self._size
        blocks = range(first, first + slot.num_matched // self._size)
        return [Copy(request_id, keys[i], block_ids[i]) for i in blocks]

    def build_connector_meta(self, scheduler_output: Any) -> Metadata:
        metadata, self._metadata = self._metadata, Metadata()
        for data in scheduler_output.new_requests:
            matched = 0 if self._loads_async else self._slots[data.request_id].num_matched
            metadata.saves += self._progress(data, data.computed_position + matched)
        for data in scheduler_output.cached_requests:
            metadata.handed_out += data.new_block_ids
            metadata.saves += self._progress(data, data.computed_position)
        return metadata

    def _progress(self, data: Any, position: int) -> list[Copy]:
        slot = self._slots[data.request_id]
        slot.tokens += data.new_tokens
        slot.block_ids += data.new_block_ids
        return self.saves_of(data, slot, self.valid_end(data, position))

    def valid_end(self, data: Any, position: int) -> int:
        """Tokens whose KV is there after this forward; before 1.2.0rc2, before this forward."""
        return position + getattr(data, "num_scheduled_tokens", 0)

    def saves_of(self, data: Any, slot: Slot, end: int) -> list[Copy]:
        keys = self.keys(slot.root, slot.tokens)
        blocks = range(slot.num_saved, min(end // self._size, len(keys)))
        slot.num_saved = max(slot.num_saved, blocks.stop)
        return [Copy(data.request_id, keys[i], slot.block_ids[i]) for i in blocks]

    def request_finished(self, request: Any, cache_block_ids: list[int]) -> bool:
        return self._saves_async and self._slots.pop(request.request_id).num_saved > 0


class Worker(KvCacheConnectorWorker):
    def __init__(self, llm_args: Any) -> None:
        super().__init__(llm_args)
        self.rank = mpi_rank()
        self._store = Store()
        self._threads = ThreadPoolExecutor(1)
        self._loads_async = os.environ.get("REFERENCE_LOAD") == "async"
        self._saves_async = os.environ.get("REFERENCE_SAVE") == "async"
        self._pool: torch.Tensor | None = None
        self._loads: dict[int, list[Future[None]]] = defaultdict(list)
        self._saves: dict[int, list[Future[None]]] = defaultdict(list)
        self._on_block: dict[int, Future[None]] = {}
        self._loading: set[int] = set()
        self._saving: set[int] = set()
        self.num_forwards = 0

    def register_forward_pass_callable(self) -> Callable[[], None]:
        return self._count_forward

    def _count_forward(self) -> None:
        self.num_forwards += 1

    def register_kv_caches(self, kv_cache_tensor: torch.Tensor) -> None:
        self._pool = kv_cache_tensor.view(torch.uint8)

    def settle(self) -> None:
        """Return when everything that was submitted is done."""
        self._threads.submit(int).result()

    def close(self) -> None:
        self._threads.shutdown()

    def load(self, copy: Copy) -> None:
        assert self._pool is not None
        data = bytearray(self._store.read(copy.key, self.rank))
        block = self._pool[copy.block_id]
        block.copy_(torch.frombuffer(data, dtype=torch.uint8).view(block.shape))

    def save(self, copy: Copy) -> None:
        assert self._pool is not None
        self._store.write(copy.key, self.rank, self._pool[copy.block_id].numpy().tobytes())

    def start_load_kv(self, stream: Any) -> None:
        self.fence(self._metadata.handed_out)
        for copy in self._metadata.loads:
            if self._loads_async:
                self._submit(self._loads, self.load, copy)
            else:
                self.load(copy)

    def fence(self, block_ids: Iterable[int]) -> None:
        """Wait for what still uses blocks that are somebody else's now."""
        for block_id in block_ids:
            if block_id in self._on_block:
                self._on_block.pop(block_id).result()

    def _submit(
        self, futures: dict[int, list[Future[None]]], act: Callable[[Copy], None], copy: Copy
    ) -> None:
        future = self._threads.submit(act, copy)
        futures[copy.request_id].append(future)
        self._on_block[copy.block_id] = future

    def wait_for_layer_load(self, layer_idx: int, stream: Any) -> None:
        pass

    def save_kv_layer(self, layer_idx: int, stream: Any) -> None:
        pass

    def wait_for_save(self, stream: Any) -> None:
        for copy in self._metadata.saves:
            if self._saves_async:
                self._submit(self._saves, self.save, copy)
            else:
                self.save(copy)

    def get_finished(
        self, finished_gen_req_ids: list[int], started_loading_req_ids: list[int]
    ) -> tuple[list[int], list[int]]:
        self._saving.update(finished_gen_req_ids)
        self._loading.update(started_loading_req_ids)
        return self.take_done(self._saving, self._saves), self.take_done(self._loading, self._loads)

    def take_done(self, waiting: set[int], futures: dict[int, list[Future[None]]]) -> list[int]:
        done = [i for i in waiting if all(future.done() for future in futures[i])]
        for request_id in done:
            waiting.remove(request_id)
            for future in futures.pop(request_id):
                future.result()
        return done

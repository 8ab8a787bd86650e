"""What travels in vLLM's own metadata: the plan down to the workers, reports back up."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from kvbm_core.wire import DiskInventory


@dataclass
class KvbmMetadata(KVConnectorMetadata):
    """One step's plan, encoded; empty where there is nothing to do.

    failed_loads: loads that vLLM expects and the leader could not start: request → device blocks.
    """

    plan: bytes = b""
    failed_loads: tuple[tuple[str, tuple[int, ...]], ...] = ()


@dataclass
class KvbmWorkerMetadata(KVConnectorWorkerMetadata):
    """Encoded reports, one a rank that has something to report."""

    reports: tuple[bytes, ...]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KvbmWorkerMetadata:
        assert isinstance(other, KvbmWorkerMetadata)
        return KvbmWorkerMetadata(self.reports + other.reports)


@dataclass
class KvbmHandshake(KVConnectorHandshakeMetadata):
    """One rank's geometry, sent once when its memory is open; bytes are of that rank."""

    rank: int
    num_host_blocks: int
    num_device_blocks: int
    block_bytes: int
    fingerprint: str
    disk: DiskInventory | None = None

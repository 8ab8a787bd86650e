"""Which way of finding the leader a configuration asks for.

ZMQ host given ─▶ that host   etcd endpoints given ─▶ etcd   neither ─▶ by hand, on this machine
"""

from __future__ import annotations

from collections.abc import Mapping

from kvbm_core.channel.rendezvous import (
    DEFAULT_BEAT_PORT,
    DEFAULT_PORT,
    DirectRendezvous,
    FixedRendezvous,
    Rendezvous,
)
from kvbm_core.config import KvbmConfig
from kvbm_core.registry.settings import EtcdSettings


def rendezvous_for(config: KvbmConfig, identity: str, env: Mapping[str, str]) -> Rendezvous:
    """The rendezvous of one engine; `identity` as for KvbmLeader. Raises ConfigError."""
    beat_port, port = config.leader_zmq_pub_port, config.leader_zmq_ack_port
    if config.leader_zmq_host is None:
        settings = EtcdSettings.load(env)
        if settings is None:
            return DirectRendezvous()
        from kvbm_core.registry.etcd import EtcdRendezvous  # an optional library

        return EtcdRendezvous(
            settings, config.cluster_name, identity, beat_port=beat_port or 0, port=port or 0
        )
    return FixedRendezvous(
        config.leader_zmq_host,
        identity,
        DEFAULT_BEAT_PORT if beat_port is None else beat_port,
        DEFAULT_PORT if port is None else port,
    )

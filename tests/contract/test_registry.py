"""Leader and workers find each other through a real etcd, and do without it from then on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from kvbm_core import KvbmConfig
from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.errors import ChannelError, ConfigError
from kvbm_core.registry import etcd
from kvbm_core.registry.etcd import EtcdRendezvous
from kvbm_core.registry.etcd_client import EtcdClient, Unreachable
from kvbm_core.registry.settings import EtcdSettings
from tests.contract.etcd_server import EtcdServer, free_port, make_certificates, require
from tests.contract.ranks import (
    IDENTITY,
    NUM_TOKENS,
    PATIENT,
    Rank,
    leader_of,
    run_request,
    until,
)

ROOT = Path(__file__).parents[2]
LEASE_SECONDS = 2  # etcd grants no less
ADDRESS = LeaderAddress("5e55", "tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
OTHER = LeaderAddress("0123", "tcp://127.0.0.1:3", "tcp://127.0.0.1:4")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    server = EtcdServer(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """Closes leaders, workers and registrations after the test."""
    ends: list[Any] = []

    def keep(end: Any) -> Any:
        ends.append(end.kvbm if isinstance(end, Rank) else end)
        return end

    yield keep
    for end in reversed(ends):
        end.withdraw() if isinstance(end, EtcdRendezvous) else end.close()


@pytest.fixture
def found_by_etcd(server: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> EtcdServer:
    """The environment names this etcd."""
    monkeypatch.setenv("ETCD_ENDPOINTS", server.endpoint)
    monkeypatch.setenv("ETCD_LEASE_TTL", str(LEASE_SECONDS))
    return server


def rendezvous(endpoint: str, cluster: str = "default", **settings: Any) -> EtcdRendezvous:
    settings = {"lease_seconds": LEASE_SECONDS, **settings}
    return EtcdRendezvous(EtcdSettings((endpoint,), **settings), cluster, IDENTITY)


def serve(closing: Callable[[Any], Any]) -> tuple[Any, Any]:
    """A leader and its worker, as the environment says."""
    leader = closing(leader_of(1, timing=PATIENT))
    leader.open()
    rank = closing(Rank(0, 1, timing=PATIENT)).open()
    leader.wait(30)
    return leader, rank


def test_a_worker_finds_its_leader(
    found_by_etcd: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    leader, rank = serve(closing)
    assert leader.address.endpoint.startswith("tcp://127.0.0.1:")
    assert [run_request(leader, [rank]), run_request(leader, [rank])] == [0, NUM_TOKENS]


def test_serving_goes_on_without_etcd_and_the_leader_registers_again(
    found_by_etcd: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    leader, rank = serve(closing)
    key = rendezvous(found_by_etcd.endpoint).key
    assert run_request(leader, [rank]) == 0
    found_by_etcd.forget()
    assert run_request(leader, [rank]) == NUM_TOKENS
    found_by_etcd.start()
    until(lambda: found_by_etcd.get(key) == leader.address.encode())
    found_by_etcd.kill()
    found_by_etcd.start()
    until(lambda: found_by_etcd.get(key) == leader.address.encode())
    assert run_request(leader, [rank]) == NUM_TOKENS


def test_a_leader_may_come_before_its_etcd(
    found_by_etcd: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    found_by_etcd.kill()
    leader = closing(leader_of(1, timing=PATIENT))
    leader.open()
    found_by_etcd.start()
    closing(Rank(0, 1, timing=PATIENT)).open()
    leader.wait(30)


def test_a_registration_outlives_its_lease_by_being_renewed_and_ends_at_once(
    server: EtcdServer,
) -> None:
    own = rendezvous(server.endpoint)
    own.announce(ADDRESS)
    later_seconds = time.monotonic() + 2.5 * LEASE_SECONDS
    while time.monotonic() < later_seconds:
        assert server.get(own.key) == ADDRESS.encode()
        time.sleep(0.1)
    own.withdraw()
    assert server.get(own.key) is None


def test_a_registration_that_nobody_renews_ends(
    server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted fault: the test above would notice; and a leader that died is forgotten."""
    monkeypatch.setattr(etcd._Registration, "start", lambda _: None)
    own = rendezvous(server.endpoint)
    own.announce(ADDRESS)
    until(lambda: server.get(own.key) is None)


def test_leaders_of_several_clusters_are_never_mixed(
    server: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    clusters = [rendezvous(server.endpoint, name) for name in ("a", "b")]
    leaders = [closing(leader_of(1, timing=PATIENT, rendezvous=own)) for own in clusters]
    for leader in leaders:
        leader.open()
    found = [rendezvous(server.endpoint, name).find(30) for name in ("b", "a")]
    assert found == [leaders[1].address, leaders[0].address]


def test_another_model_is_another_key() -> None:
    settings = EtcdSettings(("http://127.0.0.1:1",))
    assert len({EtcdRendezvous(settings, "c", name).key for name in ("a model", "b model")}) == 2


def test_a_second_leader_of_a_cluster_is_told_what_to_do(
    server: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    closing(rendezvous(server.endpoint)).announce(ADDRESS)
    with pytest.raises(ChannelError, match=r"127\.0\.0\.1:2.*DYN_KVBM_CLUSTER_NAME"):
        rendezvous(server.endpoint).announce(OTHER)


def test_a_leader_takes_the_place_of_one_that_died(
    server: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    client = EtcdClient(EtcdSettings((server.endpoint,)))
    own = closing(rendezvous(server.endpoint))
    assert client.create(own.key, OTHER.encode(), client.grant(LEASE_SECONDS))
    own.announce(ADDRESS)
    assert server.get(own.key) == ADDRESS.encode()
    client.close()


def test_the_address_of_a_dead_leader_is_not_taken(
    server: EtcdServer, closing: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "BEAT_SECONDS", 0.2)
    closing(rendezvous(server.endpoint)).announce(ADDRESS)
    with pytest.raises(ChannelError, match="does not speak"):
        rendezvous(server.endpoint).find(0.5)
    # Planted fault: whoever does not listen for its beat takes it.
    monkeypatch.setattr(etcd, "await_beat", lambda *_: True)
    assert rendezvous(server.endpoint).find(0.5) == ADDRESS


def test_the_next_endpoint_is_tried(server: EtcdServer) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    client = EtcdClient(EtcdSettings((dead, server.endpoint)))
    assert client.get("/kvbm/x") is None
    with pytest.raises(Unreachable, match="ETCD_ENDPOINTS"):
        EtcdClient(EtcdSettings((dead,))).get("/kvbm/x")
    client.close()


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b"\xff"])
def test_what_is_no_etcd_counts_as_out_of_reach(answer: bytes) -> None:
    """A proxy, or another service: no reason to stop a leader, nor the thread that registers it."""

    class Other(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{other.server_port}"
        client = EtcdClient(EtcdSettings((endpoint,)))
        with pytest.raises(Unreachable, match=endpoint):
            client.grant(10)
        client.close()
        own = rendezvous(endpoint)
        own.announce(ADDRESS)
        own.withdraw()
        other.shutdown()


def test_without_a_leader_the_deadline_says_what_to_check(server: EtcdServer) -> None:
    with pytest.raises(ChannelError, match=r"nobody is registered.*DYN_KVBM_CLUSTER_NAME"):
        rendezvous(server.endpoint).find(0.2)


def test_a_registration_that_can_not_be_read_is_said_so(server: EtcdServer) -> None:
    client = EtcdClient(EtcdSettings((server.endpoint,)))
    client.put(rendezvous(server.endpoint).key, "nonsense", 0)
    with pytest.raises(ChannelError, match="no leader's address"):
        rendezvous(server.endpoint).find(0.2)
    client.close()


# Logins


@pytest.mark.parametrize("login", [("kvbm", "wrong"), ("nobody", "right"), ("", "")])
def test_a_wrong_login_is_named_on_both_sides(server: EtcdServer, login: tuple[str, str]) -> None:
    server.enable_logins("kvbm", "right")
    own = rendezvous(server.endpoint, username=login[0], password=login[1])
    for refused in (lambda: own.announce(ADDRESS), lambda: own.find(5)):
        with pytest.raises(ConfigError, match="ETCD_AUTH_PASSWORD") as caught:
            refused()
        assert "wrong" not in str(caught.value)


def test_a_user_without_the_permission_is_told(server: EtcdServer) -> None:
    server.enable_logins("kvbm", "right")
    with pytest.raises(ConfigError, match=r"permission denied.*/kvbm/"):
        EtcdClient(EtcdSettings((server.endpoint,), "kvbm", "right")).get("/other")


def test_with_the_right_login_it_is_found_also_after_etcd_has_forgotten_the_token(
    server: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    server.enable_logins("kvbm", "right")
    login = {"username": "kvbm", "password": "right"}
    own = closing(rendezvous(server.endpoint, **login))
    own.announce(ADDRESS)
    client = EtcdClient(EtcdSettings((server.endpoint,), **login))
    assert client.get(own.key) == ADDRESS.encode()
    server.kill()
    server.start()
    until(lambda: client.get(own.key) == ADDRESS.encode())
    client.close()


def test_a_login_where_none_is_asked_for_is_named(server: EtcdServer) -> None:
    with pytest.raises(ConfigError, match="authentication is not enabled"):
        EtcdClient(EtcdSettings((server.endpoint,), "kvbm", "right")).get("/kvbm/x")


# TLS


@pytest.fixture
def tls(tmp_path: Path) -> Iterator[tuple[EtcdServer, dict[str, str]]]:
    """An etcd that asks for a client's certificate, and the settings that satisfy it."""
    files = make_certificates(tmp_path)
    options = [
        f"--cert-file={files['server.pem']}",
        f"--key-file={files['server.key']}",
        f"--trusted-ca-file={files['ca.pem']}",
        "--client-cert-auth",
    ]
    server = EtcdServer(tmp_path, scheme="https", options=options)
    settings = {
        "ca": str(files["ca.pem"]),
        "client_cert": str(files["client.pem"]),
        "client_key": str(files["client.key"]),
    }
    server.start(is_checked=False)
    yield server, settings
    server.kill()


def test_with_its_certificates_etcd_is_reached(tls: tuple[EtcdServer, dict[str, str]]) -> None:
    server, settings = tls
    texts = {name: Path(path).read_text() for name, path in settings.items()}
    for given in (settings, texts):
        client = EtcdClient(EtcdSettings((server.endpoint,), **given))
        until(lambda client=client: _answers(client))
        client.close()


def test_without_them_it_is_not(tls: tuple[EtcdServer, dict[str, str]]) -> None:
    server, settings = tls
    client = EtcdClient(EtcdSettings((server.endpoint,), **settings))
    until(lambda: _answers(client))
    client.close()
    for given in ({}, {"ca": settings["ca"]}):
        with pytest.raises(Unreachable, match="ETCD_AUTH_CA"):
            EtcdClient(EtcdSettings((server.endpoint,), **given)).get("/kvbm/x")
    with pytest.raises(ConfigError, match=r"ETCD_AUTH_CA.*no file"):
        EtcdClient(EtcdSettings((server.endpoint,), ca="/nowhere.pem")).get("/kvbm/x")


def _answers(client: EtcdClient) -> bool:
    try:
        client.get("/kvbm/x")
    except Unreachable:
        return False
    return True


# Two machines, as far as the kernel can make them from one

SPACES = ("kvbm-test-a", "kvbm-test-b")
HOSTS = ("10.77.61.1", "10.77.61.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def spaces() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one cable between them."""
    require("ip", "iproute2")
    try:
        for space in SPACES:
            _ip("netns", "add", space)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    _ip("link", "add", "kvbm-a", "netns", SPACES[0], "type", "veth", "peer", "name", "kvbm-b",
        "netns", SPACES[1])  # fmt: skip
    for space, link, host in zip(SPACES, ("kvbm-a", "kvbm-b"), HOSTS, strict=True):
        _ip("-n", space, "address", "add", f"{host}/24", "dev", link)
        _ip("-n", space, "link", "set", link, "up")
        _ip("-n", space, "link", "set", "lo", "up")
    yield SPACES
    for space in SPACES:
        _ip("netns", "delete", space)


def test_leader_and_worker_on_two_machines_find_each_other(
    spaces: tuple[str, str], tmp_path: Path
) -> None:
    inside = [["ip", "netns", "exec", space] for space in spaces]
    server = EtcdServer(tmp_path, host=HOSTS[0], prefix=inside[0])
    server.start(is_checked=False)
    env = {**os.environ, "ETCD_ENDPOINTS": server.endpoint}
    module = [sys.executable, "-m", "tests.contract.ranks"]
    worker = subprocess.Popen([*inside[1], *module, "0", "1", ""], cwd=ROOT, env=env)
    try:
        done = subprocess.run(
            [*inside[0], *module, "leader", "1"],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    finally:
        worker.kill()
        worker.wait()
        server.kill()
    assert done.stdout.startswith(f"tcp://{HOSTS[0]}:"), done.stderr
    assert done.stdout.endswith(f"[0, {NUM_TOKENS}]")


def test_a_host_in_the_configuration_goes_before_etcd(
    found_by_etcd: EtcdServer, closing: Callable[[Any], Any]
) -> None:
    config = KvbmConfig(
        cpu_cache_override_num_blocks=4,
        leader_zmq_host="127.0.0.1",
        leader_zmq_pub_port=0,
        leader_zmq_ack_port=0,
    )
    leader = closing(leader_of(1, config=config))
    leader.open()
    assert found_by_etcd.get(rendezvous(found_by_etcd.endpoint).key) is None

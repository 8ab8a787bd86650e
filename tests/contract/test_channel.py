"""Leader and workers over real sockets and processes: joining, refusing, dying, coming back."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from kvbm_core import KvbmConfig, KvbmLeader, KvbmWorker, kvbm_worker
from kvbm_core.channel.leader_end import LeaderEnd
from kvbm_core.channel.leader_protocol import Joined, LeaderProtocol, Lost, Reported, Terms
from kvbm_core.channel.messages import Hello, LeaderAddress
from kvbm_core.channel.rendezvous import DirectRendezvous
from kvbm_core.channel.timing import Timing
from kvbm_core.channel.worker_end import WorkerEnd
from kvbm_core.channel.worker_protocol import LeaderSeen, Outside, Welcomed
from kvbm_core.errors import ChannelError, ConfigError
from kvbm_core.types import OpResult
from kvbm_core.wire import GENERATION_BYTES, Handshake, WorkerReport, encode
from tests.contract.ranks import (
    BLOCK_BYTES,
    CONFIG,
    IDENTITY,
    KEYS,
    NUM_BLOCKS,
    NUM_TOKENS,
    PATIENT,
    QUICK,
    Rank,
    finish_request,
    leader_of,
    run_request,
    start_request,
    until,
)

ROOT = Path(__file__).parents[2]
Opened = Callable[[Any], Any]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens a leader or worker, and closes it after the test."""
    ends: list[Any] = []

    def open_it(end: Any) -> Any:
        end.open()
        ends.append(end.kvbm if isinstance(end, Rank) else end)
        return end

    yield open_it
    for end in reversed(ends):
        end.close()


@pytest.fixture
def processes() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a rank's process, and kills it after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(rank: int, num_ranks: int, leader: KvbmLeader) -> subprocess.Popen[bytes]:
        arguments = [str(rank), str(num_ranks), leader.address.encode()]
        command = [sys.executable, "-m", "tests.contract.ranks", *arguments]
        started.append(subprocess.Popen(command, cwd=ROOT))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Joining


def test_blocks_go_to_host_and_come_back_on_every_rank(opened: Opened) -> None:
    leader = opened(leader_of(2, timing=PATIENT))
    ranks = [opened(Rank(r, 2, address=leader.address, timing=PATIENT)) for r in range(2)]
    leader.wait(30)
    assert run_request(leader, ranks) == 0
    before = [rank.memory.clone() for rank in ranks]
    for rank in ranks:
        rank.memory.zero_()
    assert run_request(leader, ranks) == NUM_TOKENS
    assert all(bool((a == r.memory).all()) for a, r in zip(before, ranks, strict=True))


def test_leader_and_worker_may_share_a_thread(opened: Opened) -> None:
    leader = opened(leader_of(1))
    worker = opened(Rank(0, 1, address=leader.address)).kvbm
    worker.wait_welcome(30)
    assert not leader.is_ready
    leader.poll()
    assert leader.is_ready


def test_the_rank_with_the_least_memory_decides(opened: Opened) -> None:
    leader = opened(leader_of(2))
    for rank, count in enumerate((16, 5)):
        config = KvbmConfig(cpu_cache_override_num_blocks=count)
        opened(Rank(rank, 2, config=config, address=leader.address))
    leader.wait(30)
    assert leader.leader.pool.num_blocks == 5


def test_a_worker_that_comes_before_its_leader_waits_for_it(opened: Opened) -> None:
    ports = {"leader_zmq_pub_port": free_port(), "leader_zmq_ack_port": free_port()}
    config = KvbmConfig(cpu_cache_override_num_blocks=4, leader_zmq_host="127.0.0.1", **ports)
    rank = Rank(0, 1, config=config)
    thread = threading.Thread(target=rank.open)
    thread.start()
    leader = opened(leader_of(1, config=config))
    leader.wait(30)
    thread.join()
    rank.kvbm.close()


def test_with_a_host_the_worker_learns_the_session_from_the_beat(opened: Opened) -> None:
    ports = {"leader_zmq_pub_port": free_port(), "leader_zmq_ack_port": 0}
    config = KvbmConfig(cpu_cache_override_num_blocks=4, leader_zmq_host="localhost", **ports)
    leader = opened(leader_of(1, config=config))
    opened(Rank(0, 1, config=config))
    leader.wait(30)
    assert leader.address.endpoint.startswith("tcp://localhost:")


@pytest.mark.parametrize("host", ["a-name.invalid", "0.0.0.0"])
def test_a_name_with_two_addresses_is_the_same_place_for_both_sides(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """As ``localhost`` is in most /etc/hosts; a leader at 0.0.0.0 has no IPv6 address."""
    families = {socket.AF_INET6: "::1", socket.AF_INET: "127.0.0.1"}

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(family, 1, 6, "", (place, 0)) for family, place in families.items()]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "gethostname", lambda: "a-name.invalid")
    ports = {"leader_zmq_pub_port": free_port(), "leader_zmq_ack_port": 0}
    config = KvbmConfig(cpu_cache_override_num_blocks=4, leader_zmq_host=host, **ports)
    leader = opened(leader_of(2, config=config))
    opened(Rank(0, 2, config=config))
    opened(Rank(1, 2, config=config, address=leader.address))
    leader.wait(10)


def test_two_leaders_on_one_machine_have_places_that_nobody_else_may_enter(
    opened: Opened,
) -> None:
    leaders = [opened(leader_of(1)) for _ in range(2)]
    places = [Path(leader.address.endpoint.removeprefix("ipc://")).parent for leader in leaders]
    assert places[0] != places[1]
    assert [stat.S_IMODE(place.stat().st_mode) for place in places] == [0o700, 0o700]
    leaders[0].close()
    assert [place.exists() for place in places] == [False, True]


def config_with_disk(directory: Path) -> KvbmConfig:
    return KvbmConfig(
        cpu_cache_override_num_blocks=4,
        disk_cache_override_num_blocks=4,
        disk_cache_dir=str(directory),
        disk_zerofill_fallback=True,
        disk_disable_o_direct=True,
        disk_engine="threads",
    )


def test_of_more_blocks_on_disk_than_a_message_holds_the_newest_come_back(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with_disk(tmp_path)
    leader = opened(leader_of(1, config=config))
    before = Rank(0, 1, config=config, address=leader.address).open().kvbm
    assert before.worker.disk is not None
    index = before.worker.disk.index
    index.begin_anew(b"g" * GENERATION_BYTES, persists=True)
    index.put([2, 0, 1], KEYS[:3], [0, 0, 0])
    before.close()
    monkeypatch.setattr(kvbm_worker, "MAX_INVENTORY_BLOCKS", 2)
    leader = opened(leader_of(1, config=config))
    opened(Rank(0, 1, config=config, address=leader.address))
    leader.wait(30)
    assert leader.leader.cascade is not None
    assert leader.leader.cascade.disk.ready_keys() == KEYS[1:3]


def test_the_ranks_of_one_engine_share_its_disk_set(opened: Opened, tmp_path: Path) -> None:
    config = config_with_disk(tmp_path)
    leader = opened(leader_of(2, config=config))
    for rank in range(2):
        opened(Rank(rank, 2, config=config, address=leader.address))
    leader.wait(30)
    assert leader.leader.cascade is not None
    assert {path.name.split("-r")[0] for path in tmp_path.glob("*.data")} == {
        "dynamo-kvbm-disk-cache-0"
    }
    assert (tmp_path / "dynamo-kvbm-disk-cache-0.lock").read_text() == leader.address.session


def test_what_is_wrong_with_the_leader_is_said_as_often_as_it_is_asked_for(opened: Opened) -> None:
    config = KvbmConfig(cpu_cache_override_num_blocks=4, eviction_policy="none such")
    leader = opened(leader_of(1, config=config))
    opened(Rank(0, 1, config=config, address=leader.address))
    for _ in range(2):
        with pytest.raises(ConfigError, match="eviction_policy"):
            leader.wait(30)
    assert not leader.is_ready


# Refusing


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"identity": "b model"}, "'b model'"),
        ({"num_ranks": 3}, "rank 0 of 3"),
        ({"rank": 7, "num_ranks": 8}, "rank 7 of 8"),
    ],
)
def test_a_worker_of_another_engine_is_refused_with_the_reason(
    opened: Opened, options: dict[str, Any], why: str
) -> None:
    leader = opened(leader_of(1))
    rank = opened(Rank(**{"rank": 0, "num_ranks": 1, "address": leader.address, **options}))
    with pytest.raises(ChannelError, match=why):
        rank.kvbm.wait_welcome(30)
    with pytest.raises(ChannelError, match=r"ranks \[0\] of 1 .*" + why):
        leader.wait(0.2)


def test_the_identity_is_what_refuses_it(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted fault: a leader that looks at nothing takes the blocks of any model."""
    monkeypatch.setattr(LeaderProtocol, "_objection", lambda *_: "")
    leader = opened(leader_of(1))
    opened(Rank(0, 1, address=leader.address, identity="b model")).kvbm.wait_welcome(30)


def test_a_rank_of_another_geometry_is_refused(opened: Opened) -> None:
    leader = opened(leader_of(2))
    opened(Rank(0, 2, address=leader.address)).kvbm.wait_welcome(30)
    other = Rank(1, 2, address=leader.address).open(num_device_blocks=NUM_BLOCKS - 1)
    with pytest.raises(ChannelError, match="geometry"):
        other.kvbm.wait_welcome(30)
    other.kvbm.close()


def test_a_second_worker_of_a_living_rank_is_refused(opened: Opened) -> None:
    leader = opened(leader_of(1))
    opened(Rank(0, 1, address=leader.address)).kvbm.wait_welcome(30)
    second = opened(Rank(0, 1, address=leader.address)).kvbm
    with pytest.raises(ChannelError, match="another worker, which is alive"):
        second.wait_welcome(30)
    leader.poll()
    assert leader.missing_ranks == []


def test_a_fixed_port_of_another_engine_is_named(opened: Opened) -> None:
    ports = {"leader_zmq_pub_port": free_port(), "leader_zmq_ack_port": 0}
    config = KvbmConfig(cpu_cache_override_num_blocks=4, leader_zmq_host="127.0.0.1", **ports)
    opened(leader_of(1, config=config, identity="b model"))
    with pytest.raises(ChannelError, match=r"serves 'b model'.*_PUB_PORT"):
        Rank(0, 1, config=config).open()


@pytest.mark.parametrize("option", ["leader_zmq_pub_port", "leader_zmq_ack_port"])
def test_a_port_that_is_taken_is_named_with_the_remedy(option: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = {"leader_zmq_pub_port": 0, "leader_zmq_ack_port": 0}
        ports[option] = other.getsockname()[1]
        config = KvbmConfig(leader_zmq_host="127.0.0.1", **ports)
        with pytest.raises(ConfigError, match=f"{option}=.*DYN_KVBM_{option.upper()}"):
            leader_of(1, config=config).open()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_a_host_that_is_not_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        leader_of(1, config=KvbmConfig(leader_zmq_host=host, leader_zmq_pub_port=0)).open()


def test_the_deadline_names_who_is_missing(opened: Opened) -> None:
    leader = opened(leader_of(3))
    opened(Rank(1, 3, address=leader.address)).kvbm.wait_welcome(30)
    with pytest.raises(ChannelError, match=r"ranks \[0, 2\] of 3 .*INIT_TIMEOUT_SECS"):
        leader.wait(0.2)


def test_a_worker_without_a_leader_says_so(opened: Opened, tmp_path: Path) -> None:
    nobody = LeaderAddress("5e55", f"ipc://{tmp_path}/a", f"ipc://{tmp_path}/b")
    with pytest.raises(ChannelError, match="never heard"):
        opened(Rank(0, 1, address=nobody)).kvbm.wait_welcome(0.2)
    with pytest.raises(ChannelError, match="ETCD_ENDPOINTS"):
        Rank(0, 1, rendezvous=DirectRendezvous()).open()
    config = KvbmConfig(
        leader_zmq_host="127.0.0.1",
        leader_zmq_pub_port=free_port(),
        leader_worker_init_timeout_secs=0.2,
    )
    with pytest.raises(ChannelError, match="no leader speaks at tcp"):
        Rank(0, 1, config=config).open()


@pytest.mark.parametrize("place", ["", "tcp://", "tcp://h:x", "tcp://127.0.0.1", "udp://h:1"])
def test_an_address_that_is_none_is_named(place: str) -> None:
    with pytest.raises(ChannelError, match="no place of a leader"):
        Rank(0, 1, address=LeaderAddress("5e55", place, place)).open()


# Dying, and coming back


def test_a_killed_rank_is_lost_and_its_successor_begins_with_empty_tiers(
    opened: Opened, processes: Callable[..., subprocess.Popen[bytes]]
) -> None:
    leader = opened(leader_of(2))
    rank = opened(Rank(0, 2, address=leader.address))
    victim = processes(1, 2, leader)
    leader.wait(60)
    assert [run_request(leader, [rank]), run_request(leader, [rank])] == [0, NUM_TOKENS]
    victim.kill()
    until(lambda: leader.lost_ranks == {1}, leader)
    name, found = start_request(leader)
    assert (found, leader.leader.has_work()) == (0, False)
    finish_request(leader, name)
    processes(1, 2, leader)
    until(lambda: not leader.lost_ranks, leader)
    assert [run_request(leader, [rank]), run_request(leader, [rank])] == [0, NUM_TOKENS]


def test_an_op_that_a_killed_rank_owes_ends(
    opened: Opened, processes: Callable[..., subprocess.Popen[bytes]]
) -> None:
    leader = opened(leader_of(2))
    rank = opened(Rank(0, 2, address=leader.address))
    victim = processes(1, 2, leader)
    leader.wait(60)
    victim.kill()
    name, _ = start_request(leader)
    assert leader.leader.num_ops_in_flight == 1

    def is_over() -> bool:
        rank.serve()
        return leader.leader.num_ops_in_flight == 0

    until(is_over, leader)
    assert leader.lost_ranks == {1}
    finish_request(leader, name)
    assert leader.leader.pool.ready_keys() == []


def test_a_rank_that_was_only_stopped_comes_back_by_itself(
    opened: Opened, processes: Callable[..., subprocess.Popen[bytes]]
) -> None:
    leader = opened(leader_of(2))
    rank = opened(Rank(0, 2, address=leader.address))
    sleeper = processes(1, 2, leader)
    leader.wait(60)
    run_request(leader, [rank])
    os.kill(sleeper.pid, signal.SIGSTOP)
    until(lambda: leader.lost_ranks == {1}, leader)
    os.kill(sleeper.pid, signal.SIGCONT)
    until(lambda: not leader.lost_ranks, leader)
    assert [run_request(leader, [rank]), run_request(leader, [rank])] == [0, NUM_TOKENS]


def test_a_rank_that_closes_is_lost_at_once(opened: Opened) -> None:
    leader = opened(leader_of(1, timing=PATIENT))
    rank = Rank(0, 1, address=leader.address, timing=PATIENT).open()
    leader.wait(30)
    rank.kvbm.close()
    began_seconds = time.monotonic()
    until(lambda: leader.lost_ranks == {0}, leader)
    assert time.monotonic() - began_seconds < PATIENT.timeout_seconds


def test_a_rank_that_is_lost_before_all_are_there_is_waited_for_again(opened: Opened) -> None:
    leader = opened(leader_of(2))
    first = Rank(0, 2, address=leader.address).open()
    first.kvbm.wait_welcome(30)
    first.kvbm.close()
    until(lambda: leader.missing_ranks == [0, 1], leader)
    for rank in range(2):
        opened(Rank(rank, 2, address=leader.address))
    leader.wait(30)


def test_a_worker_notices_that_its_leader_is_gone_and_goes_on(opened: Opened) -> None:
    leader = opened(leader_of(1))
    rank = opened(Rank(0, 1, address=leader.address))
    leader.wait(30)
    until(lambda: rank.kvbm.is_leader_alive, rank.kvbm)
    start_request(leader)
    leader.close()
    until(lambda: not rank.kvbm.is_leader_alive, rank.kvbm)
    rank.serve()


def test_a_busy_main_thread_does_not_look_dead(opened: Opened) -> None:
    leader = opened(leader_of(1))
    rank = opened(Rank(0, 1, address=leader.address))
    leader.wait(30)
    deadline_seconds = time.monotonic() + 2 * QUICK.timeout_seconds
    while time.monotonic() < deadline_seconds:
        sum(range(1000))
    leader.poll()
    rank.kvbm.poll()
    assert (leader.missing_ranks, rank.kvbm.is_leader_alive) == ([], True)


# Noise, and links that break


def test_noise_is_counted_and_stops_nothing(opened: Opened) -> None:
    terms = Terms("5e55", IDENTITY, 1, 4, False)
    leader = opened(LeaderEnd(terms, timing=QUICK, host="127.0.0.1"))
    context: zmq.Context[Any] = zmq.Context()
    noise = context.socket(zmq.DEALER)
    noise.connect(leader.address.endpoint)
    for frames in ([b""], [b"kvbm"], [b"GET /", b"HTTP/1.1"], [b"kvbm\x01\xff"], [bytes(10**6)]):
        noise.send_multipart(frames)
    with socket.create_connection(("127.0.0.1", int(leader.address.endpoint.split(":")[2]))) as raw:
        raw.sendall(b"\x00" * 1000)
    worker = opened(WorkerEnd(leader.address, timing=QUICK))
    worker.join(hello_of(0))
    wait_for(worker, Welcomed)
    deadline_seconds = time.monotonic() + 30
    while leader.num_malformed < 5 and time.monotonic() < deadline_seconds:
        time.sleep(0.01)
    assert (leader.num_malformed, leader.failure) == (5, None)
    context.destroy(linger=0)


def test_a_worker_of_another_release_is_told(opened: Opened) -> None:
    leader = opened(LeaderEnd(Terms("5e55", IDENTITY, 1, 4, False), timing=QUICK))
    context: zmq.Context[Any] = zmq.Context()
    other = context.socket(zmq.DEALER)
    other.connect(leader.address.endpoint)
    other.send(b"kvbm\x63whatever")
    assert other.poll(30_000)
    assert b"wire version 99" in other.recv()
    context.destroy(linger=0)


def hello_of(rank: int, incarnation: str = "i") -> Hello:
    handshake = Handshake(rank, 8, 8, 4, BLOCK_BYTES, "f")
    return Hello("5e55", IDENTITY, incarnation, 1, handshake)


def wait_for(end: Any, kind: type) -> list[Any]:
    """All events up to the first of a kind."""
    events: list[Any] = []
    deadline_seconds = time.monotonic() + 30
    while not any(isinstance(event, kind) for event in events):
        assert time.monotonic() < deadline_seconds, events
        end.wait(0.1)
        events += end.take_events()
    return events


class Cutter:
    """Forwards TCP to a port, and cuts all connections on command."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        connections, self._connections = self._connections, []
        for connection in connections:
            with_reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_reset)
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other side was quicker
            connection.close()

    def close(self) -> None:
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._connections += [near, far]
            for pair in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65_536):
            sink.sendall(data)
    except OSError:
        pass


def test_reports_survive_a_link_that_breaks_again_and_again(opened: Opened) -> None:
    terms = Terms("5e55", IDENTITY, 1, 4, False)
    timing = Timing(beat_seconds=0.05, timeout_seconds=20.0, resend_seconds=0.1)
    leader = opened(LeaderEnd(terms, timing=timing, host="127.0.0.1"))
    cutter = Cutter(int(leader.address.endpoint.split(":")[2]))
    address = LeaderAddress("5e55", leader.address.beat_endpoint, f"tcp://127.0.0.1:{cutter.port}")
    worker = opened(WorkerEnd(address, timing=timing))
    worker.join(hello_of(0))
    wait_for(worker, Welcomed)
    wait_for(leader, Joined)
    applied: list[int] = []
    for number in range(1, 301):
        worker.send("i", encode(WorkerReport(0, (OpResult(number, 0, 0.0),))))
        if number % 50 == 0:
            cutter.cut()
    deadline_seconds = time.monotonic() + 60
    while len(applied) < 300 and time.monotonic() < deadline_seconds:
        leader.wait(0.1)
        for event in leader.take_events():
            assert not isinstance(event, Lost), event
            if isinstance(event, Reported):
                applied += [result.op_id for result in event.report.results]
    assert applied == list(range(1, 301))
    assert not [e for e in worker.take_events() if isinstance(e, Outside | LeaderSeen)]
    cutter.close()


def test_calls_of_a_user_never_wait_for_a_leader_that_is_not_there(
    opened: Opened, tmp_path: Path
) -> None:
    nobody = LeaderAddress("5e55", f"ipc://{tmp_path}/a", f"ipc://{tmp_path}/b")
    worker = opened(WorkerEnd(nobody, timing=QUICK))
    worker.join(hello_of(0))
    for _ in range(5000):
        worker.send("i", b"report")
    assert worker.take_events() == []


def test_both_are_public_names() -> None:
    assert (KvbmLeader.__name__, KvbmWorker.__name__) == ("KvbmLeader", "KvbmWorker")
    assert CONFIG.leader_worker_init_timeout_secs == 1800


def test_the_example_runs() -> None:
    command = [sys.executable, "-m", "examples.two_ranks"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all bytes are back") == 2

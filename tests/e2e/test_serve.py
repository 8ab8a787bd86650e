"""`vllm serve` as a user types it: found by name alone, bad settings refused, clean shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engine import BLOCK_SIZE
from tests.e2e.scenarios import prompt

START_SECONDS = 180
TRANSFER_CONFIG = {"kv_connector": "DynamoConnector", "kv_role": "kv_both"}
LENGTH = 12 * BLOCK_SIZE


class Server:
    """One `vllm serve`; its output goes to a file."""

    def __init__(self, model: Path, log: Path, environment: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        vllm = Path(sys.executable).with_name("vllm")
        assert vllm.exists(), "the environment has no `vllm` command: run make setup"
        command = (
            f"{vllm} serve {model} --served-model-name tiny --host 127.0.0.1 --port {self.port}"
        )
        options = (
            "--enforce-eager --block-size 32 --num-gpu-blocks-override 40 --max-model-len 1024"
            # By default vLLM kills its engine as soon as it is told to stop.
            " --shutdown-timeout 30"
        )
        transfer = ["--kv-transfer-config", json.dumps(TRANSFER_CONFIG)]
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command.split(), *options.split(), *transfer],
                env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
                | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/health")
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.5)
                continue
            return
        raise AssertionError(f"the server did not start:\n{self.text()[-3000:]}")

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as answer:
            return str(answer.read().decode())

    def complete(self, tokens: list[int]) -> str:
        body = {"model": "tiny", "prompt": tokens, "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            data=json.dumps({**body, "ignore_eos": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.loads(answer.read())["choices"][0]["text"])

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}\{{.*\}} (\S+)$", self.get("/metrics"), re.M)
        assert found, f"no metric {name}"
        return float(found.group(1))

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "server.log"
    environment = {"DYN_KVBM_CPU_CACHE_GB": "0.5", "DYN_KVBM_METRICS": "true"}
    server = Server(checkpoint, log, environment)
    server.wait_ready()
    yield server
    server.kill()


def test_a_prefix_that_the_device_evicted_comes_back(server: Server) -> None:
    prompts = [prompt(1100 + i, LENGTH) for i in range(5)]
    cold = [server.complete(tokens) for tokens in prompts]
    before = server.metric("vllm:external_prefix_cache_hits_total")
    warm = [server.complete(tokens) for tokens in prompts]
    assert warm == cold
    hits = server.metric("vllm:external_prefix_cache_hits_total") - before
    assert hits >= 4 * LENGTH - LENGTH


@pytest.mark.timeout(900)
def test_a_server_killed_under_load_finds_its_disk_cache_again(
    checkpoint: Path, tmp_path: Path, server: Server
) -> None:
    """Killed with SIGKILL, all processes of it, at moments that the load decides."""
    prompts = [prompt(1200 + i, LENGTH) for i in range(6)]
    right = [server.complete(tokens) for tokens in prompts]
    environment = {
        "DYN_KVBM_CPU_CACHE_GB": "0.05",
        "DYN_KVBM_DISK_CACHE_GB": "0.2",
        "DYN_KVBM_DISK_CACHE_DIR": str(tmp_path),
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "true",
    }
    found = []
    for num_requests in (6, 9, 12):
        victim = Server(checkpoint, tmp_path / "victim.log", environment)
        try:
            victim.wait_ready()
            assert victim.complete(prompts[0]) == right[0]
            found.append(victim.metric("vllm:external_prefix_cache_hits_total"))
            for i in range(1, num_requests):
                assert victim.complete(prompts[i % 6]) == right[i % 6]
            with ThreadPoolExecutor(6) as clients:
                under_way = [clients.submit(victim.complete, tokens) for tokens in prompts]
                wait(under_way, return_when=FIRST_COMPLETED)
                victim.kill()
        finally:
            victim.kill()
    assert found == [0, LENGTH, LENGTH], "a new process found what the killed one had"
    assert len(list(tmp_path.glob("*.data"))) == 1, "each took over the files of the one before"


def test_start_up_says_what_matters(server: Server) -> None:
    text = server.text()
    assert text.count("kvbm: host tier of ") == 1
    assert "kv_load_failure_policy='fail'" in text
    assert "DYN_KVBM_METRICS='true' has no effect in this release" in text


def test_an_idle_server_drains_and_stops_cleanly(server: Server) -> None:
    server.complete(prompt(1110, LENGTH))
    assert server.stop() == 0
    summary = re.findall(r"kvbm summary: (.*)", server.text())
    assert summary, "no summary in the log"
    counts: dict[str, Any] = dict(pair.split("=") for pair in summary[-1].split())
    assert int(counts["onboarded_blocks"]) > 0
    assert int(counts["offloaded_blocks"]) >= 6 * 12
    assert counts["failed_ops"] == counts["hook_errors"] == "0"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("DYN_KVBM_CPU_CACHE_GB", "100000", "this machine has"),
        ("DYN_KVBM_CPU_CACHE_GIB", "4", "Did you mean 'cpu_cache_gb'"),
    ],
)
def test_a_bad_setting_stops_start_up_with_its_remedy(
    checkpoint: Path, tmp_path: Path, name: str, value: str, says: str
) -> None:
    server = Server(checkpoint, tmp_path / "server.log", {name: value})
    try:
        assert server.process.wait(START_SECONDS) != 0
    finally:
        server.kill()
    assert says in server.text()
    assert name.removeprefix("DYN_KVBM_").lower() in server.text().lower()

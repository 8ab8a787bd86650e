"""Runs a vLLM server as a child process: started, waited for, and always stopped."""

import contextlib
import importlib.metadata
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from examples._client import is_healthy

ROOT = Path(__file__).resolve().parents[1]

START_LIMIT_S = 300.0
STOP_LIMIT_S = 30.0

ENGINE_STOP_LIMIT_S = 15
"""What vLLM gives its engine to end by itself. Its default, 0, kills it before the connector
can log its summary."""

POLL_S = 0.2
LOG_TAIL_LINES = 30

SUMMARY_MARK = "kvbm summary: "

_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


class ServerError(RuntimeError):
    """The server died or didn't come up; the message ends with its log's tail."""


class VllmServer:
    """`vllm serve` on a free port of this machine; a context manager that ends it all."""

    def __init__(
        self, model: Path, options: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> None:
        self.port = _free_port()
        self.log = log
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        grace = ["--shutdown-timeout", str(ENGINE_STOP_LIMIT_S)]
        self._command = [*_serve_command(model), *address, *grace, *options]
        self._environment = {**os.environ, **_ENVIRONMENT, **environment}
        paths = [str(ROOT), self._environment.get("PYTHONPATH", "")]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "VllmServer":
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Raise `ServerError` when the process has ended."""
        code = self._process.poll() if self._process else None
        if code is not None:
            raise ServerError(f"the server ended with exit status {code}\n{self._log_tail()}")

    def stop(self) -> None:
        """Ask the server to end, so that it writes its last log lines; then end what is left."""
        if self._process is None:
            return
        try:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        finally:
            self._kill()

    def summary(self) -> dict[str, float]:
        """Return the numbers of the connector's last summary line; empty when there is none."""
        lines = [line for line in self._log_text().splitlines() if SUMMARY_MARK in line]
        if not lines:
            return {}
        pairs = re.findall(r"(\w+)=(\d+(?:\.\d+)?)(?=\s|$)", lines[-1].split(SUMMARY_MARK, 1)[1])
        return {key: float(value) if "." in value else int(value) for key, value in pairs}

    def moved_blocks(self) -> dict[str, int]:
        """Return the blocks moved along each route; the log names copies with DYN_LOG=debug."""
        moved: dict[str, int] = {}
        for route, count in re.findall(
            r"(\w+_to_\w+): op \d+ moved (\d+) blocks", self._log_text()
        ):
            moved[route] = moved.get(route, 0) + int(count)
        return moved

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_LIMIT_S
        while not is_healthy(self.port):
            self.check_alive()
            if time.monotonic() > deadline:
                message = f"the server wasn't up after {START_LIMIT_S:.0f} s"
                raise ServerError(f"{message}\n{self._log_tail()}")
            time.sleep(POLL_S)

    def _kill(self) -> None:
        """End every process of the group and reap the first."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def _log_tail(self) -> str:
        tail = self._log_text().splitlines()[-LOG_TAIL_LINES:]
        return "\n".join([f"--- the end of {self.log} ---", *tail])


def _serve_command(model: Path) -> list[str]:
    """Return the command that serves `model`: `vllm serve`, or its module where that can't run.

    The `vllm` command needs a distribution called vllm, which a plain install of vllm-cpu lacks.
    """
    program = Path(sys.executable).with_name("vllm")
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", str(model)]
    if program.exists():
        return [str(program), "serve", str(model)]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

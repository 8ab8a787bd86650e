"""A real etcd for tests: its process, its logins, its certificates."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

DEADLINE_SECONDS = 30.0


def require(program: str, package: str) -> None:
    """Skip where a program is missing, or fail where everything must be there."""
    if shutil.which(program) is not None:
        return
    reason = f"no {program} here: apt-get install {package} (scripts/setup.sh does)"
    if os.environ.get("KVBM_REQUIRE_ALL") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


class EtcdServer:
    """One member with its data in a directory. prefix: of its command, such as another network
    namespace's. options: more of its own."""

    def __init__(
        self,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        scheme: str = "http",
        prefix: Sequence[str] = (),
        options: Sequence[str] = (),
    ) -> None:
        require("etcd", "etcd-server")
        self.port = free_port()
        self.endpoint = f"{scheme}://{host}:{self.port}"
        self._prefix, self._options = prefix, options
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, is_checked: bool = True) -> None:
        """Start it, or start it again with what it had."""
        peer = f"http://127.0.0.1:{free_port()}"
        command = [
            *self._prefix,
            "etcd",
            f"--data-dir={self._directory / 'data'}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--log-level=error",
            *self._options,
        ]
        if (self._directory / "data").exists():
            command = [part for part in command if "initial" not in part]
        self._process = subprocess.Popen(command)
        if is_checked:
            self.await_answer()

    def await_answer(self) -> None:
        deadline_seconds = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline_seconds:
            try:
                self.post("maintenance/status", {})
                return
            except OSError:
                time.sleep(0.05)
        raise AssertionError("etcd does not start")

    def kill(self) -> None:
        """As if its machine had died; the data stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Kill it and lose its data."""
        self.kill()
        shutil.rmtree(self._directory / "data")

    def post(self, path: str, body: dict[str, Any], token: str = "") -> Any:
        headers = {"Content-Type": "application/json"}
        if token:
            headers["Authorization"] = token
        request = urllib.request.Request(
            f"{self.endpoint}/v3/{path}", json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.load(answer)

    def enable_logins(self, username: str, password: str) -> None:
        """Ask for passwords from now on; this user may read and write what is ours."""
        self.post("auth/user/add", {"name": "root", "password": "root's"})
        self.post("auth/user/grant", {"user": "root", "role": "root"})
        self.post("auth/role/add", {"name": "kvbm"})
        keys = {"key": _base64("/kvbm/"), "range_end": _base64("/kvbm0")}
        permission = {"permType": "READWRITE", **keys}
        self.post("auth/role/grant", {"name": "kvbm", "perm": permission})
        self.post("auth/user/add", {"name": username, "password": password})
        self.post("auth/user/grant", {"user": username, "role": "kvbm"})
        self.post("auth/enable", {})

    def get(self, key: str) -> str | None:
        found = self.post("kv/range", {"key": _base64(key)}).get("kvs")
        return base64.b64decode(found[0]["value"]).decode() if found else None


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_certificates(directory: Path) -> dict[str, Path]:
    """An authority, and a server's and a client's certificate that it has signed."""
    require("openssl", "openssl")

    def run(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    run(
        *new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority", "-days", "2"
    )
    for name in ("server", "client"):
        run(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (directory / "ext").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        signing = ["x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"]
        run(*signing, "-CAcreateserial", "-days", "2", "-extfile", "ext", "-out", f"{name}.pem")
    names = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    return {name: directory / name for name in names}

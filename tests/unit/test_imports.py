from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "numpy", "zmq", "etcd3gw", "vllm", "nixl")


def test_the_core_imports_without_tensors_sockets_or_engines() -> None:
    code = f"import sys, kvbm_core; sys.exit(str([m for m in {HEAVY} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == "[]"


def test_a_name_that_is_not_there_is_refused() -> None:
    import kvbm_core

    with pytest.raises(AttributeError, match="has no attribute 'BlockManger'"):
        _ = kvbm_core.BlockManger


def test_every_public_name_is_there() -> None:
    import kvbm_core

    assert all(hasattr(kvbm_core, name) for name in kvbm_core.__all__)
    assert kvbm_core.__all__ == sorted(kvbm_core.__all__)


def test_without_pyzmq_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['zmq'] = None; import kvbm_core; kvbm_core.KvbmLeader"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'kvbm-connectors[zmq]'" in run.stderr


def test_without_etcds_client_the_remedy_is_named() -> None:
    code = (
        "import sys; sys.modules['etcd3gw'] = None\n"
        "from kvbm_core import KvbmConfig\n"
        "from kvbm_core.registry.choose import rendezvous_for\n"
        "rendezvous_for(KvbmConfig(), 'a', {})\n"
        "rendezvous_for(KvbmConfig(), 'a', {'ETCD_ENDPOINTS': 'b:1'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'kvbm-connectors[etcd]'" in run.stderr

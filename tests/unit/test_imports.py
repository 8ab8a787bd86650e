from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "numpy", "zmq", "vllm", "nixl")


def test_the_core_imports_without_tensors_sockets_or_engines() -> None:
    code = f"import sys, kvbm_core; sys.exit(str([m for m in {HEAVY} if m in sys.modules]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import kvbm_core

    assert all(hasattr(kvbm_core, name) for name in kvbm_core.__all__)
    assert kvbm_core.__all__ == sorted(kvbm_core.__all__)

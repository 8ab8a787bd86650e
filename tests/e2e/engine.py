"""The real vLLM in a child process that runs functions a test hands it.

A test can so drive the engine step by step and look inside it, and a crash of the engine is a
failed test, not the end of the run.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
NUM_DEVICE_BLOCKS = 40  # one of them is vLLM's null block: three prompts of 12 fit
ANSWER_SECONDS = 240

TRANSFER_CONFIG: dict[str, Any] = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm_connectors.vllm",
    "kv_load_failure_policy": "recompute",
}
OPTIONS: dict[str, Any] = {
    "enforce_eager": True,
    "dtype": "float32",
    "seed": 0,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": NUM_DEVICE_BLOCKS,
    "max_model_len": 1024,
    "max_num_batched_tokens": 256,
    "max_num_seqs": 16,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


class EngineProcess:
    """One `LLM`; extra: the connector's `kv_connector_extra_config`, None without connector."""

    def __init__(
        self,
        model: Path,
        extra: Mapping[str, Any] | None,
        *,
        options: Mapping[str, Any] = {},
        environment: Mapping[str, str] = {},
    ) -> None:
        arguments = {"model": str(model), **OPTIONS, **options}
        if extra is not None:
            arguments["kv_transfer_config"] = {
                **TRANSFER_CONFIG,
                "kv_connector_extra_config": dict(extra),
            }
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, arguments, {**ENVIRONMENT, **environment})
        )
        self._process.start()
        child.close()
        self._is_ready = False

    def wait_ready(self) -> EngineProcess:
        """Wait for the engine to have started; what it raised is raised here."""
        if not self._is_ready:
            self._receive()
            self._is_ready = True
        return self

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(llm, …)` in the child; a module-level function, its result pickles."""
        self.send(function, *args, **kwargs)
        return self._receive()

    def send(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Begin `function(llm, …)` in the child and don't wait for it."""
        self.wait_ready()
        self._pipe.send((function, args, kwargs))

    def kill(self) -> None:
        """As `kill -9` does."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
            self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        if not self._pipe.poll(ANSWER_SECONDS):
            self._process.kill()
            raise AssertionError(f"the engine gave no answer in {ANSWER_SECONDS} s")
        try:
            has_result, answer = self._pipe.recv()
        except EOFError:
            raise AssertionError("the engine's process died; its output says why") from None
        if not has_result:
            raise AssertionError(answer)
        return answer


def _serve(pipe: Connection, arguments: dict[str, Any], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    try:
        from vllm import LLM

        llm = LLM(**arguments)
    except BaseException:  # noqa: BLE001  reported to the test, which fails
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, None))
    while (call := pipe.recv()) is not None:
        function, args, kwargs = call
        try:
            pipe.send((True, function(llm, *args, **kwargs)))
        except BaseException:  # noqa: BLE001  reported to the test, which fails
            pipe.send((False, traceback.format_exc()))

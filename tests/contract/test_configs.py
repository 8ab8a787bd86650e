"""Every file in `configs` is what its engine takes: vLLM's parser, TensorRT-LLM's stand-in."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from kvbm_core.errors import ConfigError
from tests.contract.trtllm.harness import Connector, Outcome, check_tokens, run
from tests.contract.trtllm.kvbm import ENV, NOTHING_LEFT, again, settle, state_of
from tests.contract.trtllm.llm_args import make_llm_args
from tests.contract.trtllm.modules import FLAVOURS, installed
from tests.contract.trtllm.test_engine import shared_prompts

CONFIGS = Path(__file__).parents[2] / "configs"
TRTLLM = ("trtllm.yaml", "trtllm-tp2.yaml")
PACKAGE = "kvbm_connectors.trtllm"


def test_every_file_is_looked_at_here() -> None:
    assert {path.name for path in CONFIGS.iterdir()} == {"vllm.yaml", *TRTLLM}


def test_vllm_takes_its_file() -> None:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--config", str(CONFIGS / "vllm.yaml")])
    config = AsyncEngineArgs.from_cli_args(arguments).kv_transfer_config
    assert config is not None
    assert config.kv_load_failure_policy == "recompute"
    connector = KVConnectorFactory.get_connector_class(config)
    assert connector.__module__.startswith("kvbm_connectors.vllm.")


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", TRTLLM)
def test_the_named_classes_are_the_connectors(name: str, flavour: str) -> None:
    entry = connector_of(options_of(name))
    with installed(flavour, (PACKAGE,)):
        interface = importlib.import_module(FLAVOURS[flavour].path)
        module = importlib.import_module(entry.connector_module)
        leader = getattr(module, entry.connector_scheduler_class)
        worker = getattr(module, entry.connector_worker_class)
        assert issubclass(leader, interface.KvCacheConnectorScheduler)
        assert issubclass(worker, interface.KvCacheConnectorWorker)


@pytest.mark.parametrize("name", TRTLLM)
def test_the_connector_accepts_the_options_and_finds_nothing_to_warn_of(name: str) -> None:
    with installed("1.3", (PACKAGE,)):
        compatibility = importlib.import_module(f"{PACKAGE}.compatibility")
        llm_args = llm_args_with(options_of(name))
        compatibility.check_engine(llm_args)
        assert not compatibility.reuses_parts_of_blocks(llm_args)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [(None, "pipeline_parallel_size", 2), ("kv_cache_config", "host_cache_size", 1 << 30)],
)
def test_an_option_that_the_connector_refuses_would_be_seen(
    section: str | None, option: str, value: int
) -> None:
    options = options_of("trtllm.yaml")
    (options if section is None else options[section])[option] = value
    with installed("1.3", (PACKAGE,)):
        compatibility = importlib.import_module(f"{PACKAGE}.compatibility")
        with pytest.raises(ConfigError, match=option):
            compatibility.check_engine(llm_args_with(options))


def test_an_option_that_the_engine_does_not_have_would_be_seen() -> None:
    options = options_of("trtllm.yaml")
    options["kv_cache_config"]["enable_partial_re_use"] = False
    with pytest.raises(AssertionError, match="enable_partial_re_use"):
        llm_args_with(options)


@pytest.mark.parametrize(
    ("name", "flavour"),
    [
        ("trtllm.yaml", "1.1"),
        ("trtllm.yaml", "1.2"),
        ("trtllm.yaml", "1.3"),
        ("trtllm-tp2.yaml", "1.2"),  # 1.1 would refuse its graphs
        ("trtllm-tp2.yaml", "1.3"),
    ],
)
@pytest.mark.parametrize("mode", ["async", "sync"])
def test_an_engine_with_the_file_gets_its_blocks_back(mode: str, name: str, flavour: str) -> None:
    outcome = serve_with(options_of(name), flavour, mode)
    assert outcome.num_matched_tokens > 20
    assert outcome.states[0] == NOTHING_LEFT


def options_of(name: str) -> dict[str, Any]:
    options: dict[str, Any] = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    return options


def connector_of(options: Mapping[str, Any]) -> Connector:
    """Raises TypeError on keys that `kv_connector_config` does not have."""
    return Connector(**options["kv_connector_config"])


def llm_args_with(options: Mapping[str, Any]) -> Any:
    """The stand-in's arguments with the file's; all its options must be among them."""
    num_ranks = options.get("tensor_parallel_size", 1)
    overrides = dict(dotted(options))
    known = make_llm_args(num_ranks=num_ranks, tokens_per_block=32)
    for option in overrides:
        assert has(known, option), f"TensorRT-LLM has no option {option}"
    return make_llm_args(num_ranks=num_ranks, tokens_per_block=32, overrides=overrides)


def dotted(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every option as `section.option`; the connector's entry stays whole, for the harness."""
    for name, value in options.items():
        if isinstance(value, dict) and name != "kv_connector_config":
            yield from dotted(value, f"{prefix}{name}.")
        elif name != "kv_connector_config":
            yield f"{prefix}{name}", value


def has(arguments: Any, option: str) -> bool:
    section, _, last = option.rpartition(".")
    return hasattr(getattr(arguments, section) if section else arguments, last)


def serve_with(options: Mapping[str, Any], flavour: str, mode: str) -> Outcome:
    """Two waves of the same prompts, on a device that forgets in between; tokens are checked."""
    requests = shared_prompts(8)
    waves = [requests, again(requests)]
    outcome = run(
        connector_of(options),
        waves,
        flavour,
        num_ranks=options.get("tensor_parallel_size", 1),
        chunk_tokens=8 if options.get("enable_chunked_prefill") else None,
        # The engine's default is not null, and stands where the file says nothing.
        graphs="cuda_graph_config" not in options,
        llm_args=dict(dotted(options)),
        env={**ENV, "DYN_KVBM_TRTLLM_LOAD_MODE": mode},
        num_blocks=32,
        between_waves=settle,
        at_end=state_of,
    )
    check_tokens(outcome, waves)
    return outcome

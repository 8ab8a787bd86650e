"""The stand-ins show a connector what its version of `tensorrt_llm` would."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contract.trtllm.llm_args import make_llm_args
from tests.contract.trtllm.llm_request import LlmRequest, Request, Sequence
from tests.contract.trtllm.modules import FLAVOURS, PATH_A, PATH_B, installed
from tests.contract.trtllm.mpi import CollectiveError, ThreadComm, ThreadWorld, enter, mpi_rank

REFERENCE = "tests.contract.trtllm.reference"


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_interface_is_at_one_path_and_nothing_stays(name: str) -> None:
    before = set(sys.modules)
    with installed(name) as flavour:
        interface: Any = importlib.import_module(flavour.path)
        assert interface.KvCacheConnectorWorker.__abstractmethods__ == {
            "register_kv_caches",
            "start_load_kv",
            "wait_for_layer_load",
            "save_kv_layer",
            "wait_for_save",
            "get_finished",
        }
        assert interface.KvCacheConnectorScheduler.__abstractmethods__ == {
            "build_connector_meta",
            "get_num_new_matched_tokens",
            "request_finished",
            "update_state_after_alloc",
        }
        names = tuple(f.name for f in dataclasses.fields(interface.RequestData))
        assert names == flavour.data_fields
        assert importlib.import_module("tensorrt_llm").__version__ == flavour.version
        with pytest.raises(ImportError):
            importlib.import_module(PATH_A if flavour.path == PATH_B else PATH_B)
    assert {m for m in set(sys.modules) - before if m.startswith("tensorrt_llm")} == set()


def test_a_connector_keeps_its_flavours_base_classes() -> None:
    workers = {}
    for name in ("1.2", "1.3", "1.2"):
        with installed(name, [REFERENCE]) as flavour:
            worker: Any = importlib.import_module(REFERENCE).Worker
            base: Any = importlib.import_module(flavour.path).KvCacheConnectorWorker
            assert issubclass(worker, base)
            assert workers.setdefault(name, worker) is worker
    assert workers["1.2"] is not workers["1.3"]
    assert REFERENCE not in sys.modules


def test_the_request_shows_what_its_version_has_and_no_more() -> None:
    request = Request(7, (1, 2, 3), cache_salt="a")
    old = LlmRequest(Sequence(request, [1, 2, 3]), FLAVOURS["1.2"].request_fields)
    new = LlmRequest(Sequence(request, [1, 2, 3]), FLAVOURS["1.3"].request_fields)
    assert (old.request_id, old.prompt_len, old.get_tokens(0)) == (7, 3, [1, 2, 3])
    assert new.cache_salt == "a"
    assert isinstance(old.cache_salt_id, int)
    for view, name in ((old, "cache_salt"), (old, "py_request_id"), (new, "sampling_config")):
        with pytest.raises(AttributeError, match=name):
            getattr(view, name)
    with pytest.raises(AttributeError):
        old.mine = 1


def test_arguments_can_be_overridden_by_name(tmp_path: Path) -> None:
    enter(ThreadComm(ThreadWorld(1, 1.0), 0))
    overrides = {"kv_cache_config.host_cache_size": 5, "pipeline_parallel_size": 2}
    args = make_llm_args(num_ranks=2, tokens_per_block=4, overrides=overrides)
    assert args.kv_cache_config.host_cache_size == 5
    mapping = args.parallel_config.to_mapping()
    assert (mapping.tp_size, mapping.pp_size, mapping.world_size, mapping.rank) == (2, 2, 4, 0)
    with pytest.raises(AttributeError):
        args.kv_cache_config.no_such_field  # noqa: B018


def test_a_rank_that_stays_away_is_an_error_by_a_deadline() -> None:
    comm = ThreadComm(ThreadWorld(2, 0.05), 1)
    with pytest.raises(CollectiveError, match=r"came: {1: 'logits'}"):
        comm.allgather("logits", 1)


def test_a_thread_of_no_rank_is_told_so() -> None:
    import threading

    errors: list[BaseException] = []

    def ask() -> None:
        try:
            mpi_rank()
        except CollectiveError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert "belongs to no rank" in str(errors[0])

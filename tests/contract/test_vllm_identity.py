"""What names the weights, so that a cache on disk is never taken for another model's."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvbm_connectors import sources
from kvbm_connectors.vllm import identity, translate
from kvbm_connectors.vllm.identity import Adapters, weights_identity


class Config(SimpleNamespace):
    """Of a model, as far as it is read; `_commit_hash` as transformers sets it for a hub's."""

    def to_json_string(self) -> str:
        return f"config {self.name}"


def vllm_config(model: str | Path, commit: str | None = None, **changes: Any) -> SimpleNamespace:
    hf_config = Config(name=changes.get("hf_config", "a"), _commit_hash=commit)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model),
            hf_config=hf_config,
            revision=changes.get("revision"),
            hf_config_path=changes.get("hf_config_path"),
            compute_hash=lambda: changes.get("graph", "graph"),
            multimodal_config=SimpleNamespace(
                mm_processor_kwargs=changes.get("processor"), media_io_kwargs=None
            ),
            seed=changes.get("seed", 0),
        ),
        cache_config=SimpleNamespace(calculate_kv_scales=changes.get("dynamic_scales", False)),
        load_config=SimpleNamespace(
            load_format=changes.get("load_format", "auto"),
            model_loader_extra_config=changes.get("loader", {}),
            ignore_patterns=None,
        ),
        speculative_config=changes.get("speculative"),
        attention_config=SimpleNamespace(compute_hash=lambda: changes.get("attention", "auto")),
    )


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "code.py").write_text("")
    monkeypatch.setattr(sources, "_last_load_ns", time.time_ns)  # a process that begins now
    return tmp_path


def test_the_same_files_are_the_same_weights(model: Path) -> None:
    assert weights_identity(vllm_config(model)) == weights_identity(vllm_config(model))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "deep/code.py"])
def test_weights_written_anew_in_the_same_place_are_others(model: Path, name: str) -> None:
    before = weights_identity(vllm_config(model))
    os.utime(model / name, ns=(1, 1))
    assert weights_identity(vllm_config(model)) != before


@pytest.mark.parametrize(
    "change",
    [
        {"hf_config": "b"},
        {"graph": "another max_model_len"},
        {"processor": {"size": 3}},
        {"loader": {"tensorizer_uri": "s3://b"}},
        {"load_format": "dummy"},
        {"dynamic_scales": True},
        {"attention": "another"},
        {
            "speculative": SimpleNamespace(
                draft_model_config=SimpleNamespace(
                    model="draft",
                    hf_config=Config(name="d", _commit_hash="c0ffee"),
                    revision=None,
                    compute_hash=lambda: "graph",
                    seed=0,
                )
            )
        },
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_changes_the_kv_changes_the_identity(model: Path, change: dict[str, Any]) -> None:
    assert weights_identity(vllm_config(model, **change)) != weights_identity(vllm_config(model))


def test_another_cpu_s_kernels_are_others(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_identity(vllm_config(model))
    monkeypatch.setattr(identity.Path, "read_text", lambda self, encoding: "flags: amx_tile\n")
    assert weights_identity(vllm_config(model)) != before


def test_random_weights_are_known_by_their_seed(model: Path) -> None:
    first, second = (vllm_config(model, load_format="dummy", seed=seed) for seed in (1, 2))
    assert weights_identity(first) != weights_identity(second)


def test_a_hub_s_model_is_known_by_its_commit() -> None:
    first = weights_identity(vllm_config("org/model", commit="1"))
    assert weights_identity(vllm_config("org/model", commit="1")) == first
    assert weights_identity(vllm_config("org/model", commit="2")) != first


def test_a_revision_counts_before_the_commit_of_a_foreign_configuration() -> None:
    def of(revision: str | None) -> str:
        config = vllm_config("org/m", commit="1", revision=revision, hf_config_path="org/other")
        return weights_identity(config)

    assert of("a" * 40) != of("b" * 40)


def test_files_changed_after_the_process_began_prove_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began_ns = time.time_ns() - 10**9
    monkeypatch.setattr(sources, "_last_load_ns", lambda: began_ns)
    before = weights_identity(vllm_config(model))
    for module in (identity, sources):
        monkeypatch.setattr(module, "THIS_PROCESS", "another")
    assert weights_identity(vllm_config(model)) != before


def test_this_process_began_before_now_and_not_long_ago() -> None:
    age_seconds = (time.time_ns() - sources._last_load_ns()) / 1e9
    assert -sources._START_UP_SECONDS <= age_seconds < 24 * 3600


def test_what_has_no_files_and_no_commit_is_known_to_this_process_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = weights_identity(vllm_config("org/model"))
    for module in (identity, sources):
        monkeypatch.setattr(module, "THIS_PROCESS", "another")
    assert weights_identity(vllm_config("org/model")) != before


def lora(path: Path, name: str = "adapter", number: int = 1) -> SimpleNamespace:
    return SimpleNamespace(lora_name=name, lora_path=str(path), lora_int_id=number)


def test_an_adapter_trained_on_in_the_same_folder_is_another(model: Path) -> None:
    before = Adapters().identity(lora(model))
    assert Adapters().identity(lora(model)) == before
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert Adapters().identity(lora(model)) != before


def test_an_adapter_that_changed_after_its_first_use_is_known_to_this_process_only(
    model: Path,
) -> None:
    adapters = Adapters()
    adapters.identity(lora(model))
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert adapters.identity(lora(model)) != Adapters().identity(lora(model))


def image(identifier: str) -> SimpleNamespace:
    position = SimpleNamespace(offset=0, length=4)
    return SimpleNamespace(identifier=identifier, mm_position=position)


def test_an_image_that_is_known_by_a_count_is_another_after_a_restart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def content(identifier: str) -> dict[int, bytes]:
        return translate._content_of([image(identifier)], 16)

    counted, hashed = "renderer0-mm-1-image-0", "adapter:" + "0a" * 32
    before = content(counted), content(hashed)
    monkeypatch.setattr(translate, "THIS_PROCESS", "another")
    assert content(counted) != before[0]
    assert content(hashed) == before[1]


def request(priority: int = 0, params: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(priority=priority, kv_transfer_params=params)


def test_requests_that_vllm_serves_first_have_the_higher_priority() -> None:
    assert translate.priorities_of(request(-3)) > translate.priorities_of(request(0))


def test_a_request_may_say_its_priority_itself() -> None:
    assert translate.priorities_of(request(7, {"kvbm_priority": 50})) == (50,)
    assert translate.priorities_of(request(7, {"kvbm_priority": [1]})) == (-7,)

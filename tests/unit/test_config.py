from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from kvbm_core.config import _LATER, _PARSERS, KvbmConfig
from kvbm_core.errors import ConfigError


def load(env: dict[str, str] | None = None, **options: Any) -> KvbmConfig:
    return KvbmConfig.load(env=env or {}, options=options)


def test_nothing_given_gives_the_defaults() -> None:
    assert load() == KvbmConfig()


@pytest.mark.parametrize("value", ["0", "-1", -0.5, "nan", "inf", "-inf", "four", "4 GB", True])
def test_a_size_that_is_no_positive_number_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="cpu_cache_gb"):
        load(cpu_cache_gb=value)


@pytest.mark.parametrize("value", [None, [4], {}])
def test_a_size_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="not a number"):
        load(cpu_cache_gb=value)


@pytest.mark.parametrize(
    "option",
    ["cpu_cache_override_num_blocks", "max_concurrent_transfers", "max_transfer_batch_size"],
)
@pytest.mark.parametrize("value", [0, -3, 1.5, "nan", "inf", "x", 2**32, False])
def test_a_count_that_is_none_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        load(**{option: value})


@pytest.mark.parametrize(
    ("value", "count"), [("8", 8), (8, 8), (8.0, 8), (" 8 ", 8), ("1e3", 1000)]
)
def test_a_count_may_be_written_as_a_number_or_text(value: Any, count: int) -> None:
    assert load(max_concurrent_transfers=value).max_concurrent_transfers == count


@pytest.mark.parametrize("value", ["1", "true", "YES", "on", True, 1])
def test_words_for_true(value: Any) -> None:
    assert load(offload_generated_blocks=value).offload_generated_blocks is True


@pytest.mark.parametrize("value", ["0", "False", "no", "off", False, 0])
def test_words_for_false(value: Any) -> None:
    assert load(offload_generated_blocks=value).offload_generated_blocks is False


@pytest.mark.parametrize("option", ["leader_zmq_pub_port", "leader_zmq_ack_port"])
@pytest.mark.parametrize("value", [-1, 65_536, "1.5", "http", None])
def test_a_port_that_is_none_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        load(**{option: value})


def test_what_kvbm_users_say_of_the_leader_is_read() -> None:
    config = load(
        {
            "DYN_KVBM_LEADER_ZMQ_HOST": "10.0.0.1",
            "DYN_KVBM_LEADER_ZMQ_PUB_PORT": "56001",
            "DYN_KVBM_LEADER_ZMQ_ACK_PORT": "0",
            "DYN_KVBM_LEADER_WORKER_INIT_TIMEOUT_SECS": "120",
            "DYN_KVBM_CLUSTER_NAME": "blue",
        }
    )
    assert (config.leader_zmq_host, config.leader_zmq_pub_port) == ("10.0.0.1", 56001)
    assert (config.leader_zmq_ack_port, config.leader_worker_init_timeout_secs) == (0, 120.0)
    assert (config.cluster_name, config.ignored) == ("blue", ())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("leader_zmq_host", "tcp://a"),
        ("leader_zmq_host", "a b"),
        ("leader_zmq_host", 3),
        ("leader_worker_init_timeout_secs", 0),
        ("leader_worker_init_timeout_secs", "soon"),
        ("cluster_name", "a/b"),
        ("cluster_name", " "),
    ],
)
def test_what_no_leader_can_be_found_by_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        load(**{option: value})


@pytest.mark.parametrize("value", ["maybe", 2, None])
def test_a_boolean_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="not a boolean"):
        load(offload_generated_blocks=value)


@pytest.mark.parametrize("option", ["eviction_policy", "transfer_engine"])
@pytest.mark.parametrize("value", ["  ", 3, None])
def test_a_name_that_is_none_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        load(**{option: value})


@pytest.mark.parametrize("value", ["Engine", "vllm", 1, None])
def test_an_unknown_kind_of_block_keys_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match="auto, engine or chain"):
        load(block_keys=value)


def test_an_unknown_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cpu_cache_gb'") as caught:
        load(cpu_cache_bg=4)
    assert caught.value.option == "kv_connector_extra_config.cpu_cache_bg"


def test_an_unknown_variable_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"DYN_KVBM_CPU_CACHE='4'.*Did you mean"):
        load({"DYN_KVBM_CPU_CACHE": "4"})


def test_an_option_like_none_is_refused_with_all_that_are() -> None:
    with pytest.raises(ConfigError, match=r"Known: cpu_cache_gb, "):
        load(zzzzzz=1)


def test_the_list_of_ignored_options_is_no_option() -> None:
    with pytest.raises(ConfigError, match="unknown option"):
        load(ignored=["x"])


@pytest.mark.parametrize("option", sorted(_LATER))
def test_an_option_of_kvbm_without_a_part_here_is_accepted_and_named(option: str) -> None:
    variable = f"DYN_KVBM_{option.upper()}"
    assert load({variable: "1"}).ignored == (f"{variable}='1'",)
    assert load(**{option: 1}).ignored == (f"kv_connector_extra_config.{option}=1",)


def test_no_option_is_both_used_and_ignored() -> None:
    assert not _LATER & set(_PARSERS)


def test_the_environment_is_read_by_prefix_and_blank_means_unset() -> None:
    config = load({"DYN_KVBM_CPU_CACHE_GB": "2.5", "CPU_CACHE_GB": "9", "DYN_KVBM_SLEEP": " "})
    assert (config.cpu_cache_gb, config.ignored) == (2.5, ())


def test_the_engines_options_win_over_the_environment() -> None:
    assert load({"DYN_KVBM_CPU_CACHE_GB": "2"}, cpu_cache_gb=3).cpu_cache_gb == 3


def test_an_option_may_carry_the_name_of_its_variable() -> None:
    assert load(DYN_KVBM_CPU_CACHE_GB="3").cpu_cache_gb == 3


def test_a_bad_variable_is_refused_also_where_an_option_overrides_it() -> None:
    with pytest.raises(ConfigError, match="DYN_KVBM_CPU_CACHE_GB"):
        load({"DYN_KVBM_CPU_CACHE_GB": "x"}, cpu_cache_gb=3)


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("debug", "DEBUG"),
        ("TRACE", "DEBUG"),
        ("warn", "WARNING"),
        ("off", "CRITICAL"),
        ("warn,kvbm=debug", "DEBUG"),
        ("kvbm=debug,warn", "WARNING"),
        ("info, kvbm_core=error", "ERROR"),
        ("hyper=trace", "INFO"),
        ("error,hyper=nonsense", "ERROR"),
    ],
)
def test_a_log_filter_gives_our_level(text: str, level: str) -> None:
    assert load({"DYN_LOG": text}).log_level == level


@pytest.mark.parametrize("text", ["loud", "warn,kvbm=loud", "2", "info,kvbm_core::pool"])
def test_a_filter_of_dynamo_that_we_cannot_read_is_named_and_stops_nothing(text: str) -> None:
    config = load({"DYN_LOG": text})
    assert (config.log_level, config.ignored) == ("INFO", (f"DYN_LOG={text!r}",))


def test_a_bad_level_of_our_own_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown level"):
        load({"DYN_KVBM_LOG_LEVEL": "loud"})


def test_the_more_specific_source_of_the_log_level_wins() -> None:
    env = {"DYN_LOG": "error", "DYNAMO_LOG_LEVEL": "debug"}
    assert load(env).log_level == "ERROR"
    assert load({"DYNAMO_LOG_LEVEL": "debug"}).log_level == "DEBUG"
    assert load({**env, "DYN_KVBM_LOG_LEVEL": "warn"}).log_level == "WARNING"
    assert load({**env, "DYN_KVBM_LOG_LEVEL": "warn"}, log_level="info").log_level == "INFO"


def test_an_error_names_option_value_problem_and_remedy() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"DYN_KVBM_CPU_CACHE_GB": "-1"})
    text = str(caught.value)
    assert text == ("DYN_KVBM_CPU_CACHE_GB='-1': must be above 0. Give GB, or leave it unset.")


def test_a_config_is_frozen() -> None:
    with pytest.raises(AttributeError):
        setattr(load(), fields(KvbmConfig)[0].name, 1)


@pytest.mark.parametrize("option", ["disk_cache_gb", "disk_cache_override_num_blocks"])
@pytest.mark.parametrize("value", [0, "0", 0.0, " 0 "])
def test_a_disk_of_nothing_is_none(option: str, value: Any) -> None:
    config = load(**{option: value})
    assert (config.has_disk, config.is_disk_only) == (False, False)


@pytest.mark.parametrize("option", ["disk_cache_gb", "disk_cache_override_num_blocks"])
@pytest.mark.parametrize("value", [-1, "x", "nan"])
def test_a_disk_size_that_is_none_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        load(**{option: value})


def test_a_disk_without_a_host_size_is_disk_only() -> None:
    assert load({"DYN_KVBM_DISK_CACHE_GB": "8"}).is_disk_only
    assert not load({"DYN_KVBM_DISK_CACHE_GB": "8"}, cpu_cache_gb=4).is_disk_only


def test_a_priority_may_be_any_whole_number() -> None:
    assert load(host_offload_prefix_min_priority="-5").host_offload_prefix_min_priority == -5
    with pytest.raises(ConfigError, match="whole number"):
        load(host_offload_prefix_min_priority=1.5)

from __future__ import annotations

import pytest

from kvbm_core.errors import ConfigError
from kvbm_core.registry.settings import EtcdSettings, host_and_port


def test_without_endpoints_there_is_no_etcd() -> None:
    assert EtcdSettings.load({}) is None
    assert EtcdSettings.load({"ETCD_ENDPOINTS": " , ", "ETCD_AUTH_USERNAME": "u"}) is None


def test_everything_dynamo_reads_is_read() -> None:
    env = {
        "ETCD_ENDPOINTS": "http://a:1, https://b:2/ ,c:3",
        "ETCD_AUTH_USERNAME": "u",
        "ETCD_AUTH_PASSWORD": "p",
        "ETCD_AUTH_CA": "/ca.pem",
        "ETCD_AUTH_CLIENT_CERT": "/cert.pem",
        "ETCD_AUTH_CLIENT_KEY": "/key.pem",
        "ETCD_LEASE_TTL": "7",
    }
    endpoints = ("http://a:1", "https://b:2", "http://c:3")
    expected = EtcdSettings(endpoints, "u", "p", "/ca.pem", "/cert.pem", "/key.pem", 7)
    assert EtcdSettings.load(env) == expected


def test_secrets_are_not_shown() -> None:
    shown = repr(EtcdSettings(("http://a",), "u", "p4ss", client_key="k3y"))
    assert "p4ss" not in shown
    assert "k3y" not in shown


@pytest.mark.parametrize(
    "text",
    ["ftp://a:1", "http://", "http://a:port", "http://u:p@a:1", "http://a:1/path", "http://[::1"],
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ETCD_ENDPOINTS"):
        EtcdSettings.load({"ETCD_ENDPOINTS": text})


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ("ETCD_AUTH_USERNAME", "ETCD_AUTH_PASSWORD"),
        ("ETCD_AUTH_PASSWORD", "ETCD_AUTH_USERNAME"),
        ("ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY"),
    ],
)
def test_half_of_a_pair_is_refused_without_showing_it(given: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=missing) as caught:
        EtcdSettings.load({"ETCD_ENDPOINTS": "a:1", given: "s3cret"})
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("text", ["0", "-1", "ten", "1.5", "3601"])
def test_a_lease_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="ETCD_LEASE_TTL"):
        EtcdSettings.load({"ETCD_ENDPOINTS": "a:1", "ETCD_LEASE_TTL": text})


def test_the_port_may_be_left_out() -> None:
    assert host_and_port("http://a") == ("a", 2379)
    assert host_and_port("https://[::1]:7") == ("::1", 7)

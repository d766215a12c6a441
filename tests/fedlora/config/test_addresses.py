"""Which addresses are called past a proxy: this machine's, and no other."""

import os
from contextlib import contextmanager

import httpx
import pytest
import requests
from httpx._utils import get_environment_proxies
from requests.utils import get_environ_proxies

from fedlora.config import addresses
from fedlora.errors import ConfigError

OURS = ["http://127.0.0.1:4200/api", "http://localhost:5000", "http://[::1]:4200", "http://192.0.2.7:4200/api"]
THEIRS = "https://huggingface.co/x"
ENVIRONMENTS = {
    "http only": {"http_proxy": "http://proxy:3128", "HTTPS_PROXY": "http://proxy:3128"},
    "everything": {"ALL_PROXY": "socks5://proxy:1080"},
    "a desktop's": {"all_proxy": "socks://proxy:1080/", "NO_PROXY": ""},
    "others exempt": {"HTTPS_PROXY": "proxy:3128", "http_proxy": "proxy:3128", "NO_PROXY": "example.org, 10.0.0.1"},
    "two spellings": {"https_proxy": "http://proxy:1", "NO_PROXY": "example.org", "no_proxy": "10.0.0.1"},
}  # fmt: skip


@contextmanager
def settled(monkeypatch, environ, *hosts):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for name, value in addresses.direct(os.environ, *hosts).items():
        monkeypatch.setenv(name, value)
    yield


@pytest.mark.parametrize("environ", ENVIRONMENTS.values(), ids=ENVIRONMENTS)
def test_only_this_machine_is_called_directly(monkeypatch, environ):
    with settled(monkeypatch, environ, "192.0.2.7"):
        with httpx.Client() as client:  # with a socks proxy it needs socksio, wherever a request goes
            direct = [client._transport_for_url(httpx.URL(url)) is client._transport for url in OURS]
            assert direct == [True] * len(OURS)
            assert client._transport_for_url(httpx.URL(THEIRS)) is not client._transport
            exempt = {"10.0.0.1", "example.org"} & set(",".join(environ.values()).replace(" ", "").split(","))
            assert all(client._transport_for_url(httpx.URL(f"http://{host}/")) is client._transport for host in exempt)
        assert not any(get_environ_proxies(url) for url in OURS)
        assert get_environ_proxies(THEIRS)
        with requests.Session() as session:
            found = session.merge_environment_settings(THEIRS, {}, None, None, None)["proxies"]
        assert "socks://" not in str(found)
        assert not {url for url in get_environment_proxies().values() if url and url.startswith("socks:")}


@pytest.mark.parametrize("environ", [{}, {"NO_PROXY": "example.org"}, {"http_proxy": ""}])
def test_where_there_is_no_proxy_nothing_is_set(environ):
    assert addresses.direct(environ) == {}


def test_a_star_stays_alone(monkeypatch):
    with settled(monkeypatch, {"https_proxy": "http://proxy:1", "NO_PROXY": "*"}):
        assert os.environ["no_proxy"] == "*"
        assert not get_environ_proxies(THEIRS)


def test_twice_is_once():
    environ = {"http_proxy": "http://proxy:1", "NO_PROXY": "example.org"}
    once = environ | addresses.direct(environ)
    assert once | addresses.direct(once) == once


def test_a_proxy_that_no_client_speaks_is_one_line_without_its_password():
    with pytest.raises(ConfigError, match="ALL_PROXY names a proxy of the kind 'socks4'; expected http, ") as refused:
        addresses.direct({"ALL_PROXY": "socks4://ann:S3CRET@proxy:1080"})
    assert "S3CRET" not in str(refused.value)

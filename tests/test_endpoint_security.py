"""Where requests go, and where the key goes."""

from __future__ import annotations

import logging
import socket
import threading
import traceback
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from endpoint_server import (
    GREEDY,
    Server,
    draws,
    error,
    generator,
)
from selfmoa.config import Endpoint
from selfmoa.errors import EndpointError, RecipeError, SelfmoaError
from selfmoa.generators.endpoint import address
from selfmoa.generators.openai import EndpointGenerator

CANARY = "sk-canary-0123456789abcdef"


def test_proxies_of_the_environment_are_not_asked(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Server() as server:
        assert len(generator(server).generate(draws(2), GREEDY)) == 2


GOOD_URLS = {
    "http://127.0.0.1:8000/v1": "127.0.0.1",
    "http://127.0.0.1": "127.0.0.1",
    "http://127.9.9.9:1/": "127.9.9.9",
    "http://[::1]:8000/v1": "::1",
    "http://localhost:8000/v1": "localhost",
    "https://api.example.com/v1": "api.example.com",
    "https://API.Example.COM:443/openai/v1/": "api.example.com",
    "https://8.8.8.8/v1": "8.8.8.8",
    "https://my_server-2.lan/v1": "my_server-2.lan",
}
BAD_URLS = [
    "",
    "127.0.0.1:8000",
    "ftp://127.0.0.1/v1",
    "file:///etc/passwd",
    "HTTP//127.0.0.1",
    "gopher://127.0.0.1/",
    "http://",
    "http:///v1",
    "http://127.0.0.1:0/v1",
    "http://127.0.0.1:65536/v1",
    "http://127.0.0.1:80:80/v1",
    "http://user:pass@127.0.0.1/v1",
    "http://api.example.com@169.254.169.254/v1",
    "http://api.example.com\\@169.254.169.254/v1",
    "http://127.0.0.1\\.example.com/v1",
    "http://127.1/v1",
    "http://0x7f.1/v1",
    "http://0x7f000001/v1",
    "http://2130706433/v1",
    "http://0177.0.0.1/v1",
    "http://127.0.0.01/v1",
    "http://127.0.0.256/v1",
    "http://1.2.3.4.5/v1",
    "http://[fe80::1%25eth0]/v1",
    "http://[::1/v1",
    "http://[12345::]/v1",
    "http://127.0.0.1/v1?key=secret",
    "http://127.0.0.1/v1#x",
    "http://127.0.0.1/../v1",
    "http://127.0.0.1/%2e%2e/v1",
    "http://127.0.0.1 /v1",
    "http://127.0.0.1/v1\r\nX: y",
    "http://127.0.0.1/v1\n",
    "http://１２７.0.0.1/v1",
    "http://ⓛocalhost/v1",
    "http://exa mple.com/v1",
    "http://example..com/v1",
]
PLACES = {
    "loopback": "127.0.0.1 127.255.255.254 ::1 ::ffff:127.0.0.1",
    "private": "10.0.0.1 172.16.5.4 192.168.1.1 100.64.0.1 fd12::1 ::ffff:10.0.0.1 198.18.0.1",
    "public": "8.8.8.8 1.1.1.1 2606:4700::1111 ::ffff:8.8.8.8",
    "refused": "169.254.169.254 169.254.1.1 fe80::1 0.0.0.0 0.1.2.3 :: 224.0.0.1 ff02::1 "
    "255.255.255.255 240.0.0.1 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 "
    "::ffff:169.254.169.254 ::ffff:0.0.0.0 64:ff9b::a9fe:a9fe 2002:a9fe:a9fe:: 2002:7f00:1:: "
    "2001:0:4136:e378:8000:63bf:3fff:fdd2 ::127.0.0.1 64:ff9b:1::7f00:1",
}


@pytest.mark.parametrize("url", GOOD_URLS)
def test_urls_that_mean_one_thing_are_read(url):
    origin = address.parse(url)
    assert origin.host == GOOD_URLS[url]
    assert address.parse(origin.shown) == origin


@pytest.mark.parametrize("url", BAD_URLS)
def test_urls_that_programs_read_differently_are_refused_and_not_repeated(url):
    with pytest.raises(RecipeError) as caught:
        EndpointGenerator(Endpoint(url=url), "tiny")
    for secret in ("pass", "secret"):
        assert secret not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("where", "each"), [(w, a) for w, some in PLACES.items() for a in some.split()]
)
def test_every_address_has_its_place(where, each):
    assert address.place(ip_address(each)) == where


@given(st.ip_addresses())
def test_an_address_of_no_kind_is_not_let_through(each):
    if address.place(each) == "public":
        assert each.is_global
        assert not (each.is_private)
        assert not (each.is_link_local)
        assert not (each.is_loopback)
        assert not (each.is_multicast)


def named(monkeypatch, *answers):
    """Let the system's resolver answer, one list of addresses after another."""
    queue = [list(some) for some in answers]

    def look_up(host, port, **_):
        return [
            (0, 0, 0, "", (each, port)) for each in (queue.pop(0) if len(queue) > 1 else queue[0])
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_a_name_for_an_internal_address_is_refused(monkeypatch):
    model = EndpointGenerator(Endpoint(url="http://models.example/v1", timeout=1), "tiny")
    named(monkeypatch, ["169.254.169.254"])
    with pytest.raises(RecipeError, match=r"169\.254\.169\.254"):
        model.generate(draws(1), GREEDY)
    named(monkeypatch, ["8.8.8.8", "169.254.169.254"])
    with pytest.raises(RecipeError, match=r"169\.254\.169\.254"):
        model.generate(draws(1), GREEDY)
    named(monkeypatch, ["10.0.0.1"])
    with pytest.raises(RecipeError, match="allow_private"):
        model.generate(draws(1), GREEDY)


def test_private_addresses_need_leave_and_link_local_ones_get_none():
    origin = address.parse("http://models.example/v1")
    private, metadata = [ip_address("10.0.0.1")], [ip_address("169.254.169.254")]
    address.check(origin, private, allow_private=True, has_key=True)
    for allow in (True, False):
        with pytest.raises(RecipeError):
            address.check(origin, metadata, allow_private=allow, has_key=False)


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch):
    """A name that changes its meaning after the check (DNS rebinding) changes nothing."""
    with Server() as server:
        named(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
        endpoint = Endpoint(url=f"http://models.example:{server.port}/v1", timeout=5)
        model = EndpointGenerator(endpoint, "tiny", first_wait=0.001)
        assert len(model.generate(draws(5), GREEDY)) == 5
        assert {head["host"] for head in server.heads} == {f"models.example:{server.port}"}
        with pytest.raises(RecipeError):
            model.generate(draws(1, seed=1), GREEDY)


def test_the_next_address_is_asked_where_nobody_listens_at_the_first(monkeypatch):
    with Server() as server:
        named(monkeypatch, ["127.0.0.2", "127.0.0.1"])
        endpoint = Endpoint(url=f"http://models.example:{server.port}/v1", retries=0)
        assert len(EndpointGenerator(endpoint, "tiny").generate(draws(2), GREEDY)) == 2


def test_a_resolver_that_hangs_does_not_hang_us(monkeypatch):
    forever = threading.Event()

    def hang(*_, **__):
        forever.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    model = EndpointGenerator(Endpoint(url="http://models.example/v1", timeout=0.1), "tiny")
    with pytest.raises(EndpointError, match=r"within 0\.1 s"):
        model.generate(draws(1), GREEDY)
    forever.set()


# The key


def test_the_key_is_sent_and_nowhere_else(monkeypatch, caplog):
    monkeypatch.setenv("TEA_KEY", CANARY)
    caplog.set_level(logging.DEBUG)
    said = []
    echo = f"Incorrect API key provided: {CANARY}. \x1b[31m You can find yours elsewhere."
    acts = ["reset", "429", "500", "bad-utf8", "no-json", "half", "no-http", "stall", "good"]
    echoes = {f"echo-{status}": error(status, echo) for status in (400, 401, 404, 500)}
    for act in [*acts, *echoes]:
        with Server(script=lambda body, act=act: [act] * 9, **echoes) as server:
            timeout = 0.3 if act == "stall" else 10.0
            model = generator(server, key_env="TEA_KEY", retries=1, timeout=timeout)
            try:
                model.generate(draws(2), GREEDY)
            except SelfmoaError as failure:
                said += [str(failure), repr(failure), *traceback.format_exception(failure)]
        assert server.heads[0]["authorization"] == f"Bearer {CANARY}"
        said += [repr(model), repr(vars(model)), repr(model.endpoint), model.model]
    assert len([s for s in said if "[key]" in s]) >= 4
    assert not any(CANARY in text for text in [*said, caplog.text])
    assert not any("\x1b" in text for text in said)


@pytest.mark.parametrize("value", [None, "", "  ", "sk-ca\nnary", "sk-cañary", "two words"])
def test_a_key_that_is_none_is_refused_without_being_shown(monkeypatch, value):
    monkeypatch.delenv("TEA_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEA_KEY", value)
    with Server() as server, pytest.raises(RecipeError, match="TEA_KEY") as caught:
        generator(server, key_env="TEA_KEY").generate(draws(1), GREEDY)
    assert not server.bodies
    assert not value or not value.strip() or value.strip() not in str(caught.value)


def test_no_key_goes_over_the_internet_in_clear_text():
    origin = address.parse("http://api.example.com/v1")
    public = [ip_address("8.8.8.8")]
    with pytest.raises(RecipeError, match="https"):
        address.check(origin, public, allow_private=False, has_key=True)
    address.check(origin, public, allow_private=False, has_key=False)

"""Fetching images: URLs refused before any packet is sent, and servers that lie, drip or redirect."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import os
import socket
import ssl
import time
import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.service.fetch import Address, ImageFetcher, RemoteImages, is_public
from tests.service.image_site import HOST, LOOPBACK, SECRET, Authority, head, moved, sending, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.service.image_site import Answer, Site

pytestmark = pytest.mark.slow
PUBLIC = "93.184.215.14"
IMAGE = b"\x89PNG made-up bytes"
NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts no authority; the usual ones take long to read
PIECE = (len(IMAGE), IMAGE)
FINE = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % PIECE


def words(text: str) -> list[str]:
    return text.split()


@dataclass
class Names:
    """A resolver that returns `answers` in order, then the last one repeatedly, and records the lookups."""

    answers: Sequence[Sequence[str]] = ((LOOPBACK,),)
    asked: list[str] = field(default_factory=list)

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self.answers[min(len(self.asked), len(self.answers)) - 1]


def here_too(address: Address) -> bool:
    return address == ipaddress.ip_address(LOOPBACK) or is_public(address)


@asynccontextmanager
async def fetcher(
    site: Site | None, names: Names | None = None, tls: ssl.SSLContext | None = None, **changes: Any
) -> AsyncIterator[ImageFetcher]:
    """An `ImageFetcher` for `site`, the only private address that is allowed."""
    values = {"hosts": (HOST,), "schemes": ("http",), "seconds": 10.0, **changes}
    ports = (site.port,) if site else (80, 443)
    remote = RemoteImages(**{"ports": ports, **values})
    image_fetcher = ImageFetcher(remote, names or Names(), allowed=here_too, tls=tls or NOBODY)
    try:
        yield image_fetcher
    finally:
        await image_fetcher.aclose()


async def refusal(image_fetcher: ImageFetcher, url: str) -> str:
    """The message of a refusal; checks that it is one line and quotes no more of the URL than its host."""
    with pytest.raises(ImageError) as caught:
        await image_fetcher.fetch(url)
    message = str(caught.value)
    assert message.isprintable()
    assert SECRET not in message
    assert ": " in message  # the reason, then the remedy
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return message


async def refused_unasked(url: str, *hosts: str, **changes: Any) -> str:
    """The message for a URL that must be refused before the resolver is asked."""
    names = Names([[PUBLIC]])
    async with fetcher(
        None, names, **{"schemes": ("http", "https"), "hosts": hosts or (HOST,), **changes}
    ) as image_fetcher:
        message = await refusal(image_fetcher, url)
    assert names.asked == []
    return message


@pytest.fixture(autouse=True)
def no_second_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code below the fetcher may resolve a name."""

    def lookup(host: Any, *rest: Any, **options: Any) -> Any:
        ipaddress.ip_address(host)
        return system_lookup(host, *rest, **options)

    system_lookup = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lookup)


# Settings


def test_it_is_off_unless_a_host_is_listed() -> None:
    assert RemoteImages().hosts == ()
    assert "not fetched here" in asyncio.run(refused_off())


async def refused_off() -> str:
    names = Names()
    image_fetcher = ImageFetcher(RemoteImages(), names, tls=NOBODY)
    message = await refusal(image_fetcher, f"https://{HOST}/{SECRET}")
    assert names.asked == []
    return message


def test_hosts_are_kept_in_one_spelling() -> None:
    hosts = ("Pics.EXAMPLE", "*.Example.ORG", "pics.example.", "2606:4700:0::1111", "93.184.215.14")
    kept = RemoteImages(hosts=hosts).hosts
    assert kept == ("pics.example", "*.example.org", "pics.example", "2606:4700::1111", "93.184.215.14")


@pytest.mark.parametrize(
    "host",
    [
        *words("""
        . * *. *.org *.10.0.0.1 a.*.example https://a.example a.example:443 a.example/x a@b.example a..example .example
        2130706433 0x7f.1 0177.0.0.1 [::1] fe80::1%eth0 bücher.example
    """),
        "",
        "a.example\n",
        "a" * 64 + ".example",
        "a." * 130 + "example",
    ],
)
def test_a_host_that_could_match_nothing_or_too_much_is_no_setting(host: str) -> None:
    with pytest.raises(ValidationError, match=r"is not a host|too m"):
        RemoteImages(hosts=(host,))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_bytes", 0),
        ("seconds", 0),
        ("seconds", float("inf")),
        ("seconds", float("nan")),
        ("redirects", -1),
        ("ports", ()),
        ("ports", (0,)),
        ("ports", (65536,)),
        ("schemes", ()),
        ("schemes", ("ftp",)),
        ("unknown", 1),
    ],
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError):
        RemoteImages.model_validate({name: value})


# Which addresses are public


@pytest.mark.parametrize(
    "address",
    words("""
        0.0.0.0 10.0.0.1 100.64.0.1 100.100.100.200 127.0.0.1 168.63.129.16 169.254.169.254 172.16.0.1 192.0.0.192
        192.0.2.1 192.88.99.1 192.168.0.1 198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255
        :: ::1 ::127.0.0.1 fe80::1 fe80::1%1 fec0::1 fd00:ec2::254 ff0e::1 2001:db8::1 3fff::1 4000::1 5f00::1
        2606:4700::1111%1 ::ffff:169.254.169.254 ::ffff:0:169.254.169.254 64:ff9b::169.254.169.254 64:ff9b:1::1
        2002:a9fe:a9fe::1 2001:0:4136:e378:8000:63bf:5601:5601
    """),
)
def test_private_addresses(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", [PUBLIC, "100.128.0.1", "2606:4700::1111", "2a00:1450::1", "64:ff9b::5db8:d70e"])
def test_public_addresses(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.ip_addresses(v=4))
def test_a_wrapped_address_is_never_more_public_than_itself(address: ipaddress.IPv4Address) -> None:
    number = int(address)
    public = is_public(address)
    assert is_public(ipaddress.IPv6Address((0xFFFF << 32) + number)) == public
    assert is_public(ipaddress.IPv6Address((0x64FF9B << 96) + number)) == public
    assert not is_public(ipaddress.IPv6Address(number))
    assert not is_public(ipaddress.IPv6Address((0x2002 << 112) + (number << 80)))
    assert not is_public(ipaddress.IPv6Address((0x20010000 << 96) + (number ^ 0xFFFF_FFFF)))


# Refused before anything is resolved


@pytest.mark.parametrize(
    "host",
    [
        *words(r"""
        127.0.0.1 127.0.0.1. 127.1 2130706433 0177.0.0.1 0x7f000001 0x7f.0.0.1 169.254.169.254 100.64.0.1 localhost
        [::1] [fe80::1%251] [::ffff:169.254.169.254] [::ffff:a9fe:a9fe]
        evil.example evilpics.example pics.example.evil.example pics.example%00.evil.example pics.example\.evil.example
        . .. pics.example.. .pics.example %70ics.example ｐics.example
        pics.example@evil.example pics.example:80@evil.example evil.example\@pics.example u:p@pics.example
    """),
        "",
    ],
)
async def test_a_host_off_the_list_is_not_looked_up(host: str) -> None:
    for scheme in ("http", "https"):
        await refused_unasked(f"{scheme}://{host}/{SECRET}")


@pytest.mark.parametrize(
    "url",
    words("""
        file:///etc/passwd file://pics.example/x ftp://pics.example/x gopher://pics.example:80/x unix://pics.example/x
        data:image/png;base64,AAAA //pics.example/x pics.example/x http:pics.example/x http:/pics.example/x
    """),
)
async def test_other_schemes(url: str) -> None:
    await refused_unasked(url)


@pytest.mark.parametrize(
    "url",
    [
        *words("https://pics.example:x/ https://[::1/ https://pics.example[/ https:///x"),
        "",
        f" https://{HOST}/x",
        f"https://{HOST}/x\n",
        f"https://{HOST}\t/x",
        f"https://{HOST}/\ud800",
        "https://" + "a" * 70_000,
    ],
)
async def test_broken_urls(url: str) -> None:
    assert "not valid" in await refused_unasked(url)


async def test_a_url_that_grows_too_long_when_it_is_escaped() -> None:
    async with serving(FINE) as site, fetcher(site) as image_fetcher:
        await refusal(image_fetcher, site.url("/" + "\u00e9" * 30_000))


async def test_http_has_to_be_listed() -> None:
    assert "https only" in await refused_unasked(f"http://{HOST}/x", schemes=("https",))


@pytest.mark.parametrize("port", ["8080", "0", "65536", "-1", "22"])
async def test_other_ports(port: str) -> None:
    assert "port" in await refused_unasked(f"http://{HOST}:{port}/x")


async def test_the_message_names_the_host_that_counts() -> None:
    assert "evil.example" in await refused_unasked(f"https://evil.example/{SECRET}")
    assert "user name" in await refused_unasked(f"https://{HOST}@evil.example/{SECRET}")
    assert "user name" in await refused_unasked(f"https://{SECRET}:x@{HOST}/")


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("a.example.org", True),
        ("a.b.example.org", True),
        ("A.Example.ORG.", True),
        ("xn--bcher-kva.example.org", True),
        ("bücher.example.org", True),
        ("example.org", False),
        ("evilexample.org", False),
        (".example.org", False),
        ("a..example.org", False),
        ("a.example.org.evil.example", False),
        ("a.example.com", False),
    ],
)
async def test_wildcards(host: str, listed: bool) -> None:
    names = Names([[]])
    async with fetcher(None, names, hosts=("*.example.org",)) as image_fetcher:
        await refusal(image_fetcher, f"http://{host}/{SECRET}")
    assert bool(names.asked) == listed


TRICKS = st.sampled_from(
    [
        *words(
            r"good.example evil.example pics. GOOD. a . @ : / \ # ? % & ; - _ * [ ] // https: 443 ::1 127.0.0.1 %2e %00"
        ),
        " ",
        "。",
        "．",
        "ß",
    ]
)
LISTED = RemoteImages(hosts=("good.example", "*.pics.good.example"), schemes=("http", "https"))


PLAIN = st.from_regex(r"[a-z0-9-]{1,6}(\.[a-z0-9-]{1,6}){0,2}(\.good)?\.(example|test)", fullmatch=True)


@settings(max_examples=200, deadline=None)
@given(
    PLAIN | st.lists(TRICKS | st.text(max_size=3), max_size=7).map("".join), st.sampled_from(["https://", "HTTP://"])
)
def test_the_resolver_never_hears_of_a_host_off_the_list(rest: str, scheme: str) -> None:
    names = Names([[]])
    with pytest.raises(ImageError) as caught:
        asyncio.run(ImageFetcher(LISTED, names, tls=NOBODY).fetch(scheme + rest))
    assert str(caught.value).isprintable()
    for host in names.asked:
        assert host == "good.example" or host.endswith(".pics.good.example")


# Addresses, pinned


async def test_the_image_comes_from_the_pinned_address() -> None:
    names = Names()
    async with serving(FINE) as site, fetcher(site, names) as image_fetcher:
        assert await image_fetcher.fetch(site.url("/a%20b/%E4?q=%2F&x=1#part")) == IMAGE
    assert names.asked == [HOST]
    lines = site.requests[0].decode().lower().split("\r\n")
    assert lines[0] == "get /a%20b/%e4?q=%2f&x=1 http/1.1"
    assert f"host: {HOST}:{site.port}" in lines
    assert "accept-encoding: identity" in lines
    assert not any(line.startswith(("cookie", "authorization", "referer")) for line in lines)


async def test_upper_case_and_a_trailing_dot_are_the_same_host() -> None:
    names = Names()
    async with serving(FINE) as site, fetcher(site, names) as image_fetcher:
        assert await image_fetcher.fetch(site.url(host="PICS.Example.", scheme="HTTP")) == IMAGE
    assert names.asked == [HOST]


async def test_a_resolver_that_changes_its_answer_is_asked_once() -> None:
    names = Names([[LOOPBACK], ["127.0.0.2"], ["169.254.169.254"]])
    async with serving(FINE) as site, fetcher(site, names) as image_fetcher:
        assert await image_fetcher.fetch(site.url()) == IMAGE
        assert names.asked == [HOST]
        assert HOST in await refusal(image_fetcher, site.url())  # a new fetch looks at the new answer
    assert site.connections == 1


async def test_a_changed_answer_is_checked_again_at_a_redirect() -> None:
    names = Names([[LOOPBACK], ["127.0.0.2"]])
    async with serving(moved("/again")) as site, fetcher(site, names) as image_fetcher:
        assert "not public" in await refusal(image_fetcher, site.url())
    assert site.connections == 1


@pytest.mark.parametrize(
    "addresses",
    words("""
        127.0.0.2 169.254.169.254 100.64.0.1 ::1 ::ffff:169.254.169.254 fe80::1%1 64:ff9b::7f00:1
        127.0.0.1,10.0.0.1 10.0.0.1,127.0.0.1 93.184.215.14,2002:7f00:1::
    """),
)
async def test_one_private_address_is_enough_to_refuse(addresses: str) -> None:
    async with serving(FINE) as site, fetcher(site, Names([addresses.split(",")])) as image_fetcher:
        assert "not public" in await refusal(image_fetcher, site.url())
    assert site.connections == 0


@pytest.mark.parametrize("addresses", [[], ["no address"], ["2130706433"], ["0177.0.0.1"]])
async def test_a_useless_answer_of_the_resolver(addresses: list[str]) -> None:
    async with fetcher(None, Names([addresses])) as image_fetcher:
        assert f"no address was found for {HOST}" in await refusal(image_fetcher, f"http://{HOST}/{SECRET}")


async def test_the_default_resolver_and_its_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def lookup(host: str, port: int, *_: Any, **__: Any) -> Any:
        asked.append((host, port))
        if len(asked) > 1:
            raise socket.gaierror(-2, f"{SECRET} not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    image_fetcher = ImageFetcher(RemoteImages(hosts=(HOST,)), tls=NOBODY)
    assert "not public" in await refusal(image_fetcher, f"https://{HOST}/{SECRET}")
    assert "no address" in await refusal(image_fetcher, f"https://{HOST}/{SECRET}")
    assert asked == [(HOST, 443)] * 2


async def test_an_address_has_to_be_listed_exactly_and_to_be_public() -> None:
    names = Names()
    async with serving(FINE) as site:
        async with fetcher(site, names, hosts=(LOOPBACK,)) as image_fetcher:
            assert await image_fetcher.fetch(site.url(host=LOOPBACK)) == IMAGE
            for other in ("127.0.0.2", "2130706433", "[::ffff:127.0.0.1]", "0177.0.0.1"):
                await refusal(image_fetcher, site.url(host=other))
        async with fetcher(site, names, hosts=("127.0.0.2", "::1")) as image_fetcher:
            assert "not public" in await refusal(image_fetcher, site.url(host="127.0.0.2"))
            assert "not public" in await refusal(image_fetcher, site.url(host="[0::1]"))
    assert names.asked == []
    assert site.connections == 1


async def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    async with serving(FINE) as site:
        settings = RemoteImages(hosts=(HOST,), schemes=("http",), ports=(site.port,), seconds=2)
        names = Names([["127.0.0.3", LOOPBACK], ["127.0.0.3"]])
        image_fetcher = ImageFetcher(settings, names, allowed=lambda address: address.is_loopback, tls=NOBODY)
        assert await image_fetcher.fetch(site.url()) == IMAGE
        assert "no connection" in await refusal(image_fetcher, site.url())


async def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with serving(FINE) as site, fetcher(site) as image_fetcher:
        assert await image_fetcher.fetch(site.url()) == IMAGE


# Redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(status: int) -> None:
    names = Names()
    async with serving({"/a": moved("b?x=1", status), "/b": FINE}) as site, fetcher(site, names) as image_fetcher:
        assert await image_fetcher.fetch(site.url("/a")) == IMAGE
    assert names.asked == [HOST] * 2
    assert site.connections == 2


@pytest.mark.parametrize(
    "location",
    [
        *words("""
        http://169.254.169.254/latest http://127.0.0.1/x //[::1]/x http://2130706433/ http://evil.example/x
        http://pics.example@evil.example/x http://u@pics.example/x http://pics.example:1/x https://pics.example/x
        ftp://pics.example/x file:///etc/passwd http://[ http://\xff/
    """),
        "//" + "a" * 70_000,
    ],
)
async def test_a_redirect_to_elsewhere_is_refused(location: str) -> None:
    names = Names()
    async with serving({"/a": moved(location)}) as site, fetcher(site, names) as image_fetcher:
        await refusal(image_fetcher, site.url("/a"))
    assert names.asked == [HOST]


async def test_a_listed_name_that_resolves_to_a_private_address_behind_a_redirect() -> None:
    names = Names([[LOOPBACK], ["169.254.169.254"]])
    hosts = (HOST, "inner.example")
    async with serving(b"") as site, fetcher(site, names, hosts=hosts) as image_fetcher:
        site.answer = sending(moved(site.url("/x", "inner.example")))
        assert "inner.example has an address that is not public" in await refusal(image_fetcher, site.url("/a"))
    assert names.asked == [HOST, "inner.example"]


@pytest.mark.parametrize("allowed", [0, 1, 3])
async def test_redirects_are_counted(allowed: int) -> None:
    chain = {f"/{step}": moved(f"/{step + 1}") for step in range(5)}
    async with serving({**chain, f"/{allowed}": FINE}) as site, fetcher(site, redirects=allowed) as image_fetcher:
        assert await image_fetcher.fetch(site.url("/0")) == IMAGE
    async with serving({**chain, f"/{allowed + 1}": FINE}) as site, fetcher(site, redirects=allowed) as image_fetcher:
        assert "redirects" in await refusal(image_fetcher, site.url("/0"))
    assert len(site.requests) == allowed + 1


async def test_a_cookie_is_not_sent_back() -> None:
    start = head(302, "Location: /b", "Content-Length: 0", "Set-Cookie: a=b; Path=/")
    async with serving({"/a": start, "/b": FINE}) as site, fetcher(site) as image_fetcher:
        assert await image_fetcher.fetch(site.url("/a")) == IMAGE
        assert await image_fetcher.fetch(site.url("/a")) == IMAGE
    assert all(b"cookie" not in request.lower() for request in site.requests)


# Servers that misbehave


@pytest.mark.parametrize("status", [201, 203, 204, 206, 300, 304, 400, 401, 403, 404, 429, 500, 503])
async def test_only_200_is_an_image(status: int) -> None:
    lines = [] if status in (204, 304) else ["Content-Length: 3"]
    async with serving(head(status, *lines) + b"abc"[: 3 * len(lines)]) as site, fetcher(site) as image_fetcher:
        assert f"{HOST} answered {status}" in await refusal(image_fetcher, site.url())


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "br", "identity, gzip", "deflate", ""])
async def test_compressed_bodies_are_refused(encoding: str) -> None:
    body = gzip.compress(bytes(5_000_000))
    answer = head(200, f"Content-Encoding: {encoding}", f"Content-Length: {len(body)}") + body
    async with serving(answer) as site, fetcher(site) as image_fetcher:
        assert "compressed" in await refusal(image_fetcher, site.url())


async def test_a_compressed_transfer_is_refused_and_identity_is_not() -> None:
    async with (
        serving(head(200, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n") as site,
        fetcher(site) as image_fetcher,
    ):
        assert "transfer" in await refusal(image_fetcher, site.url())
    named = head(200, "Content-Encoding: Identity", "Content-Length: 3") + b"abc"
    async with serving(named) as site, fetcher(site) as image_fetcher:
        assert await image_fetcher.fetch(site.url()) == b"abc"


async def test_the_limit_on_bytes_is_exact() -> None:
    async with serving(FINE) as site:
        async with fetcher(site, max_bytes=len(IMAGE)) as image_fetcher:
            assert await image_fetcher.fetch(site.url()) == IMAGE
        async with fetcher(site, max_bytes=len(IMAGE) - 1) as image_fetcher:
            assert "more than" in await refusal(image_fetcher, site.url())
            site.answer = sending(head(200, "Transfer-Encoding: chunked") + b"%x\r\n%s\r\n0\r\n\r\n" % PIECE)
            assert "more than" in await refusal(image_fetcher, site.url())


async def test_a_body_said_to_be_too_large_is_not_waited_for() -> None:
    async with serving(head(200, "Content-Length: 1001")) as site, fetcher(site, max_bytes=1000) as image_fetcher:
        assert "1,000 bytes" in await refusal(image_fetcher, site.url())  # the server never sends them


async def test_a_content_length_that_is_too_large() -> None:
    async def short(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, "Content-Length: 900") + b"abc")
        writer.close()

    async with serving(short) as site, fetcher(site) as image_fetcher:
        assert "transfer" in await refusal(image_fetcher, site.url())
    async with serving(head(200, "Content-Length: 900") + b"abc") as site, fetcher(site, seconds=0.3) as image_fetcher:
        assert "0.3 s" in await refusal(image_fetcher, site.url())


async def test_a_content_length_that_is_too_small() -> None:
    answer = head(200, "Content-Length: 3") + b"abc" + bytes(100_000)
    async with serving(answer) as site, fetcher(site, max_bytes=10) as image_fetcher:
        assert await image_fetcher.fetch(site.url()) == b"abc"


@pytest.mark.parametrize("length", ["-1", "x", "3, 4", "9" * 5000, "\xb2", "0x10"])
async def test_a_content_length_that_is_no_number(length: str) -> None:
    async with (
        serving(head(200, f"Content-Length: {length}") + b"abc") as site,
        fetcher(site, seconds=0.5) as image_fetcher,
    ):
        await refusal(image_fetcher, site.url())


@pytest.mark.parametrize(
    "lines", [[], ["Transfer-Encoding: chunked"], ["Content-Length: 5", "Transfer-Encoding: chunked"]]
)
async def test_an_endless_body_is_cut_off(lines: list[str]) -> None:
    sent = []

    async def endless(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head(200, *lines))
        while True:
            writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
            sent.append(4096)
            await writer.drain()

    async with serving(endless) as site, fetcher(site, max_bytes=100_000) as image_fetcher:
        assert "100,000 bytes" in await refusal(image_fetcher, site.url())
    assert sum(sent) < 50_000_000  # what the sockets hold, not what the server would send


async def drip_body(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(head(200, "Content-Length: 1000"))
    await drip(b".", writer)


async def drip_head(_: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nA: ")
    await drip(b"a", writer)


async def drip_hints(_: bytes, writer: asyncio.StreamWriter) -> None:
    await drip(b"HTTP/1.1 103 Early Hints\r\n\r\n", writer)


async def drip_redirects(_: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.15)
    writer.write(moved("/next"))


async def drip(piece: bytes, writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("answer", [drip_body, drip_head, drip_hints, drip_redirects])
async def test_the_deadline_is_for_the_whole_fetch(answer: Answer) -> None:
    async with serving(answer) as site, fetcher(site, seconds=0.4, redirects=50) as image_fetcher:
        started = time.perf_counter()
        assert "within 0.4 s" in await refusal(image_fetcher, site.url())
        assert 0.35 < time.perf_counter() - started < 5


async def test_the_deadline_covers_the_resolver() -> None:
    async def slow(_: str, __: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    image_fetcher = ImageFetcher(RemoteImages(hosts=(HOST,), seconds=0.1), slow, tls=NOBODY)
    assert "within 0.1 s" in await refusal(image_fetcher, f"https://{HOST}/{SECRET}")


@pytest.mark.parametrize(
    "answer", [b"no HTTP\r\n\r\n", head(200, f"bad header {SECRET}"), head(200, "A: " + "x" * 300_000), head(101)]
)
async def test_what_is_not_http_is_refused(answer: bytes) -> None:
    async with serving(answer) as site, fetcher(site, seconds=1) as image_fetcher:
        await refusal(image_fetcher, site.url())


@dataclass
class Hanging:
    """Answers with `start`, then sends single bytes until the client disconnects."""

    start: bytes
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, _: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(self.start)
        try:
            await drip(b".", writer)
        finally:
            self.gone.set()


@pytest.mark.parametrize("end", ["cancel", "close"])
async def test_an_ended_fetch_lets_go_of_its_connection(end: str) -> None:
    hanging = Hanging(head(200, "Content-Length: 1000"))
    async with serving(hanging) as site, fetcher(site, seconds=30) as image_fetcher:
        task = asyncio.ensure_future(image_fetcher.fetch(site.url()))
        while not site.requests:
            await asyncio.sleep(0.01)
        if end == "cancel":
            task.cancel()
        else:
            await image_fetcher.aclose()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else ImageError):
            await asyncio.wait_for(task, 5)
        await asyncio.wait_for(hanging.gone.wait(), 5)


@pytest.mark.parametrize("start", [head(404, "Content-Length: 9"), head(200, "Content-Length: 99"), moved("/", 301)])
async def test_a_refused_answer_lets_go_of_its_connection(start: bytes) -> None:
    hanging = Hanging(start)
    async with serving(hanging) as site, fetcher(site, max_bytes=10, redirects=0) as image_fetcher:
        await refusal(image_fetcher, site.url())
        await asyncio.wait_for(hanging.gone.wait(), 5)


# TLS: the connection goes to an address, the certificate is checked for the name


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    pytest.importorskip("cryptography")
    return Authority(tmp_path_factory.mktemp("tls") / "both.pem", HOST)


TLS: dict[str, Any] = {"schemes": ("https",), "hosts": (HOST, "other.example")}


async def test_the_certificate_is_checked_for_the_name(authority: Authority) -> None:
    authority.greeted.clear()
    async with serving(FINE, authority.server) as site, fetcher(site, tls=authority.client, **TLS) as image_fetcher:
        assert await image_fetcher.fetch(site.url(scheme="https")) == IMAGE
        # The same address under another name: no earlier connection may serve it.
        assert "certificate" in await refusal(image_fetcher, site.url(scheme="https", host="other.example"))
        assert await image_fetcher.fetch(site.url(scheme="https", host=f"{HOST}.")) == IMAGE
    assert authority.greeted == [HOST, "other.example", HOST]
    assert len(site.requests) == 2


async def test_a_redirect_to_another_name_at_the_same_address_is_checked_too(authority: Authority) -> None:
    async with serving(FINE, authority.server) as site, fetcher(site, tls=authority.client, **TLS) as image_fetcher:
        site.answer = sending({"/a": moved(site.url("/b", "other.example", "https")), "/b": FINE})
        assert "certificate" in await refusal(image_fetcher, site.url("/a", scheme="https"))
    assert len(site.requests) == 1


async def test_an_unknown_authority_is_not_trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.path))
    async with serving(FINE, authority.server) as site:
        image_fetcher = ImageFetcher(RemoteImages(hosts=(HOST,), ports=(site.port,)), Names(), allowed=here_too)
        assert "certificate" in await refusal(image_fetcher, site.url(scheme="https"))
    assert site.requests == []


async def test_a_silent_address_leaves_time_for_the_next_one(authority: Authority) -> None:
    async with serving(FINE, authority.server) as site, serving(b"", host="127.0.0.4", port=site.port) as silent:
        remote = RemoteImages(hosts=(HOST,), ports=(site.port,), seconds=2)
        names = Names([["127.0.0.4", LOOPBACK]])
        image_fetcher = ImageFetcher(remote, names, allowed=lambda address: address.is_loopback, tls=authority.client)
        assert await image_fetcher.fetch(site.url(scheme="https")) == IMAGE
        assert (silent.connections, silent.requests) == (1, [])


async def test_a_stream_that_breaks_tls(authority: Authority) -> None:
    async def broken(_: bytes, writer: asyncio.StreamWriter) -> None:
        os.write(writer.get_extra_info("socket").fileno(), b"no TLS record at all")
        await asyncio.sleep(0.2)

    async with serving(broken, authority.server) as site, fetcher(site, tls=authority.client, **TLS) as image_fetcher:
        assert "transfer" in await refusal(image_fetcher, site.url(scheme="https"))

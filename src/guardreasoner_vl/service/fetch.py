"""Fetch images from hosts that the operator listed; no URL of a user reaches any other machine.

A host name is resolved once, all its addresses must be public, and the connection goes to a checked address, while the
Host header and the certificate check use the name: a later, different answer of the resolver has no effect. A redirect
is checked like a new URL. The bytes are not decoded here.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import httpx
from pydantic import Field, field_validator

from guardreasoner_vl.errors import ImageError
from guardreasoner_vl.types import Frozen

if TYPE_CHECKING:
    import ssl

Address: TypeAlias = IPv4Address | IPv6Address
Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[str]]]
"""Maps (host, port) to all its addresses, the preferred one first; raises `OSError`."""

_INLINE = "inline the image as a data: URL"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_NAME = 253
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# Many resolvers read a name whose last label is a number as an IPv4 address: 2130706433, 0x7f.1
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)\Z){_LABEL}")

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# `ipaddress` reports these networks as global, in some Python versions or in all.
_REFUSED_V4 = (
    IPv4Network("168.63.129.16/32"),  # the platform services of one cloud, seen from its machines only
    IPv4Network("192.0.0.0/24"),  # protocol assignments; metadata of another cloud
    IPv4Network("192.88.99.0/24"),  # relays to 6to4
)
_REFUSED_V6 = (
    IPv6Network("2001::/23"),  # protocol assignments, Teredo among them, which wraps IPv4 addresses
    IPv6Network("2002::/16"),  # 6to4, which wraps them too
    IPv6Network("3fff::/20"),  # documentation
)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet; an embedded IPv4 address decides for the whole."""
    if isinstance(address, IPv4Address):
        refused = any(address in network for network in _REFUSED_V4)
        return address.is_global and not (address.is_multicast or refused)
    if address.scope_id is not None:
        return False
    if address.ipv4_mapped is not None or address in _NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    refused = any(address in network for network in _REFUSED_V6)
    return address in _GLOBAL_UNICAST and address.is_global and not refused


class RemoteImages(Frozen):
    """What an operator lets the service fetch."""

    hosts: tuple[str, ...] = Field(
        default=(),
        description="Hosts to fetch from: names, `*.example.org` for all names below one, or public IP addresses. "
        "Empty: nothing is fetched.",
    )
    schemes: tuple[Literal["http", "https"], ...] = Field(
        default=("https",), min_length=1, description="Schemes of the addresses that may be fetched."
    )
    max_bytes: int = Field(default=20_000_000, gt=0, description="Largest image in bytes, as it is sent.")
    seconds: float = Field(
        default=10.0, gt=0, allow_inf_nan=False, description="Seconds that one fetch may take, redirects included."
    )
    redirects: int = Field(
        default=3, ge=0, description="Redirects that are followed, each checked like a new address. 0: none."
    )
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(
        default=(443, 80), min_length=1, description="TCP ports that may be connected to."
    )

    @field_validator("hosts")
    @classmethod
    def _canonical_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_host_pattern, hosts))

    def lists(self, host: str) -> bool:
        """Whether a canonical host is listed."""
        return host in self.hosts or any(
            pattern.startswith("*.") and host.endswith(pattern[1:]) for pattern in self.hosts
        )


def _host_pattern(text: str) -> str:
    wildcard = text.startswith("*.")
    try:
        host = _canonical(text.removeprefix("*."))
    except ValueError as error:
        raise ValueError(f"{text!r} is not a host: write example.org, *.example.org or an IP address") from error
    if wildcard and ("." not in host or _NAME.fullmatch(host) is None):
        raise ValueError(f"{text!r} covers too much: name a domain of two labels or more, as in *.example.org")
    return f"*.{host}" if wildcard else host


def _canonical(host: str) -> str:
    """The canonical spelling of a host name or IP address. Raises `ValueError`."""
    host = host.lower().removesuffix(".")
    if len(host) <= _MAX_NAME and _NAME.fullmatch(host):
        return host
    if "%" in host:
        raise ValueError("an address with a zone id is link-local")
    return str(ip_address(host))


@dataclass(frozen=True)
class _Target:
    """A URL that passed all checks except that of its addresses."""

    url: httpx.URL
    host: str
    port: int

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.url.scheme] else f"{host}:{self.port}"


class ImageFetcher:
    """Fetches images from the hosts that the settings list.

    For tests, `allowed` replaces the check of addresses, `tls` the public certificate authorities, and `resolve` the
    system's resolver.
    """

    def __init__(
        self,
        settings: RemoteImages,
        resolve: Resolver | None = None,
        *,
        allowed: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._settings = settings
        self._resolve = resolve or _system_resolver
        self._allowed = allowed
        # The bare transport: no redirects, cookies, proxies or logged URLs. Connections are not reused: one with the
        # certificate of one name would serve another name at the same address.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(verify=tls or True, trust_env=False, limits=limits)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a URL, at most `max_bytes`. Raises `ImageError` for every refusal and failure."""
        # `from None`: the text of a cause quotes the URL and the server.
        try:
            async with asyncio.timeout(self._settings.seconds):
                return await self._follow(url)
        except TimeoutError:
            raise ImageError(f"the image did not come within {self._settings.seconds:g} s: {_INLINE}") from None
        except (httpx.TransportError, httpx.InvalidURL, OSError):
            raise ImageError(f"the transfer of the image failed: try again or {_INLINE}") from None

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def _follow(self, url: str) -> bytes:
        target = self._checked(url)
        for _ in range(self._settings.redirects + 1):
            response = await self._ask(target, await self._addresses(target))
            try:
                if response.status_code not in _REDIRECTS:
                    return await self._body(target, response)
                location = response.headers.get("location", "")
            finally:
                await response.aclose()
            target = self._checked(location, target.url)
        raise ImageError(f"the image is behind more than {self._settings.redirects} redirects: give its own URL")

    def _checked(self, text: str, base: httpx.URL | None = None) -> _Target:
        """Check a URL without the network. Only httpx parses it, so that the checked URL is the one that is fetched."""
        settings = self._settings
        if not settings.hosts:
            raise ImageError(f"remote images are not fetched here: {_INLINE}")
        try:
            url = httpx.URL(text) if base is None else base.join(text)
            host = _canonical(url.raw_host.decode("ascii"))
        except (httpx.InvalidURL, ValueError):
            raise ImageError(f"the image's URL is not valid: write https://host/path or {_INLINE}") from None
        if url.scheme not in settings.schemes:
            raise ImageError(f"images are fetched over {' or '.join(settings.schemes)} only: {_INLINE}")
        if url.userinfo:
            raise ImageError("the image's URL holds a user name: give a URL that needs none")
        if not settings.lists(host):
            raise ImageError(f"images are not fetched from {host}: {_INLINE} or have the operator list the host")
        port = _DEFAULT_PORTS[url.scheme] if url.port is None else url.port
        if port not in settings.ports:
            raise ImageError(f"images are not fetched from this port of {host}: {_INLINE}")
        return _Target(url, host, port)

    async def _addresses(self, target: _Target) -> list[Address]:
        is_name = _NAME.fullmatch(target.host)
        addresses = await self._resolved(target) if is_name else [ip_address(target.host)]
        if not all(map(self._allowed, addresses)):
            raise ImageError(f"{target.host} has an address that is not public: {_INLINE}")
        return addresses

    async def _resolved(self, target: _Target) -> list[Address]:
        try:
            addresses = [ip_address(text) for text in await self._resolve(target.host, target.port)]
        except (OSError, ValueError):
            addresses = []
        if not addresses:
            raise ImageError(f"no address was found for {target.host}: check the URL or {_INLINE}")
        return addresses

    async def _ask(self, target: _Target, addresses: Sequence[Address]) -> httpx.Response:
        """Send the request to the first address that accepts a connection; the response's body is not read yet."""
        headers = {
            "Host": target.authority,
            "User-Agent": "guardreasoner-vl",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        share = self._settings.seconds / len(addresses)  # a silent address leaves time for the next one
        for address in addresses:
            request = httpx.Request(
                "GET",
                target.url.copy_with(host=str(address)),
                headers=headers,
                extensions={"sni_hostname": target.host, "timeout": {"connect": share}},
            )
            try:
                return await self._transport.handle_async_request(request)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        raise ImageError(f"no connection to {target.host}, or no valid certificate: check the URL or {_INLINE}")

    async def _body(self, target: _Target, response: httpx.Response) -> bytes:
        if response.status_code != httpx.codes.OK:
            raise ImageError(f"{target.host} answered {response.status_code}: check that the image is public")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise ImageError(f"{target.host} sent compressed data that was not asked for: {_INLINE}")
        self._check_size(int(response.headers.get("content-length", 0)))
        body = bytearray()
        async for piece in response.aiter_raw():
            self._check_size(len(body) + len(piece))
            body += piece
        return bytes(body)

    def _check_size(self, size: int) -> None:
        if size > self._settings.max_bytes:
            raise ImageError(f"the image has more than {self._settings.max_bytes:,} bytes: shrink or compress it")


async def _system_resolver(host: str, port: int) -> list[str]:
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in entries]

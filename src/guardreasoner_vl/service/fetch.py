"""Images from the web, for an operator who listed the hosts: nothing a user writes reaches any other machine.

A host name is resolved once, all its addresses must be public, and the connection goes to a checked address,
while the Host header and the certificate stay those of the name: a second answer of the resolver changes
nothing. A redirect is a new URL with all checks before it. The bytes are not decoded here.
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
"""All addresses of (host, port), the preferred one first; raises `OSError`."""

_INLINE = "inline the image as a data: URL"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_NAME = 253
_LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
# A last label that is a number makes the whole an IPv4 address for many resolvers: 2130706433, 0x7f.1
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?!(?:[0-9]+|0x[0-9a-f]*)\Z){_LABEL}")

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# `ipaddress` calls these global, in some Python versions or in all.
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
    """Whether an address belongs to the public internet; one that wraps an IPv4 address is judged as that one."""
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
    """What an operator lets the service fetch; with no host it fetches nothing.

    `hosts` are names, `*.example.org` for all names below one, or IP addresses; `seconds` is the deadline of
    a whole fetch, redirects included, and `max_bytes` the limit on its body.
    """

    hosts: tuple[str, ...] = ()
    schemes: tuple[Literal["http", "https"], ...] = Field(default=("https",), min_length=1)
    max_bytes: int = Field(default=20_000_000, gt=0)
    seconds: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    redirects: int = Field(default=3, ge=0)
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] = Field(default=(443, 80), min_length=1)

    @field_validator("hosts")
    @classmethod
    def _canonical_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(_pattern, hosts))

    def lists(self, host: str) -> bool:
        """Whether a canonical host is on the list."""
        return host in self.hosts or any(one.startswith("*.") and host.endswith(one[1:]) for one in self.hosts)


def _pattern(text: str) -> str:
    wildcard = text.startswith("*.")
    try:
        host = _canonical(text.removeprefix("*."))
    except ValueError as error:
        raise ValueError(f"{text!r} is no host: write example.org, *.example.org or an IP address") from error
    if wildcard and ("." not in host or _NAME.fullmatch(host) is None):
        raise ValueError(f"{text!r} covers too much: name a domain of two labels or more, as in *.example.org")
    return f"*.{host}" if wildcard else host


def _canonical(host: str) -> str:
    """The one spelling of a host name or IP address; raises `ValueError`."""
    host = host.lower().removesuffix(".")
    if len(host) <= _MAX_NAME and _NAME.fullmatch(host):
        return host
    if "%" in host:
        raise ValueError("an address with a zone belongs to one machine")
    return str(ip_address(host))


@dataclass(frozen=True)
class _Target:
    """A URL that may be fetched once its addresses are checked."""

    url: httpx.URL
    host: str
    port: int

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.url.scheme] else f"{host}:{self.port}"


class ImageFetcher:
    """Fetches images from the hosts that the settings list.

    `allowed` says which addresses may be connected to, `tls` replaces the public certificate authorities.
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
        # A bare transport: no redirects, cookies, proxies or log of URLs. No connection serves two requests, or
        # one with the certificate of one name would be used for another name at the same address.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._transport = httpx.AsyncHTTPTransport(verify=tls or True, trust_env=False, limits=limits)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind a URL, at most `max_bytes`; raises `ImageError` for all that is refused or fails."""
        # Causes are left out: their texts quote the URL and the server.
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
        """All checks that need no network. What is checked is what is used: httpx alone reads the URL."""
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
        named = _NAME.fullmatch(target.host)
        found = await self._resolved(target) if named else [ip_address(target.host)]
        if not all(map(self._allowed, found)):
            raise ImageError(f"{target.host} has an address that is not public: {_INLINE}")
        return found

    async def _resolved(self, target: _Target) -> list[Address]:
        try:
            found = [ip_address(text) for text in await self._resolve(target.host, target.port)]
        except (OSError, ValueError):
            found = []
        if not found:
            raise ImageError(f"no address was found for {target.host}: check the URL or {_INLINE}")
        return found

    async def _ask(self, target: _Target, addresses: Sequence[Address]) -> httpx.Response:
        """The head of the answer, from the first address that takes the connection."""
        headers = {
            "Host": target.authority,
            "User-Agent": "guardreasoner-vl",
            "Accept": "image/*",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        share = self._settings.seconds / len(addresses)  # so that a silent address leaves time for the next one
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
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]

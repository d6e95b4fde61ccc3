"""Where a request may go: one strict reading of a URL, and checked addresses behind its name.

A name is resolved once a batch, each of its addresses is judged, and the connection is made to an
address that was judged: what the name means a moment later does not matter. Spellings that programs
read differently (backslashes, 0x7f.1, 127.1, user names) are refused, not interpreted.
"""

from __future__ import annotations

import queue
import re
import socket
import threading
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Literal

from selfmoa.errors import RecipeError
from selfmoa.generators.endpoint.failures import TimedOut, Unreachable

Address = IPv4Address | IPv6Address
Place = Literal["loopback", "private", "public", "refused"]

URL = re.compile(
    r"(https?)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*)"
    r"(?::([1-9][0-9]{0,4}))?((?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*)/?"
)
"""Lower-case scheme, name or address, port, path; nothing else is part of a base URL."""
NUMERIC = re.compile(r"(?:.*\.)?(?:[0-9]+|0[xX][0-9A-Fa-f]*)")
"""Hosts that some programs read as an IPv4 address."""
METADATA = frozenset(
    map(
        ip_address,
        "169.254.169.254 100.100.100.200 168.63.129.16 192.0.0.192 fd00:ec2::254 "
        "fd20:ce::254".split(),
    )
)
"""Where cloud machines are told their credentials (AWS, Google, Alibaba, Azure, Oracle)."""
TUNNELS = tuple(map(IPv6Network, ("64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")))
"""IPv6 addresses that stand for an IPv4 address (NAT64, Teredo, 6to4)."""
WHERE = "endpoint, field 'url'"


@dataclass(frozen=True, slots=True)
class Origin:
    """A base URL in parts; `host` without brackets, `path` without a slash at its end."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def shown(self) -> str:
        """The URL as it was meant, and as HTTP names the host."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def authority(self) -> str:
        """Host and, unless it is the scheme's own, port."""
        usual = 443 if self.scheme == "https" else 80
        return _bracketed(self.host) + ("" if self.port == usual else f":{self.port}")

    def at(self, address: Address, path: str) -> str:
        """Return the URL of `path` at one address of the host."""
        return f"{self.scheme}://{_bracketed(str(address))}:{self.port}{self.path}{path}"


def parse(url: str) -> Origin:
    """Return a base URL in parts.

    Raises:
        RecipeError: it is no plain http or https URL. The message does not repeat it, since it may
            hold a password.
    """
    match = URL.fullmatch(url)
    if match is None:
        raise RecipeError(
            WHERE,
            "it is not of the form http(s)://HOST[:PORT][/PATH] (no user name, question mark, "
            "hash or blank; keys belong in the variable that key_env names)",
        )
    scheme, host, port, path = match.groups()
    number = int(port) if port else 443 if scheme == "https" else 80
    if number > 65535:
        raise RecipeError(WHERE, f"{number} is no port")
    host = host.strip("[]").lower()
    if ":" in host or NUMERIC.fullmatch(host):
        try:
            host = str(ip_address(host))
        except ValueError:
            raise RecipeError(WHERE, "its host is no IP address in the usual spelling") from None
    return Origin(scheme, host, number, path or "")


def place(address: Address) -> Place:
    """Return where an address is, "refused" if no server of models can be there."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return place(address.ipv4_mapped)
    if address.is_loopback:
        return "loopback"
    if (
        address in METADATA
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address.is_reserved
        or (isinstance(address, IPv4Address) and int(address) < 1 << 24)
        or any(address in network for network in TUNNELS)
    ):
        return "refused"
    return "public" if address.is_global else "private"


def check(origin: Origin, addresses: list[Address], *, allow_private: bool, has_key: bool) -> None:
    """Refuse an endpoint whose name stands for an address that may not be asked.

    Raises:
        RecipeError: an address is refused, or private without leave; or a key would be sent over
            the internet in clear text.
    """
    for address in addresses:
        seen = f"{origin.host} is" if origin.host != str(address) else "it is"
        where = place(address)
        if where == "refused":
            raise RecipeError(WHERE, f"{seen} at {address}, where no server may be asked")
        if where == "private" and not allow_private:
            raise RecipeError(
                WHERE, f"{seen} at the private address {address}; set allow_private to permit that"
            )
        if where == "public" and has_key and origin.scheme == "http":
            raise RecipeError(WHERE, "the key would be sent in clear text; use https")


def resolve(origin: Origin, timeout: float) -> list[Address]:
    """Return the addresses of the host, at least one.

    The system's resolver has no time limit of its own, so it is asked in a thread that is left
    behind when it is late.

    Raises:
        Unreachable: the name has no address.
        TimedOut: the resolver did not answer within `timeout` seconds.
    """
    try:
        return [ip_address(origin.host)]
    except ValueError:
        pass
    answers: queue.SimpleQueue[list[Address]] = queue.SimpleQueue()
    threading.Thread(target=_look_up, args=(origin, answers), daemon=True).start()
    try:
        found = answers.get(timeout=timeout)
    except queue.Empty:
        raise TimedOut(origin.shown, timeout) from None
    if not found:
        raise Unreachable(origin.shown, f"the name {origin.host} has no address")
    return found


def _look_up(origin: Origin, answers: queue.SimpleQueue[list[Address]]) -> None:
    try:
        found = socket.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        found = []
    answers.put(list(dict.fromkeys(ip_address(str(info[4][0])) for info in found)))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host

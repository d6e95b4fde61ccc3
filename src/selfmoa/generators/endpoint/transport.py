"""One request: sent to a checked address, read within a time and a size, told in typed failures.

Redirects, proxies and settings of the environment are off. Each request has a connection of its
own: what a server that miscounts a reply sends after it can never answer another request.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING

import httpx2

from selfmoa.errors import EndpointError, RecipeError
from selfmoa.generators.endpoint.failures import BadReply, TimedOut, Unreachable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from selfmoa.generators.endpoint.address import Address, Origin

MAX_REPLY = 4 * 1024 * 1024
"""Bytes of a reply that are read: an answer of 4,096 tokens has some 20,000."""
SHOWN = 160
"""Characters of what a server says that an error repeats."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a server sent back; `retry_after` in seconds."""

    status: int
    data: bytes
    retry_after: float | None = None


def read_key(key_env: str | None) -> str | None:
    """Return the API key, from the environment each time: it is kept nowhere.

    Raises:
        RecipeError: the variable is not set, or cannot be a key. The message does not repeat it.
    """
    if key_env is None:
        return None
    key = os.environ.get(key_env, "").strip()
    if not re.fullmatch(r"[!-~]+", key):
        seen = "holds something else than printable ASCII" if key else "is not set"
        raise RecipeError("endpoint, field 'key_env'", f"the environment variable {key_env} {seen}")
    return key


def redacted(text: str, key: str | None) -> str:
    """Return what a server says, on one short line, without control characters or the key."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    plain = plain.replace(key, "[key]") if key else plain
    return plain if len(plain) <= SHOWN else f"{plain[: SHOWN - 4]} ..."


class Line:
    """The way to one endpoint, open during one batch; see `connected`."""

    def __init__(
        self, origin: Origin, addresses: Sequence[Address], key: str | None, timeout: float
    ) -> None:
        self._origin, self._addresses, self._timeout = origin, addresses, timeout
        self._headers = {
            "Host": origin.authority,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "selfmoa",
        } | ({"Authorization": f"Bearer {key}"} if key else {})
        self._client = httpx2.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=None,  # the deadline of `post` is that of connect, write and read together
            verify=_trusted() if origin.scheme == "https" else False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> Line:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def post(self, path: str, body: bytes) -> Reply:
        """Send one request, and return the reply, whatever its status.

        Raises:
            Unreachable: no address takes a connection, or the connection broke.
            TimedOut: there was no whole reply in time.
            BadReply: the reply is too large, or compressed although that was not asked for.
        """
        url = self._origin.shown
        try:
            async with asyncio.timeout(self._timeout):
                for address in self._addresses[:-1]:
                    try:
                        return await self._send(address, path, body)
                    except httpx2.ConnectError:
                        continue  # nothing was sent yet
                return await self._send(self._addresses[-1], path, body)
        except TimeoutError:
            raise TimedOut(url, self._timeout) from None
        except httpx2.ConnectError:
            raise Unreachable(url, "no connection") from None
        except (httpx2.HTTPError, OSError) as error:
            raise Unreachable(url, f"the connection broke ({type(error).__name__})") from None

    async def _send(self, address: Address, path: str, body: bytes) -> Reply:
        request = self._client.stream(
            "POST",
            self._origin.at(address, path),
            content=body,
            headers=self._headers,
            extensions={"sni_hostname": self._origin.host},
        )
        async with request as response:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise self._bad("it is compressed")
            data = bytearray()
            async for part in response.aiter_raw():
                data += part
                if len(data) > MAX_REPLY:
                    raise self._bad(f"it has more than {MAX_REPLY:,} bytes")
            return Reply(response.status_code, bytes(data), _retry_after(response.headers))

    def _bad(self, seen: str) -> EndpointError:
        return BadReply(self._origin.shown, seen)


@cache
def _trusted() -> ssl.SSLContext:
    """Return the authorities that this machine trusts, whatever the environment says."""
    return httpx2.create_ssl_context(trust_env=False)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to be left alone, told as a number or a date."""
    told = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", told):
        return float(told)
    try:
        moment = parsedate_to_datetime(told)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)

"""What can go wrong with an endpoint, by who can mend it.

`is_transient` failures are worth another try. `is_fatal` ones concern every request, so that no
other is sent. The rest concern one request. No message has the API key, or a text that was sent.
"""

from __future__ import annotations

from selfmoa.errors import BadInput, EndpointError


class Unreachable(EndpointError):  # noqa: N818
    """There is no connection, or it broke before a whole reply was read."""

    is_transient = True

    def __init__(self, url: str, seen: str) -> None:
        super().__init__(url, seen, "see whether the server runs, and the url")


class TimedOut(EndpointError):  # noqa: N818
    """A request took longer than it may."""

    is_transient = True

    def __init__(self, url: str, seconds: float) -> None:
        seen = f"no whole reply within {seconds:g} s"
        super().__init__(url, seen, "see whether the server works, or raise its timeout")


class ServerFailed(EndpointError):  # noqa: N818
    """The server reports an error of its own (5xx), or that it is busy (408, 429, 503)."""

    is_transient = True

    def __init__(self, url: str, status: int, seen: str, retry_after: float | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        remedy = "run the same command again later, or lower max_concurrency"
        super().__init__(url, f"status {status} ({seen})", remedy)

    @property
    def is_busy(self) -> bool:
        """Whether fewer requests at once may help."""
        return self.status in (408, 429, 503)


class AccessRefused(EndpointError):  # noqa: N818
    """The server refuses everything: the key, the model or the address is wrong."""

    exit_code = 3
    is_fatal = True

    def __init__(self, url: str, status: int, seen: str, remedy: str) -> None:
        self.status = status
        super().__init__(url, f"status {status} ({seen})", remedy)


class RequestRefused(EndpointError):  # noqa: N818
    """The server refuses this request (another 4xx, or a filter of contents)."""

    exit_code = 5

    def __init__(self, url: str, seen: str) -> None:
        super().__init__(url, f"the request is refused ({seen})", "change it, or leave it out")


class TooLong(RequestRefused):
    """A prompt does not fit the model; `tokens` and `most` where the server tells."""

    def __init__(self, url: str, seen: str, tokens: int | None, most: int | None) -> None:
        self.tokens, self.most = tokens, most
        told = f"it has {tokens} tokens, the model reads {most}" if tokens and most else seen
        super().__init__(url, f"too long: {told}")


class BadReply(EndpointError):  # noqa: N818
    """The server said it succeeded, and its reply cannot be used."""

    def __init__(self, url: str, seen: str) -> None:
        remedy = "see whether the url is that of an OpenAI-compatible server"
        super().__init__(url, f"the reply cannot be used: {seen}", remedy)


class NoLogprobs(EndpointError):  # noqa: N818
    """The server does not say the log-probabilities that are needed."""

    exit_code = 3
    is_fatal = True

    def __init__(self, url: str, seen: str) -> None:
        super().__init__(url, seen, "set options.mode of this judge to 'text'")


class BudgetSpent(EndpointError):  # noqa: N818
    """A budget of the endpoint is used up. What was answered before is kept."""

    exit_code = 3
    is_fatal = True

    def __init__(self, url: str, budget: str, spent: float, limit: float) -> None:
        self.budget = budget
        seen = f"its {budget} is used up ({spent:g} of {limit:g})"
        super().__init__(url, seen, f"raise {budget}, or ask for less")


class Unanswered(BadInput):
    """Some of several draws have no answer; `cause` says why the first of them has none.

    The others are kept: asked again without those, they cost nothing.
    """

    def __init__(self, name: str, row: int, cause: EndpointError) -> None:
        self.cause, self.exit_code = cause, cause.exit_code
        super().__init__(f"draws for {name}", row, str(cause))

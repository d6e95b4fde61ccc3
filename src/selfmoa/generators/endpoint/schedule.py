"""Many requests within limits: how many at once, how often again, how much in all.

The number of requests under way grows by one a round of successes, and is halved when the server
says that it is busy or is late (AIMD, as TCP's congestion avoidance, Chiu and Jain 1989). A request
that failed waits its turn again outside of that number, so that the limit holds for further tries.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

from selfmoa.errors import EndpointError
from selfmoa.generators.endpoint.failures import BudgetSpent, ServerFailed, TimedOut

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from selfmoa.config import Endpoint

START = 2.0
"""Requests at once in the beginning."""
LONGEST_WAIT = 60.0
"""Seconds between two tries at most, also where a server asks for more."""
DOGGED = 2
"""Failed tries in a row, in tries of one request, after which an endpoint is given up."""


@dataclass
class Pace:
    """How many requests may be under way, learnt from how they end; `most` is never exceeded."""

    most: int
    limit: float = field(init=False)
    resume_at: float = field(default=0.0, init=False)
    _cut_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.limit = min(START, float(self.most))

    def succeeded(self) -> None:
        """Note a success."""
        self.limit = min(self.limit + 1 / self.limit, float(self.most))

    def overloaded(self, started: float, now: float) -> None:
        """Note that a request, started at that moment, overloaded the server.

        Requests that started before the last cut tell nothing of the number after it.
        """
        if started >= self._cut_at:
            self.limit, self._cut_at = max(self.limit / 2, 1.0), now


class Budget:
    """What has been spent at an endpoint, in requests, tokens and money."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.requests = self.tokens_in = self.tokens_out = 0

    @property
    def cost(self) -> float:
        """Price of all tokens so far."""
        prices = self._endpoint
        return (self.tokens_in * prices.price_in + self.tokens_out * prices.price_out) / 1e6

    def check(self) -> None:
        """Refuse another request once a budget is used up.

        Raises:
            BudgetSpent: one is.
        """
        limits = self._endpoint
        for name, spent, limit in (
            ("max_requests", self.requests, limits.max_requests),
            ("max_tokens", self.tokens_in + self.tokens_out, limits.max_tokens),
            ("max_cost", self.cost, limits.max_cost),
        ):
            if limit and spent >= limit:
                raise BudgetSpent(limits.url, name, spent, limit)

    def spend(self, tokens_in: int, tokens_out: int) -> None:
        """Note the tokens of a reply."""
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out


@dataclass(eq=False)
class Job:
    """One request to be made: its name, how often it was tried, and when it was last sent."""

    key: str
    ask: Callable[[], Awaitable[Any]]
    tries: int = 0
    started: float = 0.0


class Schedule:
    """Makes the requests of one batch; `answers` and `failures` fill up by key."""

    def __init__(self, jobs: Iterable[Job], pace: Pace, budget: Budget, *, retries: int) -> None:
        self._fresh = deque(jobs)
        self._again: list[tuple[float, int, Job]] = []
        self._running: dict[asyncio.Task[Any], Job] = {}
        self._pace, self._budget, self._retries = pace, budget, retries
        self._in_a_row, self._count = 0, count()
        self.answers: dict[str, Any] = {}
        self.failures: dict[str, EndpointError] = {}
        self.stopped: EndpointError | None = None

    async def run(self, first_wait: float) -> None:
        """Make all requests, or as many as can be; `first_wait` seconds lie before a second try."""
        try:
            while self._fresh or self._again or self._running:
                self._start_ready()
                if self._running:
                    await asyncio.wait(
                        self._running,
                        timeout=self._until_next(),
                        return_when=asyncio.FIRST_COMPLETED,
                    )
                else:
                    await asyncio.sleep(self._until_next() or 0.0)
                for task in [task for task in self._running if task.done()]:
                    self._settle(self._running.pop(task), task, first_wait)
        finally:
            for task in self._running:
                task.cancel()

    def _start_ready(self) -> None:
        now = monotonic()
        while len(self._running) < int(self._pace.limit) and self._next_at(now) <= now:
            try:
                self._budget.check()
            except BudgetSpent as spent:
                self._stop(spent)
                return
            is_again = bool(self._again) and self._again[0][0] <= now
            job = heappop(self._again)[-1] if is_again else self._fresh.popleft()
            self._budget.requests += 1
            job.tries, job.started = job.tries + 1, now
            self._running[asyncio.ensure_future(job.ask())] = job

    def _next_at(self, now: float) -> float:
        """Return the moment from which a request may start, infinite if none waits."""
        ready = now if self._fresh else self._again[0][0] if self._again else math.inf
        return max(ready, self._pace.resume_at)

    def _until_next(self) -> float | None:
        """Return the seconds until a request may start, None if another must end first."""
        now = monotonic()
        moment = self._next_at(now)
        if moment == math.inf or len(self._running) >= int(self._pace.limit):
            return None
        return max(moment - now, 0.0)

    def _settle(self, job: Job, task: asyncio.Task[Any], first_wait: float) -> None:
        try:
            self.answers[job.key] = task.result()
        except EndpointError as error:
            self._failed(job, error, first_wait)
        else:
            self._in_a_row = 0
            self._pace.succeeded()

    def _failed(self, job: Job, error: EndpointError, first_wait: float) -> None:
        now = monotonic()
        if not error.is_transient:
            self._in_a_row = 0
            self.failures[job.key] = error
            if error.is_fatal:
                self._stop(error)
            return
        told = error.retry_after if isinstance(error, ServerFailed) else None
        if isinstance(error, TimedOut) or (isinstance(error, ServerFailed) and error.is_busy):
            self._pace.overloaded(job.started, now)
        if told is not None:
            self._pace.resume_at = max(self._pace.resume_at, now + min(told, LONGEST_WAIT))
        self._in_a_row += 1
        if self._in_a_row >= DOGGED * (self._retries + 1):
            self._stop(error)
        if job.tries > self._retries or self.stopped:
            self.failures[job.key] = error
            return
        wait = first_wait * 2 ** (job.tries - 1) * random.uniform(0.5, 1.0)
        heappush(self._again, (now + min(wait, LONGEST_WAIT), next(self._count), job))

    def _stop(self, why: EndpointError) -> None:
        """Let what is under way finish, and start nothing more."""
        self.stopped = self.stopped or why
        self._fresh.clear()
        self._again.clear()

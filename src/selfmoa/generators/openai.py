"""Generators behind any server that speaks OpenAI's protocol: vLLM, llama.cpp, Ollama, hosted ones.

    model = EndpointGenerator(Endpoint("http://127.0.0.1:8000/v1"), "NAME-AT-SERVER")
    model.generate(draws, sampling)   -> [Response], response i answers draw i
    model.budget.cost                 -> what it has cost so far

One batch is asked at a time, its requests side by side. What a server answered is kept by the
content of the request: after an error, the same batch, or a part of it, pays for the rest alone.
"""

from __future__ import annotations

import asyncio
import math
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

from selfmoa.errors import EndpointError
from selfmoa.generators.endpoint import replies, requests
from selfmoa.generators.endpoint.address import check, parse, resolve
from selfmoa.generators.endpoint.failures import NoLogprobs, RequestRefused, TooLong, Unanswered
from selfmoa.generators.endpoint.schedule import Budget, Job, Pace, Schedule
from selfmoa.generators.endpoint.transport import Line, read_key, redacted
from selfmoa.generators.rows import grouped, responses
from selfmoa.records import canonical_json, content_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from selfmoa.config import Endpoint
    from selfmoa.generators.endpoint.requests import Request
    from selfmoa.protocols import Draw, Sampling
    from selfmoa.records import Message, Response

    Read = Callable[[str, dict[str, Any]], Any]
    Ask = tuple[Request, Read]

KEPT = 10_000
"""Answers that are kept, the latest."""
NEGLIGIBLE = 1e-3
"""Probability of first tokens that a text may begin with, below which it is not looked further."""

LEAST = 1e-12
"""Probability of what is not among the first tokens, where rounding leaves nothing for it."""


class EndpointGenerator:
    """Asks a model at an endpoint; see `protocols.Generator`.

    Raises:
        RecipeError: the endpoint's url cannot be used.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        name: str = "",
        beside: EndpointGenerator | None = None,
        first_wait: float = 0.5,
    ) -> None:
        """Name the model as the server does.

        Args:
            endpoint: where it is, and within which limits it is asked.
            model: its name at the server.
            name: id of the weights, if more is known of them than that name.
            beside: another model at the same endpoint, whose budget and pace this one shares.
            first_wait: seconds before a second try, twice as many before each further one.
        """
        self.endpoint = endpoint
        self.served = model
        self.origin = parse(endpoint.url)
        self.model = name or f"{model}@{content_id('endpoint', self.origin.shown, length=8)}"
        self.pace: Pace = beside.pace if beside else Pace(endpoint.max_concurrency)
        self.budget: Budget = beside.budget if beside else Budget(endpoint)
        self._first_wait = first_wait
        self._kept: dict[str, Any] = {}
        self._failed: dict[str, tuple[float, EndpointError]] = {}
        self._one_batch = threading.Lock()

    def generate(self, draws: Sequence[Draw], sampling: Sampling) -> list[Response]:
        """Answer one batch of draws; temperature 0 is greedy.

        Raises:
            Unanswered: some draws have no answer; the others are kept.
            EndpointError: the endpoint does not answer, refuses, or has used up a budget.
            RecipeError: its address or its key cannot be used.
        """
        asked = [
            requests.answering(self.served, d.prompt.messages, sampling, d.seed) for d in draws
        ]
        answers = self._ask([(request, replies.answer) for request in asked])
        said = [(answer.text, answer.finish_reason) for answer in answers]
        return responses(draws, sampling, self.model, said)

    def logprobs(
        self,
        items: Sequence[tuple[Sequence[Message], str]],
        template: Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Return log p(text | messages) of each item.

        Texts of one token are looked up among the likeliest first tokens of an answer, once for
        all texts that follow one another on the same messages. What is not among them gets the
        most that is left for it: less than any of them. Longer texts are scored after raw messages
        only, where the server echoes a prompt with log-probabilities (vLLM does).

        Raises:
            NoLogprobs: the server does not tell them.
            Unanswered: some prompts have no answer; the others are kept.
            EndpointError: as `generate`.
        """
        prompts, texts = grouped(items)
        asked = [requests.first_token(self.served, messages, template) for messages in prompts]
        tops = self._scored([(request, replies.top_tokens) for request in asked])
        found = [
            [_looked_up(top, text) for text in some] for top, some in zip(tops, texts, strict=True)
        ]
        long = [(i, j) for i, row in enumerate(found) for j, logp in enumerate(row) if logp is None]
        echoes = self._echoed([(prompts[i], texts[i][j]) for i, j in long])
        for (i, j), logp in zip(long, echoes, strict=True):
            found[i][j] = logp
        return [logp for row in found for logp in row if logp is not None]

    def _echoed(self, items: Sequence[tuple[Sequence[Message], str]]) -> list[float]:
        """Return the log-probabilities of texts of several tokens."""
        if any(not requests.is_raw(messages) for messages, _ in items):
            seen = "an answer to be scored has several tokens at this server"
            raise NoLogprobs(self.origin.shown, seen)
        asked = []
        for messages, text in items:
            prompt = requests.raw_text(messages)
            read = partial(replies.echoed, start=len(prompt), end=len(prompt + text))
            asked.append((requests.echo(self.served, prompt, text), read))
        return self._scored(asked)

    def _scored(self, asked: Sequence[Ask]) -> list[Any]:
        try:
            return self._ask(asked)
        except Unanswered as error:
            if isinstance(error.cause, RequestRefused) and not isinstance(error.cause, TooLong):
                raise NoLogprobs(self.origin.shown, error.cause.seen) from error
            raise

    def _ask(self, asked: Sequence[Ask]) -> list[Any]:
        """Return what is found in the reply to each request."""
        if not asked:
            return []
        keys = [content_id(request.path, request.body, length=32) for request, _ in asked]
        with self._one_batch:
            known = self._told_again(keys)
            waiting = dict(zip(keys, asked, strict=True))
            missing = {
                k: ask for k, ask in waiting.items() if k not in self._kept and k not in known
            }
            if missing:
                done = self._sent(missing)
                self._kept |= done.answers
                self._remember(done.failures, len(keys))
                known |= done.failures
                if done.stopped:
                    raise done.stopped
            found = [self._kept[key] if key in self._kept else known[key] for key in keys]
            for key in list(self._kept)[: max(len(self._kept) - KEPT, 0)]:
                del self._kept[key]
        return self._checked(found)

    def _checked(self, found: Sequence[Any]) -> list[Any]:
        """Return what was found, if all of it is answers.

        Raises:
            Unanswered, EndpointError: see `generate`.
        """
        failed = [i for i, answer in enumerate(found) if isinstance(answer, EndpointError)]
        if not failed:
            return list(found)
        first = min(failed, key=lambda i: found[i].is_transient)  # what will not mend itself
        if found[first].is_transient and len(failed) == len(found):
            raise found[first]
        raise Unanswered(self.model, first + 1, found[first]) from found[first]

    def _remember(self, failures: Mapping[str, EndpointError], n: int) -> None:
        """Note failures of a batch of n, to tell them again without asking.

        Those that no further try would mend are told to everybody; others to smaller batches, which
        are parts of this one: a caller looks for the draws without an answer by halving it.
        """
        for key, error in failures.items():
            self._failed[key] = (n if error.is_transient else math.inf, error)

    def _told_again(self, keys: Sequence[str]) -> dict[str, EndpointError]:
        """Return remembered failures, and forget those that are now to be tried again."""
        known = {}
        for key in keys:
            n, error = self._failed.get(key, (0, None))
            if error and len(keys) < n:
                known[key] = error
                self._remember({key: error}, len(keys))
            else:
                self._failed.pop(key, None)
        return known

    def _sent(self, asked: Mapping[str, Ask]) -> Schedule:
        """Send requests, and return what became of them."""
        endpoint, origin = self.endpoint, self.origin
        key = read_key(endpoint.key_env)
        addresses = resolve(origin, endpoint.timeout)
        check(origin, addresses, allow_private=endpoint.allow_private, has_key=key is not None)

        async def all_of_them() -> Schedule:
            async with Line(origin, addresses, key, endpoint.timeout) as line:
                jobs = [
                    Job(name, partial(self._one, line, request, read, key))
                    for name, (request, read) in asked.items()
                ]
                schedule = Schedule(jobs, self.pace, self.budget, retries=endpoint.retries)
                await schedule.run(self._first_wait)
                return schedule

        return asyncio.run(all_of_them())

    async def _one(self, line: Line, request: Request, read: Read, key: str | None) -> Any:
        """Send one request once, and return what `read` finds in the reply."""
        url = self.origin.shown
        body = canonical_json(request.body).encode()
        reply = await line.post(request.path, body)
        seen = redacted(replies.complaint(reply.data), key)
        if error := replies.refusal(url, self.endpoint.key_env, reply, seen):
            raise error
        told = replies.parsed(url, reply.data)
        self.budget.spend(*replies.usage(told, len(body), len(reply.data)))
        return read(url, told)


def _looked_up(top: Mapping[str, float], text: str) -> float | None:
    """Return log p(text) by the likeliest first tokens, None if it may have several tokens."""
    if not text:
        return 0.0
    if text in top:
        return top[text]
    begun = [math.exp(logp) for token, logp in top.items() if token and text.startswith(token)]
    if sum(begun) > NEGLIGIBLE:
        return None
    left = 1 - sum(map(math.exp, top.values()))
    return min(*top.values(), math.log(max(left, LEAST)))

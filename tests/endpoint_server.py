"""A server on loopback that speaks OpenAI's protocol as well, or as badly, as a script says.

A request's fate is a list of acts, one a try: those after `fate:` in the last message, or what
`script` says; after the last of them it is answered well. It is written on raw sockets, since the
replies that matter here are those that a web framework would not send.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections import Counter
from time import monotonic

from selfmoa.config import Endpoint
from selfmoa.generators.openai import EndpointGenerator
from selfmoa.protocols import Draw, Sampling
from selfmoa.records import Prompt, Response

GREEDY = Sampling("greedy", 0.0, 16)

JSON = "application/json"


def message(status, data, headers=(), length=None):
    """Return the bytes of a reply; `length` is what it claims to be."""
    head = [
        f"HTTP/1.1 {status} Said",
        f"Content-Type: {JSON}",
        f"Content-Length: {len(data) if length is None else length}",
        *headers,
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


def completion(text="fine", finish="stop", usage=(7, 3), **choice):
    """Return a chat completion; a field that is None is left out."""
    reply = {"choices": [{"message": {"content": text}, "finish_reason": finish} | choice]}
    if usage:
        reply["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return reply


def good(reply):
    return message(200, json.dumps(reply).encode())


def error(status, text="no", *headers, **more):
    return message(status, json.dumps({"error": {"message": text} | more}).encode(), headers)


FINE = good(completion("the wrong answer"))
BAD = {
    # The network's or the server's fault: worth another try
    "reset": None,
    "stall": None,
    "stall-in-headers": None,
    "stall-in-body": None,
    "drip": None,
    "hang-up": b"",
    "half": message(200, b'{"choices": [{"mess', length=400),
    "half-headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "too-short-for-its-length": message(200, json.dumps(completion()).encode(), length=5000),
    "no-http": b"\x00\xff\x13 hello\r\n\r\n",
    "endless-header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    "bad-chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
    "two-lengths": message(200, b"{}", ["Content-Length: 17"]),
    "429": error(429, "slow down"),
    "429-retry": error(429, "slow down", "Retry-After: 0.001"),
    "429-past": error(429, "slow down", "Retry-After: Fri, 31 Dec 1999 23:59:59 GMT"),
    "429-nonsense": error(429, "slow down", "Retry-After: soon"),
    "408": error(408),
    "500": message(500, b"<html>Internal Server Error</html>"),
    "502": error(502),
    "503": error(503, "loading", "Retry-After: 0"),
    # Replies that no further try would mend
    "too-long-for-its-length": message(200, json.dumps(completion()).encode() + FINE, length=9),
    "five-megabytes": message(200, b'"' + b"a" * 5_000_000 + b'"'),
    "bad-utf8": message(200, b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'),
    "half-a-character": message(
        200, b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'
    ),
    "empty": message(200, b""),
    "no-json": message(200, b"<html>Welcome</html>"),
    "deep": message(200, b"[" * 200_000),
    "long-number": message(200, b'{"choices": ' + b"9" * 10_000 + b"}"),
    "null": message(200, b"null"),
    "list": message(200, b"[]"),
    "string": message(200, b'"choices"'),
    "no-choices": message(200, b"{}"),
    "choices-empty": good({"choices": []}),
    "choices-null": good({"choices": None}),
    "choices-text": good({"choices": "fine"}),
    "choices-numbers": good({"choices": [1, 2]}),
    "message-missing": good({"choices": [{"finish_reason": "stop"}]}),
    "message-list": good({"choices": [{"message": [], "finish_reason": "stop"}]}),
    "text-missing": good(completion(None)),
    "text-number": good(completion(17)),
    "text-list": good(completion([{"type": "text", "text": "fine"}])),
    "finish-missing": good(completion(finish=None)),
    "finish-number": good(completion(finish=3)),
    "finish-list": good(completion(finish=["stop"])),
    "finish-other": good(completion(finish="tool_calls")),
    "filtered": good(completion(finish="content_filter")),
    "compressed": message(200, b"\x1f\x8b\x08", ["Content-Encoding: gzip"]),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "206": message(206, b"{}"),
    "400": error(400, "bad request"),
    "413": error(413),
    "422": message(422, b'{"detail": [{"loc": ["body"], "msg": "field required"}]}'),
    "too-long": error(400, "This model's maximum context length is 40 tokens."),
}
STALLS = ("stall", "stall-in-headers", "stall-in-body", "drip")
TRANSIENT = tuple(BAD)[: tuple(BAD).index("too-long-for-its-length")]
FINAL = tuple(BAD)[len(TRANSIENT) :]
REFUSALS = ("400", "413", "422", "too-long", "filtered")


def asked(body):
    """Return the text that a request asks about."""
    return body["messages"][-1]["content"] if "messages" in body else body["prompt"]


def fate(body):
    """Return the acts that a request names for itself."""
    _, found, acts = asked(body).partition("fate:")
    return acts.split() if found else []


class Server:
    """Runs in a thread while the context is open. All that it saw stays readable afterwards.

    `more` are acts by name: the bytes of a reply.
    """

    def __init__(self, reply=None, script=None, delay=0.0, **more):
        self.reply = reply or (lambda body: completion(f"answer to {asked(body)}"))
        self.script = script or fate
        self.delay = delay
        self.bad = BAD | more
        self.bodies, self.heads, self.paths, self.moments = [], [], [], []
        self.tries, self.finished, self.acts = Counter(), Counter(), Counter()
        self.now = self.most = self.connections = 0
        self.loop = asyncio.new_event_loop()

    def __enter__(self):
        started = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join(10)
        assert not self.thread.is_alive()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def act(self, body, tries):
        """Return what to do about a request that was tried so often before."""
        acts = self.script(body)
        return acts[tries] if tries < len(acts) else "good"

    def _run(self, started):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._serve(started))
        self.loop.close()

    async def _serve(self, started):
        self.stop = asyncio.Event()
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await self.stop.wait()
        server.close()
        others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _talk(self, reader, writer):
        self.connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader, writer):
        """Answer one request; return whether another may come by the same connection."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        data = await reader.readexactly(int(headers["content-length"]))
        body = json.loads(data)
        self.paths.append(first)
        self.heads.append(headers)
        self.bodies.append(body)
        self.moments.append(monotonic())
        tries = self.tries[data]
        self.tries[data] += 1
        act = self.act(body, tries)
        self.acts[act] += 1
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay)
            if act != "good":
                await self._misbehave(act, reader, writer)
        finally:
            self.now -= 1
        if act == "good":
            writer.write(good(self.reply(body)))
            await writer.drain()
            self.finished[data] += 1
        return act in ("good", "too-long-for-its-length")

    async def _misbehave(self, act, reader, writer):
        if act == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif act == "drip":  # a byte now and then, so that no single read takes long
            for byte in FINE:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        elif act in STALLS:
            beginning = {"stall-in-headers": 12, "stall-in-body": len(FINE) - 9}
            writer.write(FINE[: beginning.get(act, 0)])
            await reader.read()  # until the client has enough
        else:
            writer.write(self.bad[act])
            await writer.drain()


# What is asked of it


def user(text):
    return [{"role": "user", "content": text}]


def prompt(messages):
    goal = messages if isinstance(messages, str) else "tea"
    messages = user(messages) if isinstance(messages, str) else messages
    return Prompt.make(messages, goal=goal, intent="benign", category="", source="test")


def draws(n, seed=0):
    return [Draw(prompt(f"tea {i}"), seed) for i in range(n)]


def generator(server, **limits):
    endpoint = Endpoint(url=server.url, **{"timeout": 5.0, "retries": 2} | limits)
    return EndpointGenerator(endpoint, "tiny", first_wait=0.001)


def texts(responses):
    return [r.text for r in responses]


def answer(text):
    return Response(text, "p", text, "m", "s", 0, "stop")

"""A model behind OpenAI's chat API, for one machine and few users: one answer at a time, the others wait.

`transformers serve` is not built on: it writes prompts by a checkpoint's own chat template, where "<|eot_id|>" typed by
a client ends its turn, passes over fields it does not know, fetches links for whoever asks, and has no key or limits.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from itertools import takewhile
from typing import Any
from urllib.parse import urlsplit

from .chat import Counts, MantisChat, sampled, stream
from .chat_request import Asked, Limits, Refusal, read_request
from .errors import MantisError, RecipeError, SampleError
from .models.checkpoint import public_name

try:
    import uvicorn
    from fastapi import Depends, FastAPI, Request
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from starlette.exceptions import HTTPException
except ImportError as error:
    install = "Install it: pip install 'mantis-lite[serve]'."
    raise RecipeError(f"serve: {error.name} is not installed\n  {install}") from None

KEY = "MANTIS_LITE_API_KEY"
"""The variable that holds the key: the words of a command line are anybody's to see."""

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""OpenAI's names of what went wrong, by HTTP's."""

LOG = logging.getLogger(__name__)


def serve(
    model: str,
    overrides: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    bits: int | None = None,
    template: str | None = None,
    system: str | None = None,
    show: Callable[[str], None] = LOG.info,
) -> None:
    """Serve a run, an adapter or a model until it is stopped. Raises RecipeError, OutOfMemory."""
    key = key_for(host)
    with bound(host, port) as listening:
        chat = MantisChat(model, bits, template, system, overrides)
        name = public_name(model)
        app = create_app(chat, name, key, limits or Limits())
        show(f"{name} at http://{host}:{listening.getsockname()[1]}/v1, {'by its key' if key else 'without a key'}")
        with suppress(KeyboardInterrupt):  # which uvicorn has acted on
            server(app).run(sockets=[listening])


def server(app: FastAPI) -> uvicorn.Server:
    """What runs an app; answers that are not done 2 s after it is stopped are cut off."""
    settings: dict[str, Any] = {"log_level": "warning", "ws": "none", "proxy_headers": False}
    return uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=2, **settings))


def key_for(host: str) -> str | None:
    """The key that clients must have, from the environment. Raises RecipeError for a host that needs one."""
    key = os.environ.get(KEY, "").strip() or None
    if key is None and not _is_loopback(host):
        raise RecipeError(
            f"host: {host} can be reached from other machines, and there is no key\n"
            f"  Set {KEY} in the environment, or leave host at 127.0.0.1."
        )
    return key


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens. Raises RecipeError where it cannot: before the weights are loaded, not after."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise RecipeError(f"host and port: {host}:{port}: {error.strerror}\n  Choose another port.") from None
    with listening:
        yield listening


def create_app(chat: MantisChat, name: str, key: str | None, limits: Limits) -> FastAPI:
    """The API of a loaded model that is called `name`; without a key only for this machine's own programs."""
    desk = Desk(chat, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.pool.shutdown)

    async def guard(request: Request) -> None:
        refuse_strangers(request, key)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, dependencies=[Depends(guard)])
    for kind in (MantisError, HTTPException, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_middleware(Drain, most=limits.body)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "mantis-lite"}]}

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        with desk.reading():
            body = await _body(request, limits)
            asked = await asyncio.to_thread(_read, body, name, limits, chat)
            job = desk.begin(asked)
        pieces = job.pieces()
        first = await _unless_gone(request, job, anext(pieces, "") if asked.stream else _whole(pieces))
        if job.error:
            return await _refused(request, job.error)
        if asked.stream:
            return _Stream(job, _events(job, name, first, pieces))
        return JSONResponse(_completion(job, name, first))

    return app


def refuse_strangers(request: Request, key: str | None) -> None:
    """Raise Refusal for a request without the key; where there is none, for one that a web page may have sent.

    A page's own name may lead to this machine (DNS rebinding), which its Host tells; or it sends to this machine's name
    what it may not read the answer of, which has an Origin.
    """
    if key is not None:
        if request.url.path == "/health":
            return
        given = request.headers.get("authorization", "").encode()
        if not secrets.compare_digest(given, f"Bearer {key}".encode()):
            raise Refusal("the API key is wrong, or there is none\n  Send the server's key.", 401, "invalid_api_key")
        return
    if not _is_loopback(_hostname(request.headers.get("host", ""))):
        raise Refusal(f"without a key only this machine is answered\n  Set {KEY} where the server is started.", 403)
    if "origin" in request.headers:
        raise Refusal(f"web pages are not answered\n  Set {KEY} where the server is started.", 403)


class Drain:
    """Takes what a client still sends before it is answered, up to `most` bytes and for 2 s.

    Many read no answer while they send; and a connection that is closed with something unread loses its answer.
    """

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        whole = scope["type"] != "http"

        async def received() -> dict[str, Any]:
            nonlocal whole
            message = await receive()
            whole = whole or not message.get("more_body", False)
            return message

        async def answered(message: dict[str, Any]) -> None:
            left = self.most
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while not whole and left > 0:
                        left -= len((await received()).get("body", b""))
            await send(message)

        await self.app(scope, received, answered)


class Desk:
    """Where requests become jobs, which are done one at a time in their order."""

    def __init__(self, chat: MantisChat, limits: Limits) -> None:
        self.chat, self.limits = chat, limits
        self.inside = 0
        self.pool = ThreadPoolExecutor(1)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A place while a request is read. Raises Refusal where none is left."""
        if self.inside > self.limits.waiting:
            raise Refusal("too many requests are waiting\n  Try again later.", 429, "rate_limit_exceeded")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def begin(self, asked: Asked) -> Job:
        """A job, in a place of its own until it is done."""
        job = Job(asked, asyncio.get_running_loop())
        self.inside += 1
        job.done = self.pool.submit(job.run, self.chat)
        job.done.add_done_callback(lambda _: job.call(self._leave, job))
        return job

    def _leave(self, job: Job) -> None:
        self.inside -= 1
        job.come.put_nowait(None)


class Job:
    """One answer as it is made in the worker's thread, and read in the server's."""

    done: Future[None]

    def __init__(self, asked: Asked, loop: asyncio.AbstractEventLoop) -> None:
        self.asked, self.loop = asked, loop
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        self.counts = Counts()
        self.stopped = False
        """By one of the request's own stops."""
        self.let_go = threading.Event()
        self.come: asyncio.Queue[str | None] = asyncio.Queue()

    def run(self, chat: MantisChat) -> None:
        """Answer, piece by piece, until it is whole or nobody waits for it."""
        asked = self.asked
        with closing(asked):
            if self.let_go.is_set():
                return
            sampling = sampled(asked.sampling)
            pieces = stream(chat.model, chat.encoder, asked.sample, asked.max_tokens, sampling, self.counts)
            with closing(pieces):
                for piece in self._until_stop(takewhile(lambda _: not self.let_go.is_set(), pieces)):
                    self.call(self.come.put_nowait, piece)

    def call(self, function: Callable[[Any], None], value: Any) -> None:
        """Call something in the server's thread, which has ended where the server was stopped meanwhile."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(function, value)

    async def pieces(self) -> AsyncGenerator[str]:
        """What comes, to the end; a reader that goes away before lets go of the job."""
        try:
            while (piece := await self.come.get()) is not None:
                yield piece
        finally:
            self.let_go.set()

    @property
    def error(self) -> BaseException | None:
        """What it failed of."""
        return self.done.exception() if self.done.done() else None

    @property
    def finish(self) -> str:
        return "length" if not self.stopped and self.counts.answer >= self.asked.max_tokens else "stop"

    @property
    def usage(self) -> dict[str, int]:
        prompt, answer = self.counts.prompt, self.counts.answer
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}

    def _until_stop(self, pieces: Iterable[str]) -> Iterator[str]:
        """Text up to the first of the stops, which may begin in one piece and end in another."""
        stops, held = self.asked.stops, ""
        for piece in pieces:
            held += piece
            if found := [at for stop in stops if (at := held.find(stop)) >= 0]:
                self.stopped = True
                yield held[: min(found)]
                return
            begun = (size for stop in stops for size in range(1, len(stop)) if held.endswith(stop[:size]))
            cut = len(held) - max(begun, default=0)
            if cut:
                yield held[:cut]
            held = held[cut:]
        if held:
            yield held


class _Stream(StreamingResponse):
    """Events of a job that is let go of however the stream ends."""

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.let_go.set()


async def _body(request: Request, limits: Limits) -> bytes:
    """The request's bytes, which are not read on where they are too many or take too long. Raises Refusal."""
    too_large = Refusal(f"the request has more than {limits.body:,} bytes\n  Send fewer or smaller pictures.", 413)
    given = request.headers.get("content-length", "")
    if given.isdigit() and int(given) > limits.body:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.body:
                    raise too_large
    except TimeoutError:
        raise Refusal(f"the request was not here within {limits.seconds:g} s\n  Send it again.", 408) from None
    return bytes(body)


def _read(body: bytes, name: str, limits: Limits, chat: MantisChat) -> Asked:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {error}\n  Mend it.") from None
    return read_request(found, name, limits, chat.encoder)


async def _whole(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


async def _unless_gone(request: Request, job: Job, work: Awaitable[str]) -> str:
    """What comes of a job, that is let go of when the client goes away."""
    answer, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise Refusal("the client has gone\n  Ask again.", 499)
        return answer.result()
    finally:
        if not answer.done():
            job.let_go.set()
        answer.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(job: Job, name: str, first: str, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """A stream's events: who speaks, pieces of text, why it ended, and the count of tokens where it is asked for."""
    head = {"id": job.id, "object": "chat.completion.chunk", "created": job.created, "model": name}
    head |= {"usage": None} if job.asked.usage else {}

    def event(delta: dict[str, str], finish: str | None = None) -> str:
        return _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield event({"role": "assistant", "content": first})
    async for piece in pieces:
        yield event({"content": piece})
    if job.error:  # too late for a status
        LOG.error("an answer broke off", exc_info=job.error)
        yield _event(_error_of(500))
        return
    yield event({}, job.finish)
    if job.asked.usage:
        yield _event(head | {"choices": [], "usage": job.usage})
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _completion(job: Job, name: str, text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": job.finish}
    head = {"id": job.id, "object": "chat.completion", "created": job.created, "model": name}
    return head | {"choices": [choice], "usage": job.usage}


async def _refused(request: Request, error: BaseException) -> Response:
    """What went wrong in OpenAI's words; of what is no client's fault nothing but that it was."""
    if isinstance(error, HTTPException):
        return JSONResponse(_error_of(error.status_code, str(error.detail)), error.status_code)
    if isinstance(error, Refusal):
        headers = {"Retry-After": "5"} if error.status == 429 else None
        return JSONResponse(_error_of(error.status, str(error), error.code), error.status, headers)
    if isinstance(error, SampleError):
        return JSONResponse(_error_of(400, str(error)), 400)
    LOG.error("a request failed", exc_info=error)
    return JSONResponse(_error_of(500), 500)


def _error_of(
    status: int, message: str = "the server failed; its own output says of what", code: str | None = None
) -> dict[str, Any]:
    kind = KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

"""The HTTP side: routes, limits on what comes in, headers on what goes out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from calotype.errors import CalotypeError, LimitError
from calotype.service import metrics, openapi, problems
from calotype.service.metrics import Metrics
from calotype.service.operations import CompareQuery, DecodeQuery, EncodeQuery, Engine, InfoQuery, Query, Reply
from calotype.service.problems import BusyError, ParameterError, SlowTransferError, TokenError
from calotype.service.settings import Settings
from calotype.service.workers import Batch, Check, ClientGoneError, Workers

Parameters = TypeVar("Parameters", bound=Query)
Operate = Callable[[Parameters, bytes, Check], Reply]
Batching = Callable[[Parameters, bytes], Batch[Reply] | None]

PAGE = Path(__file__).parent / "page"
CLIENT_GONE = 499
_PIECE = 2**16
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_log = logging.getLogger(__name__)


def _alone(_query: Query, _body: bytes) -> None:
    """The batching of operations that have none."""


def create_app(settings: Settings) -> Starlette:
    """The service as an ASGI app. Nothing is loaded before it starts."""
    workers = Workers(settings.workers, settings.queue, settings.timeout)
    meters = Metrics(workers)
    engine = Engine(settings)
    description = openapi.describe(settings)
    loading: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        nonlocal loading
        loading = asyncio.create_task(asyncio.to_thread(engine.warm_up))
        try:
            yield
        finally:
            await asyncio.wait({loading})
            await workers.close()

    async def ready(_: Request) -> Response:
        if loading is None or not loading.done():
            raise BusyError("the model is being loaded: try again in 1 s", 1)
        if (error := loading.exception()) is not None:
            raise BusyError(f"the model cannot be loaded: {error}", 60)
        return JSONResponse({"status": "ready"})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def models(_: Request) -> Response:
        return JSONResponse(engine.models())

    async def describe(_: Request) -> Response:
        return JSONResponse(description)

    async def show_metrics(_: Request) -> Response:
        return Response(meters.text(), media_type=metrics.MEDIA_TYPE)

    async def page(_: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    def post(
        path: str, query: type[Parameters], operate: Operate[Parameters], batch: Batching[Parameters] = _alone
    ) -> Route:
        return Route(path, Operation(path, query, operate, batch, settings, workers, meters), methods=["POST"])

    routes: list[BaseRoute] = [
        post("/encode", EncodeQuery, engine.encode),
        post("/decode", DecodeQuery, engine.decode, engine.batch),
        post("/compare", CompareQuery, engine.compare),
        post("/info", InfoQuery, engine.info),
        Route("/models", models),
        Route("/health", health),
        Route("/health/ready", ready),
        Route("/metrics", show_metrics),
        Route("/openapi.json", describe),
        Route("/", page),
        Mount("/page", StaticFiles(directory=PAGE)),
    ]
    paths = frozenset(route.path for route in routes if isinstance(route, Route))
    return Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Observer, meters=meters, paths=paths), Middleware(Guard, settings=settings)],
        exception_handlers={
            CalotypeError: problems.of_calotype,
            HTTPException: problems.of_http,
            Exception: problems.of_anything,
        },
    )


class Operation(Generic[Parameters]):
    """A POST: a place in the house, parameters, body, work, answer. An ASGI app, to hold the place to the very end."""

    def __init__(
        self,
        path: str,
        query: type[Parameters],
        operate: Operate[Parameters],
        batch: Batching[Parameters],
        settings: Settings,
        workers: Workers,
        meters: Metrics,
    ) -> None:
        self._path, self._query, self._operate, self._batch = path, query, operate, batch
        self._settings, self._workers, self._meters = settings, workers, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            with self._workers.place():
                response = await self._answer(request)
                await response(scope, receive, send)
        except (ClientDisconnect, ClientGoneError):
            _log.debug("%s: the client has gone", self._path)
        except CalotypeError as error:
            self._meters.rejected.labels(type(error).__name__).inc()
            raise

    async def _answer(self, request: Request) -> Response:
        arrived = time.perf_counter()
        query = self._parameters(request)
        body = await read_body(request, self._settings)
        self._meters.received.labels(self._path).inc(len(body))
        reply, waited = await self._workers.run(
            lambda check: self._operate(query, body, check), _gone(request), self._batch(query, body)
        )
        self._meters.waited.observe(waited)
        self._meters.pixels.labels(self._path).inc(reply.pixels)
        self._meters.sent.labels(self._path).inc(len(reply.body))
        stages = {**reply.seconds, "wait": waited, "total": time.perf_counter() - arrived}
        timing = ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in stages.items())
        headers = {**reply.headers, "Server-Timing": timing, "Cache-Control": "no-store"}
        return SlicedResponse(reply.body, reply.media_type, headers, self._settings.transfer_timeout)

    def _parameters(self, request: Request) -> Parameters:
        given = request.query_params.multi_items()
        try:
            if len(given) > len(dict(given)):
                raise ParameterError("a parameter is given twice: give each once")
            return self._query.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors()[0]
            what, known = first["msg"].removeprefix("Value error, "), ", ".join(self._query.model_fields) or "none"
            if first["type"] == "extra_forbidden":
                what = f"is not a parameter of {self._path}, which takes {known}"
            raise ParameterError(": ".join((*map(str, first["loc"]), what))) from error


async def read_body(request: Request, settings: Settings) -> bytes:
    """The request's body. Raises LimitError as soon as it is too large, SlowTransferError, ClientDisconnect."""
    too_large = LimitError(f"the body is over the limit of {settings.max_body} bytes: send a smaller file")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > settings.max_body:
        raise too_large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(settings.transfer_timeout):
            async for piece in request.stream():
                size += len(piece)
                if size > settings.max_body:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise SlowTransferError(
            f"the body did not arrive within {settings.transfer_timeout:g} s: send a smaller file or use a faster line"
        ) from None
    return b"".join(pieces)


async def _gone(request: Request) -> None:
    """Ends when the client closes the connection; to be awaited after the body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class SlicedResponse(Response):
    """Sends its body in slices, so that a client that does not read leaves no more than a slice in the server."""

    def __init__(self, body: bytes, media_type: str, headers: dict[str, str], seconds: float) -> None:
        super().__init__(body, 200, headers, media_type)
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Left unfinished, the server closes the connection.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                for start in range(0, len(self.body), _PIECE):
                    await send(
                        {
                            "type": "http.response.body",
                            "body": bytes(self.body[start : start + _PIECE]),
                            "more_body": start + _PIECE < len(self.body),
                        }
                    )


class Guard:
    """Asks for the token on every path but the health checks and the page, which hold nothing of value."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._token = None if settings.token is None else f"Bearer {settings.token.get_secret_value()}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token is not None and scope["type"] == "http" and not self._open(scope["path"]):
            request = Request(scope, receive)
            given = request.headers.get("authorization", "").encode("latin-1")
            if not secrets.compare_digest(given, self._token):
                error = TokenError("this service wants a token: send the header Authorization: Bearer TOKEN")
                response = await problems.of_calotype(request, error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    @staticmethod
    def _open(path: str) -> bool:
        return path in ("/", "/health", "/health/ready") or path.startswith("/page/")


class Observer:
    """Counts and times the answers, and puts the same security headers on all of them."""

    def __init__(self, app: ASGIApp, meters: Metrics, paths: frozenset[str]) -> None:
        self._app, self._meters, self._paths = app, meters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = CLIENT_GONE

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-cache")
            await send(message)

        try:
            await self._app(scope, receive, observed)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._meters.requests.labels(path, status).inc()
            self._meters.seconds.labels(path).observe(time.perf_counter() - started)

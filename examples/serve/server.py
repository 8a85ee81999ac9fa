"""The server: what is asked for over HTTP, and how it is answered."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

import stepmask
from serve.masked_pipeline import Cancelled, MaskedPipeline, copies
from serve.metrics import Metrics
from serve.order import FORMATS, Drawn, Order
from serve.pool import Closed, Full, Job, Pool, Taken
from serve.settings import Settings
from stepmask.errors import InvalidConditioning, StepmaskError
from stepmask.schedule.rectify import lower

log = logging.getLogger("serve")

ANSWERS: dict[type[Exception], tuple[HTTPStatus, str]] = {
    Full: (HTTPStatus.TOO_MANY_REQUESTS, "As many requests wait as may. Ask again later"),
    Closed: (HTTPStatus.SERVICE_UNAVAILABLE, "The server is about to stop"),
    Taken: (HTTPStatus.CONFLICT, "There is a request of this id, which has not ended"),
    Cancelled: (HTTPStatus.GONE, "The request was cancelled"),
}


class Server:
    """A pool, and the application that hands it what is asked for over HTTP.

    Args:
        settings: What it is started with; the pipeline is loaded here.

    Raises:
        StepmaskError: The pipeline or its tiers cannot be loaded, or do not belong together.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tiers = stepmask.Tiers.from_pretrained(settings.tiers)
        self.tier = settings.tier or next(iter(self.tiers))
        pipes = copies(settings.loading.load(settings.pipeline), settings.pipelines)
        pipelines = [MaskedPipeline(pipe, self.tiers, self.tier) for pipe in pipes]
        bare_seconds = pipelines[0].bare_seconds(Order.first(pipes[0], settings.steps, settings.prompt))
        log.info("The bare pipeline takes %.3f s for one sample in %d steps", bare_seconds, settings.steps)
        self.pool = Pool(pipelines, settings.waiting, Metrics(self.tiers, settings.steps, bare_seconds))
        self.app = FastAPI(title="stepmask", lifespan=self._lifespan)
        self._route()

    async def generate(self, order: Order, request: Request) -> Response:
        """Draw pictures: a PNG of them side by side, or a NumPy array. Whoever goes away cancels the run."""
        self._check(order)
        job = self.pool.submit(self._completed(order))
        drawn = await self._drawn(job, request)
        body = await asyncio.to_thread(drawn.encoded, order.format)
        return Response(body, media_type=FORMATS[order.format], headers={**drawn.headers, "X-Request-Id": order.id})

    async def cancel(self, name: str) -> Response:
        """Cancel a request, by its id: the run ends with its next step."""
        found = self.pool.cancel(name)
        return Response(status_code=HTTPStatus.ACCEPTED if found else HTTPStatus.NOT_FOUND)

    async def state(self, name: str) -> Response:
        """Where a request is, by its id, until it has ended."""
        state = self.pool.state(name)
        return JSONResponse({"state": state}, HTTPStatus.NOT_FOUND if state is None else HTTPStatus.OK)

    async def health(self) -> Response:
        """Whether requests are taken, and how many there are."""
        told = {"pipelines": len(self.pool.pipelines), "running": self.pool.running, "waiting": self.pool.waiting}
        return JSONResponse(told, HTTPStatus.OK if self.pool.is_healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def tell_tiers(self) -> dict[str, Any]:
        """The tiers by name: for which samplers they have tables, and which share of the MACs these compute."""
        return {
            name: [
                {
                    "sampler": table.sampler.class_name,
                    "steps": table.steps,
                    "macs_share": round(lower(table).macs_share, 4),
                }
                for table in tables
            ]
            for name, tables in self.tiers.items()
        }

    async def metrics(self) -> Response:
        """What is counted, in Prometheus' text format."""
        return Response(self.pool.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _route(self) -> None:
        app = self.app
        app.post("/generate", response_class=Response)(self.generate)
        app.delete("/requests/{name}", response_class=Response)(self.cancel)
        app.get("/requests/{name}", response_class=Response)(self.state)
        app.get("/health", response_class=Response)(self.health)
        app.get("/tiers")(self.tell_tiers)
        app.get("/metrics", response_class=Response)(self.metrics)
        app.add_exception_handler(StepmaskError, _refused)
        for kind in ANSWERS:
            app.add_exception_handler(kind, _answered)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Serve; and when told to stop, after the time that requests have to end, cancel what is left of them."""
        yield
        await asyncio.to_thread(self.pool.close)

    async def _drawn(self, job: Job, request: Request) -> Drawn:
        """What was drawn; the job is cancelled when the client, or the server, goes away before."""
        drawn: asyncio.Future[Any] = asyncio.wrap_future(job.drawn)
        gone: asyncio.Future[Any] = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait([drawn, gone], return_when=asyncio.FIRST_COMPLETED)
            if not drawn.done():
                self.pool.cancel(job.order.id)
            result: Drawn = await drawn
            return result
        except asyncio.CancelledError:
            self.pool.cancel(job.order.id)
            raise
        finally:
            gone.cancel()

    def _check(self, order: Order) -> None:
        """Refuse more samples than are allowed.

        Raises:
            InvalidConditioning: There are more.
        """
        if order.count > self.settings.samples:
            raise InvalidConditioning(
                given=f"{order.count} samples",
                expected=f"at most {self.settings.samples}",
                advice="Ask several times, or start the server with --samples",
            )

    def _completed(self, order: Order) -> Order:
        """The order with the server's settings where it says nothing."""
        own = {"tier": self.tier, "steps": self.settings.steps, "fallback": self.settings.falls_back}
        return order.model_copy(update={name: value for name, value in own.items() if getattr(order, name) is None})


async def _disconnected(request: Request) -> None:
    """Return when the client has gone away. Its message was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(_: Request, error: Exception) -> Response:
    """What the library says to an order that it refuses: 422 for what no pipeline of this kind could do, else 409."""
    assert isinstance(error, StepmaskError)
    unusable = isinstance(error, InvalidConditioning)
    told = {"error": type(error).__name__, "message": str(error), **error.parts}
    return JSONResponse(told, HTTPStatus.UNPROCESSABLE_ENTITY if unusable else HTTPStatus.CONFLICT)


async def _answered(_: Request, error: Exception) -> Response:
    status, message = ANSWERS[type(error)]
    later = {"Retry-After": "1"} if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE) else {}
    return JSONResponse({"error": type(error).__name__, "message": message}, status, headers=later)

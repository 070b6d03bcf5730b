"""create_app: the routes, the errors and the gates around one service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from .. import __version__
from ..backends.errors import ChipsetError
from .auth import OPEN_PATHS, ApiKey
from .body import BodyLimit
from .bugs import Bugs
from .errors import HttpError, WrongField, is_openai, render
from .hosts import LOOPBACK, TrustedHosts, is_loopback
from .routes.openai import openai_routes
from .routes.status import status_routes
from .routes.tgi import tgi_routes
from .service import Service
from .streaming import ClientGone

MAX_PLACE = 200
"""Characters of a field's name that an error repeats: it may be the client's own."""
CLIENT_GONE = 499
"""nginx's status of an answer that nobody reads."""


def create_app(service: Service) -> FastAPI:
    """The app that serves `service`; requests get a 503 until its model is open."""
    app = FastAPI(
        title="chipset",
        version=__version__,
        middleware=_gates(service),
        redirect_slashes=False,
        openapi_url="/openapi.json",
        # its page would load scripts from elsewhere
        docs_url=None,
        redoc_url=None,
    )
    for routes in (openai_routes(service), tgi_routes(service), status_routes(service)):
        app.include_router(routes)
    _answer_errors(app, service)
    return app


def _gates(service: Service) -> Sequence[Middleware]:
    """Outermost first."""
    settings = service.settings
    hosts = LOOPBACK | {settings.host} if is_loopback(settings.host) else None
    gates = [Middleware(TrustedHosts, hosts=hosts)]
    if settings.api_key is not None:
        open_paths = OPEN_PATHS | ({"/metrics"} if settings.public_metrics else set())
        gates.append(Middleware(ApiKey, key=settings.api_key, open_paths=open_paths))
    gates.append(Middleware(BodyLimit, limit=settings.payload_limit))
    gates.append(Middleware(Bugs, metrics=service.metrics))
    return gates


def _answer_errors(app: FastAPI, service: Service) -> None:
    def answer(request: Request, error: Exception) -> Response:
        rendered = render(error, openai=is_openai(request.url.path))
        if request.method == "POST":
            service.metrics.failed(rendered.error_type)
        return rendered.response()

    @app.exception_handler(ChipsetError)
    async def on_error(request: Request, error: ChipsetError) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, _first_fault(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Response:
        kinds = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}
        kind = kinds.get(error.status_code, "http")
        return answer(request, HttpError(error.status_code, kind, error.detail, error.headers))

    @app.exception_handler(ClientGone)
    async def on_gone(_: Request, __: ClientGone) -> Response:
        return Response(status_code=CLIENT_GONE)


def _first_fault(faults: Sequence[Any]) -> ChipsetError:
    """One line about the first fault, without what was sent."""
    fault = faults[0]
    if fault["type"] == "json_invalid":
        return HttpError(400, "bad_request", f"the body is no JSON: {fault['ctx']['error']}")
    place = ".".join(str(part) for part in fault["loc"][1:])[:MAX_PLACE]
    message = fault["msg"]
    return WrongField(place, f"`{place}`: {message}" if place else message)

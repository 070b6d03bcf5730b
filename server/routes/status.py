"""How the server is: /health /ready /info /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ... import __version__
from ..errors import NotReady, render
from ..metrics import CONTENT_TYPE
from ..schemas.status import Info
from ..service import Service, State
from ..streaming import json_response


def status_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["Status"])

    @routes.get("/health")
    async def health() -> Response:
        """200 while the process lives and no engine has ended under it."""
        if service.state in (State.DEAD, State.RESTARTING):
            return render(NotReady("unhealthy"), openai=False).response()
        return Response()

    @routes.get("/ready")
    async def ready() -> Response:
        """200 while requests are served; 503 before the model is loaded, between engines, and once the server ends."""
        if service.state is not State.READY:
            return render(NotReady(service.state.value), openai=False).response()
        return Response()

    @routes.get("/info")
    async def info() -> Response:
        """The model, the limits and what the backend can do."""
        model = service.model()
        settings, limits = service.settings, model.limits
        return json_response(
            Info(
                model_id=model.files.name,
                model_sha=model.files.revision,
                max_concurrent_requests=settings.max_concurrent_requests,
                max_stop_sequences=limits.max_stop_sequences,
                max_top_n_tokens=limits.max_top_n_tokens,
                max_input_tokens=limits.max_input_tokens,
                max_total_tokens=limits.max_total_tokens,
                max_client_batch_size=limits.max_client_batch_size,
                version=__version__,
                engine=model.generator.engine.ready,
            )
        )

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE)

    return routes

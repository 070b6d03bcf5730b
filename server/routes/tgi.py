"""The native dialect: /generate, /generate_stream and / (either, by its field `stream`)."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..schemas.tgi import CompatRequest, GenerateRequest
from ..service import Service
from ..streaming import EventStream, guarded, json_response, unless_gone
from ..unbuilt import NATIVE, refuse_unbuilt
from .tgi_answers import Native, native_job


def tgi_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["Native"])

    @routes.post("/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue a text."""
        return await whole(body, request, full_text=False, in_list=False)

    @routes.post("/generate_stream")
    async def generate_stream(body: GenerateRequest) -> Response:
        """Continue a text, an event a token. Errors, too, are events of a 200."""
        return stream(body, full_text=False)

    @routes.post("/")
    async def compatible(body: CompatRequest, request: Request) -> Response:
        """Either of the two; the prompt is part of the text unless return_full_text is false."""
        if body.stream:
            return stream(body, full_text=True)
        return await whole(body, request, full_text=True, in_list=True)

    async def whole(
        body: GenerateRequest, request: Request, *, full_text: bool, in_list: bool
    ) -> Response:
        service.metrics.received()
        # full means 429 before any other check, as in TGI
        with service.admit():
            answer = await prepare(body, full_text=full_text, streams=False)
            generated = await unless_gone(request.receive, answer.whole())
        return json_response(
            [generated] if in_list else generated, answer.headers(service.compute_type)
        )

    def stream(body: GenerateRequest, *, full_text: bool) -> Response:
        service.metrics.received()

        async def frames() -> AsyncGenerator[bytes, None]:
            with service.admit():
                answer = await prepare(body, full_text=full_text, streams=True)
                async with aclosing(answer.frames()) as events:
                    async for one in events:
                        yield one

        headers = {
            "x-compute-type": service.compute_type,
            "x-compute-characters": str(len(body.inputs)),
        }
        return EventStream(guarded(frames(), service.metrics, openai=False), headers=headers)

    async def prepare(body: GenerateRequest, *, full_text: bool, streams: bool) -> Native:
        model = service.model()
        fields = body.parameters.model_extra if body.parameters else None
        refuse_unbuilt(fields, NATIVE)
        job = native_job(body, model.limits, streams=streams)
        generation = await model.generator.prepare(job)
        return Native(body, model, generation, full_text=full_text)

    return routes

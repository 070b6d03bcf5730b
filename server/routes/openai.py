"""OpenAI's dialect: /v1/chat/completions, /v1/completions, /v1/models."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..schemas.openai import ChatRequest, CompletionRequest, ModelCard, ModelList
from ..service import Service
from ..streaming import EventStream, guarded, json_response, unless_gone
from ..unbuilt import CHAT, COMPLETION, refuse_unbuilt
from .openai_answers import Chat, Completion
from .openai_jobs import chat_job, completion_jobs


def openai_routes(service: Service) -> APIRouter:
    """The routes over one service."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service.metrics.received()
        model = service.model()
        refuse_unbuilt(body.model_extra, CHAT)
        with service.admit() as ticket:
            job = await chat_job(body, model)
            generation = await model.generator.prepare(job)
            answer = Chat(body, model, generation)
            if body.stream:
                frames = guarded(answer.frames(), service.metrics, openai=True)
                return EventStream(frames, ticket.keep())
            return json_response(await unless_gone(request.receive, answer.whole()))

    @routes.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue one text or several."""
        service.metrics.received()
        model = service.model()
        refuse_unbuilt(body.model_extra, COMPLETION)
        jobs = completion_jobs(body, model)
        with service.admit(len(jobs)) as ticket:
            generations = [await model.generator.prepare(job) for job in jobs]
            answer = Completion(body, model, generations)
            if body.stream:
                frames = guarded(answer.frames(), service.metrics, openai=True)
                return EventStream(frames, ticket.keep())
            return json_response(await unless_gone(request.receive, answer.whole()))

    @routes.get("/v1/models")
    async def models() -> Response:
        """The served model; requests may call it what they like."""
        model = service.model()
        card = ModelCard(
            id=model.files.name,
            created=model.created,
            owned_by=model.files.name,
            max_model_len=model.limits.max_total_tokens,
        )
        return json_response(ModelList(data=[card]))

    return routes

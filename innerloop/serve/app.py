"""The web application: a page and an HTTP API over one meta-trained model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from torch import Tensor

from innerloop import __version__
from innerloop.classify.weighing import Weighing
from innerloop.data.depth import bits_of, misfit, misfits
from innerloop.serve.answers import Adapted, Failure, Health, Info, LimitsInfo, ModelInfo, Predicted, Prediction
from innerloop.serve.gate import Gate
from innerloop.serve.guard import LOOPBACK, Guard
from innerloop.serve.kept import Kept
from innerloop.serve.limits import Limits, RefusedError, plural
from innerloop.serve.uploads import AdaptRequest, PredictRequest, decode, read_queries, read_support

if TYPE_CHECKING:
    from innerloop.classify import Adaptation, MetaTrained
    from innerloop.data import Preprocessing

STATIC = Path(__file__).parent / "static"

DESCRIPTION = """\
Adapts a meta-trained model to a few examples of each class, and classifies with it. An adaptation is answered with an
id; predictions name it. Errors are `{"error": "one sentence"}`.
"""


def create_app(trained: MetaTrained, limits: Limits | None = None, hosts: frozenset[str] | None = LOOPBACK) -> FastAPI:
    """The application, for any ASGI server.

    Args:
        trained: what ``innerloop.load`` gives.
        limits: bounds on requests.
        hosts: the host names that requests may be addressed to; None for any. See ``Guard``.
    """
    bounds = limits or Limits()
    if not trained.any_ways:
        bounds = replace(bounds, classes=min(bounds.classes, trained.config.data.ways))
    gate = Gate(bounds)
    kept: Kept[tuple[Adaptation, Preprocessing]] = Kept(bounds)
    # The usual pages of documentation load their scripts from a CDN.
    app = FastAPI(title="innerloop", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, hosts=hosts)
    _answer_errors(app)

    @app.get("/api/health", tags=["server"])
    async def health() -> Health:
        """Whether the server is up."""
        return Health(version=__version__, classifiers=len(kept))

    @app.get("/api/info", tags=["server"])
    async def info() -> Info:
        """The model that is served, and the bounds on requests."""
        return Info(version=__version__, model=_model_info(trained, bounds), limits=_limits_info(bounds))

    @app.post(
        "/api/adapt",
        tags=["classifiers"],
        openapi_extra=_body_of(AdaptRequest, "Files in fields named after their class."),
        responses=_failures(400, 413, 415, 422, 503),
    )
    async def adapt(
        request: Request,
        steps: int | None = Query(None, description="Inner steps; by default those of the model."),
        weighing: Weighing | None = Query(None, description="What counts the same; by default every class."),  # noqa: B008
        bits: int | None = Query(
            None, ge=8, le=16, description="That values of 16-bit images use; by default those of the model, or found."
        ),
    ) -> Adapted:
        """Adapt the model to examples of at least two classes. The answer's id names the classifier from then on."""
        if steps is not None and not 1 <= steps <= bounds.steps:
            raise RefusedError(422, f"steps must be between 1 and {bounds.steps}, not {steps}.")
        support = await read_support(request, bounds)

        def adapted() -> tuple[tuple[Adaptation, Preprocessing], list[float], list[float], list[str]]:
            known = trained.preprocessing.bits if bits is None else bits
            read = decode(
                [u for uploads in support.values() for u in uploads],
                replace(trained.preprocessing, bits=known),
                bounds,
            )
            images = iter(read.pixels)
            by_class = {name: [next(images) for _ in uploads] for name, uploads in support.items()}
            with _in_words():
                how: dict[str, Any] = {} if weighing is None else {"weighing": weighing}
                how |= {} if read.bits is None else {"bits": read.bits}
                adaptation = trained.adaptation(by_class, steps=steps, **how)
                losses, accuracies = adaptation.support_losses.tolist(), adaptation.support_accuracies.tolist()
            _, notes = bits_of(read.largest, known)
            made = adaptation, replace(trained.preprocessing, bits=read.bits)
            return made, losses, accuracies, [*notes, *adaptation.notes]

        made, losses, accuracies, notes = await gate.run(adapted)
        adaptation, _ = made
        if not all(map(math.isfinite, losses)):
            raise RefusedError(422, "The inner loop diverged on these examples; take fewer steps or other examples.")
        return Adapted(
            id=kept.keep(made, _size(adaptation)),
            classes=list(adaptation.classes),
            steps=adaptation.steps,
            weighing=weighing or "classes",
            support_losses=losses,
            support_accuracies=accuracies,
            notes=notes,
        )

    @app.post(
        "/api/predict/{id}",
        tags=["classifiers"],
        openapi_extra=_body_of(PredictRequest, "Files in fields of any name."),
        responses=_failures(400, 404, 413, 415, 422, 503),
    )
    async def predict(id: str, request: Request) -> Predicted:
        """Class probabilities of images after each inner step."""
        adaptation, preprocessing = kept.get(id)
        uploads = await read_queries(request, bounds)

        def probabilities() -> tuple[Tensor, list[str]]:
            # A classifier that knows of no 16-bit images takes all of their bits: an answer is its image's own.
            read = decode(uploads, replace(preprocessing, bits=preprocessing.bits or 16), bounds)
            other = sum(misfit(largest, preprocessing.bits) for largest in read.largest)
            with _in_words():
                notes = [misfits(plural(other, "image"), preprocessing.bits)] if other else []
                return adaptation.probabilities(read.pixels), notes

        found, notes = await gate.run(probabilities)
        by_step = found.transpose(0, 1)  # [n, K+1, ways]
        classes = list(adaptation.classes)
        predictions = [_prediction(classes, image.tolist()) for image in by_step]
        return Predicted(classes=classes, predictions=predictions, notes=notes)

    @app.delete("/api/classifiers/{id}", tags=["classifiers"], status_code=204, responses=_failures(404))
    async def forget(id: str) -> Response:
        """Forget a classifier and the examples it was made from."""
        kept.drop(id)
        return Response(status_code=204)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    return app


@contextmanager
def _in_words() -> Iterator[None]:
    """The library's own words on what it was given: its ValueErrors are written for people."""
    try:
        yield
    except ValueError as error:
        message = str(error)
        raise RefusedError(422, message if message.endswith(".") else f"{message}.") from error


def _prediction(classes: list[str], by_step: list[list[float]]) -> Prediction:
    last = by_step[-1]
    return Prediction(
        answer=classes[last.index(max(last))], probabilities=dict(zip(classes, last, strict=True)), by_step=by_step
    )


def _size(adaptation: Adaptation) -> int:
    """Bytes that keeping an adaptation takes: the weights after every inner step."""
    return sum(tensor.nbytes for theta in adaptation.fast_weights for tensor in theta.values())


def _model_info(trained: MetaTrained, limits: Limits) -> ModelInfo:
    data = trained.config.data
    return ModelInfo(
        preset=trained.preset,
        dataset=data.dataset,
        ways=data.ways,
        shots=data.shots,
        most_classes=limits.classes,
        inner_steps=trained.config.test_steps,
        image_size=trained.preprocessing.size,
        channels=trained.preprocessing.channels,
    )


def _limits_info(limits: Limits) -> LimitsInfo:
    known = asdict(limits)
    return LimitsInfo(**{name: known[name] for name in LimitsInfo.model_fields})


def _body_of(model: type[AdaptRequest] | type[PredictRequest], multipart: str) -> dict[str, Any]:
    """How OpenAPI says that a body is JSON or multipart; the handlers read it themselves, within the limits."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": model.model_json_schema()},
                "multipart/form-data": {
                    "schema": {"type": "object", "description": multipart, "additionalProperties": files}
                },
            },
        }
    }


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Failure} for status in statuses}


def _failure(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": message}, status, headers)


def _answer_errors(app: FastAPI) -> None:
    """Every error as one sentence in JSON. What nobody foresaw is the guard's."""

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return _failure(error.status, error.message, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        return _failure(422, f"{first['loc'][-1]}: {first['msg']}, not {str(first['input'])[:100]!r}.")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        known = {
            404: f"There is nothing at {request.url.path[:100]!r}.",
            405: f"{request.method} is not possible here.",
        }
        return _failure(error.status_code, known.get(error.status_code, str(error.detail)), error.headers)

"""What the server answers, as types: the JSON of the API and its OpenAPI description."""

from __future__ import annotations

from pydantic import BaseModel, Field

from innerloop.classify.weighing import Weighing


class Failure(BaseModel):
    """Any answer that is not a success."""

    error: str = Field(description="What went wrong and how to mend it, in a sentence for a person.")


class Health(BaseModel):
    """The server is up."""

    status: str = "ok"
    version: str = Field(description="Of innerloop.")
    classifiers: int = Field(description="Kept at the moment.")


class ModelInfo(BaseModel):
    """The meta-trained model."""

    preset: str = Field(description="What it was meta-trained as.")
    dataset: str
    ways: int = Field(description="Classes of a task in meta-training.")
    shots: int = Field(description="Examples of each class in meta-training.")
    most_classes: int = Field(description="That it can be adapted to.")
    inner_steps: int = Field(description="K, the inner steps that are taken unless the request says otherwise.")
    image_size: int = Field(description="Images are resized to this height and width in pixels.")
    channels: int = Field(description="1: images become grey; 3: RGB.")


class LimitsInfo(BaseModel):
    """The bounds on requests."""

    upload_bytes: int
    images: int
    image_pixels: int
    classes: int
    steps: int
    name_length: int
    kept: int
    idle_seconds: float


class Info(BaseModel):
    """What is served."""

    version: str
    model: ModelInfo
    limits: LimitsInfo


class Adapted(BaseModel):
    """A classifier, adapted to a support set in K inner steps."""

    id: str = Field(description="For /api/predict/{id}. It cannot be guessed; whoever has it can use the classifier.")
    classes: list[str]
    steps: int = Field(description="K, inner steps taken.")
    weighing: Weighing = Field(description="What counts the same in adapting and in the figures here.")
    support_losses: list[float] = Field(
        description="Cross-entropy on the support set after 0, 1, ..., K inner steps, weighed so."
    )
    support_accuracies: list[float] = Field(
        description="Share of the support set that is right after each step, weighed so."
    )
    notes: list[str] = Field(description="What a person may want to know, such as that dark ink was turned over.")


class Prediction(BaseModel):
    """What the classifier says of one image."""

    answer: str = Field(description="The most probable class.")
    probabilities: dict[str, float] = Field(description="Of every class, after the last inner step.")
    by_step: list[list[float]] = Field(
        description="Probabilities after 0, 1, ..., K inner steps, in the order of `classes`."
    )


class Predicted(BaseModel):
    """What the classifier says of each image."""

    classes: list[str]
    predictions: list[Prediction]
    notes: list[str] = Field(description="Such as that images are brighter than those the classifier was made from.")

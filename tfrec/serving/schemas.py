"""Schemas: what requests may hold, and how answers look."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

Id = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Seconds = Annotated[float, Field(ge=0, lt=1e11, description="seconds since 1970")]
Shelf = Literal["for_you", "because", "new_to_you", "popular"]
MAX_INT = 1_000_000


def _whole(told: Any) -> Any:
    """10.0 as 10: JSON knows one kind of number."""
    return int(told) if isinstance(told, float) and told.is_integer() else told


SHELVES: tuple[Shelf, ...] = get_args(Shelf)


class Body(BaseModel):
    """A body of a request: unknown keys are refused, and so is ``"5"`` or true for a number."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


class Past(Body):
    """An event of a history that a request brings along."""

    item_id: Id
    event: str = Field("", max_length=64)
    value: float | None = None
    timestamp: Seconds | None = None


class Context(Body):
    """Where and when somebody asks; what the models do not read is logged alone."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    time: Seconds | None = None
    device: str | None = Field(None, max_length=256)
    place: str | None = Field(None, max_length=256)


class RecommendBody(Body):
    """What one person asks for."""

    user_id: Id | None = None
    history: list[Id | Past] = Field(default_factory=list)
    profile: str | None = None
    context: Context | None = None
    k: Annotated[int, BeforeValidator(_whole)] = Field(10, ge=1, le=MAX_INT)
    exclude: list[Id] = Field(default_factory=list)
    include: list[Id] = Field(default_factory=list)
    filters: dict[str, list[str]] = Field(default_factory=dict)
    diversity: float | None = Field(None, ge=0, le=1)
    explain: bool = False


class ShelvesBody(RecommendBody):
    """The same, for several lists at once."""

    shelves: list[Shelf] = Field(default_factory=lambda: list(SHELVES), min_length=1)


class EventBody(Body):
    """What somebody did with an item."""

    event_id: Id
    user_id: Id
    item_id: Id
    event: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    timestamp: Seconds | None = None
    value: float | None = None


class ItemBody(Body):
    """An item to put."""

    title: str = Field(min_length=1)
    text: str = ""
    attributes: dict[str, str | list[str]] = Field(default_factory=dict)


class ImportedItem(ItemBody):
    """An item of an import."""

    item_id: Id


class ActivateBody(Body):
    """The share of users that a version gets; the others keep what they have."""

    share: float = Field(1.0, gt=0, le=1)


class Problem(BaseModel):
    """What went wrong."""

    code: str
    message: str
    field: str | None = None


class Failed(BaseModel):
    """An answer with a status of 400 or above."""

    error: Problem
    request_id: str


class Scored(BaseModel):
    """A recommended item."""

    item_id: str
    title: str
    score: float
    source: Literal["behaviour", "text", "popular", "new", "exploration"]
    attributes: dict[str, list[str]]
    parts: dict[str, float]
    propensity: float
    explanation: dict[str, Any] | None = None


class Items(BaseModel):
    """Recommended items, best first."""

    items: list[Scored]
    model_version: str
    request_id: str

"""Openapi: the description of the server's paths, as others generate clients from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import tfrec
from tfrec.config import ServeConfig
from tfrec.serving import schemas

Model = type[BaseModel] | None
Path = tuple[str, str, str, Model, Model]
"""Method, path, what it does, the body that it takes and the answer that it gives."""

_REF = "#/components/schemas/"
_ID = {"type": "string", "maxLength": 512, "pattern": r"^[^\u0000]+$"}
_K = {"type": "integer", "minimum": 1, "default": 10}
_USER = {"type": "string", "maxLength": 512}
_QUERIES: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/search": {"q": {"type": "string", "pattern": r"\S"}, "k": _K, "user_id": _USER},
    "/v1/popular": {"k": _K, "user_id": _USER},
    "/v1/items/{item_id}/similar": {"k": _K, "user_id": _USER},
    "/v1/users": {
        "limit": {"type": "integer", "minimum": 1, "maximum": 999_999_999, "default": 50},
        "q": _USER,
    },
}


def document(paths: Sequence[Path], limits: ServeConfig) -> dict[str, Any]:
    """The description of these paths with a server's limits, OpenAPI 3.1."""
    described: dict[str, dict[str, Any]] = {}
    used: dict[str, type[BaseModel]] = {"Failed": schemas.Failed}
    for method, path, about, body, answer in paths:
        place = path.replace(":path}", "}")
        used |= {model.__name__: model for model in (body, answer) if model is not None}
        described.setdefault(place, {})[method.lower()] = _operation(
            method, place, about, body, answer
        )
    _, defined = models_json_schema(
        [(model, "validation") for model in used.values()], ref_template=_REF + "{model}"
    )
    told = {
        "openapi": "3.1.0",
        "info": {"title": "tfrec", "version": tfrec.__version__},
        "paths": described,
        "components": {"schemas": defined["$defs"]},
    }
    _limited(told, limits)
    return told


def _limited(described: dict[str, Any], limits: ServeConfig) -> None:
    """Writes a server's limits into its description."""
    known = described["components"]["schemas"]
    for name in ("RecommendBody", "ShelvesBody"):
        columns = known[name]["properties"]
        columns["k"]["maximum"] = limits.max_k
        columns["profile"]["anyOf"][0]["maxLength"] = limits.max_text
        for column in ("history", "exclude", "include"):
            columns[column]["maxItems"] = limits.max_ids
    for name in ("ItemBody", "ImportedItem"):
        for column in ("title", "text"):
            known[name]["properties"][column]["maxLength"] = limits.max_text
    for path, operations in described["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                if parameter["name"] == "k":
                    parameter["schema"]["maximum"] = limits.max_k
                if parameter["name"] == "q" and path == "/v1/search":
                    parameter["schema"]["maxLength"] = limits.max_text
    events = described["paths"]["/v1/events"]["post"]["requestBody"]["content"]
    events["application/json"]["schema"]["anyOf"][1]["maxItems"] = limits.max_bulk


def _operation(method: str, path: str, about: str, body: Model, answer: Model) -> dict[str, Any]:
    told: dict[str, Any] = {
        "summary": " ".join(about.split()),
        "responses": _answers(method, path, answer),
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _ID}
        for name in ("item_id", "user_id", "version")
        if "{" + name in path
    ]
    for name, schema in _QUERIES.get(path, {}).items():
        needed = (path, name) == ("/v1/search", "q")
        parameters.append({"name": name, "in": "query", "required": needed, "schema": dict(schema)})
    if parameters:
        told["parameters"] = parameters
    if body is not None:
        told["requestBody"] = _body(body)
    return told


def _body(body: type[BaseModel]) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": _REF + body.__name__}
    kind = "application/json"
    if body is schemas.EventBody:
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    if body is schemas.ImportedItem:
        about = "one object of ImportedItem on each line"
        kind, schema = "application/x-ndjson", {"type": "string", "description": about}
    needed = body not in (schemas.ActivateBody, schemas.ImportedItem)
    return {"required": needed, "content": {kind: {"schema": schema}}}


def _answers(method: str, path: str, answer: Model) -> dict[str, Any]:
    schema = {"$ref": _REF + answer.__name__} if answer is not None else {"type": "object"}
    good: dict[str, Any] = {
        "description": "done",
        "content": {"application/json": {"schema": schema}},
    }
    if path == "/metrics":
        good["content"] = {"text/plain": {"schema": {"type": "string"}}}
    failed = {"schema": {"$ref": _REF + "Failed"}}
    created = {"201": good} if method == "PUT" else {}
    error = {"description": "an error", "content": {"application/json": failed}}
    return {"200": good, **created, "default": error}

"""The OpenAPI description, made from the same models that check the requests."""

from __future__ import annotations

from typing import Any

from calotype import __version__
from calotype.container import ImageInfo
from calotype.service.operations import (
    CLT,
    MEDIA_TYPES,
    CompareQuery,
    DecodeQuery,
    EncodeQuery,
    InfoQuery,
    Query,
)
from calotype.service.problems import MEDIA_TYPE as PROBLEM
from calotype.service.problems import Problem
from calotype.service.settings import Settings

Schema = dict[str, Any]

_BYTES: Schema = {"type": "string", "format": "binary"}
_PICTURE = "A JPEG, PNG, WebP, TIFF, BMP, AVIF or PPM file; its type is told from its bytes."
_STREAM = "A `.clt` file."
_NUMBERS: Schema = {"type": "string", "pattern": "^[0-9]+(,[0-9]+)*$"}
_FACTS: dict[str, tuple[str, Schema]] = {
    "Calotype-Quality": ("The quality that was used.", {"type": "number"}),
    "Calotype-Bpp": ("Bits per pixel of the file.", {"type": "number"}),
    "Calotype-Psnr": (
        "PSNR in dB over the colour channels, where it is known; inf for equal pictures.",
        {"type": "string", "pattern": "^(inf|[0-9]+([.][0-9]+)?)$"},
    ),
    "Calotype-Width": ("Pixels.", {"type": "integer"}),
    "Calotype-Height": ("Pixels.", {"type": "integer"}),
    "Calotype-Damaged-Tiles": ("Numbers of the tiles, or packets of them, that were filled in.", _NUMBERS),
    "Calotype-Lost-Packets": ("Numbers of the packets that were dropped and restored.", _NUMBERS),
    "Server-Timing": ("Milliseconds by stage, of waiting for a worker, and in all.", {"type": "string"}),
}
_PROBLEMS = {
    "400": "A parameter of the query is unknown or out of range.",
    "401": "The bearer token is missing or wrong.",
    "404": "No such model.",
    "408": "The body took too long.",
    "413": "The body, or its picture, is over the limit.",
    "422": "The body is not what it should be, is damaged, or a target cannot be reached.",
    "503": "The service is full; Retry-After tells when to try again.",
    "504": "The work took too long.",
}


def _parameters(query: type[Query]) -> list[Schema]:
    schema = query.model_json_schema()
    found = []
    for name, field in schema["properties"].items():
        field = {k: v for k, v in field.items() if k != "title"}
        if "anyOf" in field:  # a query has no null: a parameter that is None was not given
            (given,) = (option for option in field.pop("anyOf") if option.get("type") != "null")
            field.pop("default", None)
            field |= given
        entry: Schema = {"name": name, "in": "query", "required": name in schema.get("required", ())}
        if "description" in field:
            entry["description"] = field.pop("description")
        found.append(entry | {"schema": field})
    return found


def _problem(status: str) -> Schema:
    answer: Schema = {
        "description": _PROBLEMS[status],
        "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
    if status == "503":
        answer["headers"] = {
            "Retry-After": {"schema": {"type": "integer"}, "description": "Seconds.", "required": True}
        }
    return answer


def _problems(*statuses: str, token: bool) -> Schema:
    return {s: _problem(s) for s in sorted({*statuses, *(["401"] if token else [])})}


def _post(
    name: str, summary: str, query: type[Query], body: str, answers: dict[str, Schema], facts: list[str], token: bool
) -> Schema:
    headers = {fact: {"description": _FACTS[fact][0], "schema": _FACTS[fact][1]} for fact in (*facts, "Server-Timing")}
    ok = {
        "description": "Done.",
        "headers": headers,
        "content": {media_type: {"schema": schema} for media_type, schema in answers.items()},
    }
    statuses = ["400", "404", "408", "413", "422", "503", "504"]
    return {
        "post": {
            "operationId": name,
            "summary": summary,
            "description": " ".join((query.__doc__ or "").split()),
            "parameters": _parameters(query),
            "requestBody": {
                "required": True,
                "description": body,
                "content": {"application/octet-stream": {"schema": _BYTES}},
            },
            "responses": {"200": ok, **_problems(*statuses, token=token)},
        }
    }


def _get(name: str, summary: str, answer: Schema, *problems: str, token: bool, open_: bool = False) -> Schema:
    operation: Schema = {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": answer},
            **_problems(*problems, token=token and not open_),
        },
    }
    if open_:
        operation["security"] = []
    return {"get": operation}


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def describe(settings: Settings) -> Schema:
    """The OpenAPI 3.1 document of a service with these settings."""
    token = settings.token is not None
    status: Schema = _json(
        {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]},
    )
    model: Schema = {
        "type": "object",
        "properties": {
            **{name: {"type": "string"} for name in ("name", "architecture", "summary", "sha256")},
            "id": {"type": "integer"},
        },
        "required": ["name", "id", "architecture", "summary", "sha256"],
    }
    models: Schema = {
        "type": "object",
        "properties": {"default": {"type": "string"}, "models": {"type": "array", "items": model}},
        "required": ["default", "models"],
    }
    size = ["Calotype-Width", "Calotype-Height"]
    filled = ["Calotype-Damaged-Tiles", "Calotype-Lost-Packets"]
    rate = ["Calotype-Quality", "Calotype-Bpp", "Calotype-Psnr", *size]
    pictures = dict.fromkeys(MEDIA_TYPES.values(), _BYTES)
    anchors = {MEDIA_TYPES[kind]: _BYTES for kind in ("avif", "webp", "jpeg")}
    paths = {
        "/encode": _post("encode", "Encode a picture", EncodeQuery, _PICTURE, {CLT: _BYTES}, rate, token),
        "/decode": _post(
            "decode", "Decode a file", DecodeQuery, _STREAM, pictures, [*size, *filled], token
        ),
        "/compare": _post(
            "compare", "Encode a picture with another codec at a size", CompareQuery, _PICTURE, anchors, rate, token
        ),
        "/info": _post(
            "info", "Read what a file says about itself", InfoQuery, _STREAM,
            {"application/json": {"$ref": "#/components/schemas/ImageInfo"}}, [], token,
        ),
        "/models": _get("models", "List the models", _json(models), token=token),
        "/metrics": _get("metrics", "Metrics for Prometheus", {"text/plain": {"schema": {"type": "string"}}},
                         token=token),
        "/health": _get("health", "Is the process alive?", status, token=token, open_=True),
        "/health/ready": _get("ready", "Is the model loaded?", status, "503", token=token, open_=True),
        "/openapi.json": _get("openapi", "This description", _json({"type": "object"}), token=token),
    }  # fmt: skip
    components: Schema = {
        "schemas": {
            "Problem": Problem.model_json_schema(),
            "ImageInfo": ImageInfo.model_json_schema(mode="serialization"),
        }
    }
    document: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "Calotype",
            "version": __version__,
            "description": f"A neural image codec. Bodies have at most {settings.max_body} bytes and pictures "
            f"{settings.max_pixels} pixels; a request is worked on for {settings.timeout:g} s at most.",
        },
        "paths": paths,
        "components": components,
    }
    if token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document

"""The JSON schema of job files: what an editor needs to complete, explain and check them."""

from __future__ import annotations

from typing import Any

from .config import JobConfig
from .terms.tasks import KINDS, PICTURE_FIELDS
from .terms.values import REQUEST_COLUMNS


def job_schema() -> dict[str, Any]:
    """The schema of `JobConfig`, with the names of request fields where a job uses them as keys."""
    schema = JobConfig.model_json_schema(by_alias=True)
    own = [name for kind in KINDS.values() for name in kind.fields]
    plain = list(dict.fromkeys([*REQUEST_COLUMNS, *own]))
    named = {
        "defaults": plain,
        "columns": [*plain, *PICTURE_FIELDS, "latents", "model"],
        "templates": ["prompt", "negative_prompt", *PICTURE_FIELDS],
    }
    for key, names in named.items():
        schema["properties"][key]["propertyNames"] = {"enum": names}
    actors = schema["$defs"]["Workers"]["properties"]["actors"]
    actors["anyOf"].append({"type": "string", "pattern": r"^\s*\d+\s*-\s*\d+\s*$"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "diffray job"}

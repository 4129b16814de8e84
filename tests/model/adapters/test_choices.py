"""Which adapters an image asks for: columns, bodies, prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from diffray.model import AdapterChoice, ImageRequest, InvalidRequest, adapter_choices, prompt_adapters
from diffray.model.adapters.choices import adapter_tags, check_known
from diffray.model.infotext import infotext, parse_infotext

TWO = (AdapterChoice("style", 0.8), AdapterChoice("my face_1.5+", 1.0))


@pytest.mark.parametrize(
    "value",
    [
        TWO,
        "style:0.8, my face_1.5+",
        ["style:0.8", "my face_1.5+"],
        [("style", 0.8), ["my face_1.5+", 1]],
        [{"name": "style", "weight": 0.8}, {"name": "my face_1.5+"}],
        ({"name": "style", "weight": np.float64(0.8)}, {"name": "my face_1.5+", "weight": None}),
        np.array([{"name": "style", "weight": 0.8}, {"name": "my face_1.5+", "weight": 1.0}]),
        pa.array([[{"name": "style", "weight": 0.8}, {"name": "my face_1.5+", "weight": 1.0}]])[0].as_py(),
    ],
)
def test_forms(value: Any) -> None:
    assert adapter_choices(value) == TWO
    assert ImageRequest(adapters=value).adapters == TWO


@pytest.mark.parametrize(
    ("value", "wanted"), [(None, ()), ("", ()), ([], ()), ({"name": "x"}, (("x", 1.0),))]
)
def test_none_and_one(value: Any, wanted: Any) -> None:
    assert adapter_choices(value) == wanted
    assert adapter_choices(AdapterChoice("x")) == (("x", 1.0),)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "../x",
            "/abs",
            "a\0b",
            ".hidden",
            "x" * 129,
            "a/b",
            "a\\b",
            "é",
            "a<b",
            " ,x",
            "x:y",
            "x:0.1:0.2",
            "x:",
        ),
        *("x:nan", "x:inf", "x:10.1", "x:1e400", "x,x", [("x", True)], [("x", "1")], [("x", 10**400)]),
        *(
            5,
            b"x",
            [None],
            [{"weight": 1}],
            [{"name": "x", "path": "/etc"}],
            [("x", 1, 2)],
            [(1, "x")],
            ["x", 0.5],
        ),
        [("x", 0.0), ("x", 1.0)],
        [f"x{n}" for n in range(33)],
    ],
)
def test_refusals(value: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^adapters: .*allowed") as caught:
        ImageRequest(adapters=value)
    assert caught.value.field == "adapters"


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a fox", ("a fox", ())),
        ("a fox <lora:x:0.5>", ("a fox", (("x", 0.5),))),
        ("<lora:x> a fox", ("a fox", (("x", 1.0),))),
        ("a <lora:x:-1>, (red:1.2) <lyco:y:2>fox", ("a, (red:1.2)fox", (("x", -1.0), ("y", 2.0)))),
        ("a<lora:x:0.5:0.5>", ("a", (("x", 0.5),))),
        ("a<lora:x:te=0.5:unet=0.5>", ("a", (("x", 0.5),))),
        ("a <b> <hypernet:x:1>", ("a <b> <hypernet:x:1>", ())),
    ],
)
def test_prompts(prompt: str, wanted: Any) -> None:
    assert prompt_adapters(prompt) == wanted


@pytest.mark.parametrize(
    "tag",
    ["x:0.5:0.6", "x:te=1:unet=0", "x:1:1:8", "x:dyn=8", "../x:1", ":1", "x:much", "x:11", "x:1><lora:x:1"],
)
def test_tags_that_cannot_be_followed(tag: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompt_adapters(f"a fox <lora:{tag}>")
    assert caught.value.field == "prompt"


def test_unknown_names() -> None:
    check_known(TWO, ["style", "my face_1.5+"])
    with pytest.raises(InvalidRequest, match="adapters: got 'style', allowed is one of a, b"):
        check_known(TWO, ["a", "b"])


@pytest.mark.parametrize("weight", [0.8, -1.0, 1 / 3, 1e-7, 10.0])
def test_infotext_there_and_back(weight: float) -> None:
    request = ImageRequest(prompt="a fox,\nred", adapters=[("b c", weight), ("a", 1.0)], steps=1, seed=3)
    text = infotext(request, adapter_hashes={"a": "0123456789abcdef", "z": "f" * 64})
    found = parse_infotext(text)
    assert prompt_adapters(found["Prompt"]) == (request.prompt, request.adapters)
    assert found["Lora hashes"] == "a: 0123456789"
    assert "Lora hashes" not in parse_infotext(infotext(ImageRequest(prompt="a fox")))
    assert adapter_tags(()) == ""
    assert parse_infotext(infotext(ImageRequest(adapters=TWO)))["Prompt"].startswith(
        "<lora:style:0.8><lora:my"
    )


def test_parameters_there_and_back() -> None:
    request = ImageRequest(adapters=TWO)
    assert request.parameters()["adapters"][0] == {"name": "style", "weight": 0.8}
    assert ImageRequest(**request.parameters()) == request
    assert hash(ImageRequest(adapters=list(TWO))) == hash(request)

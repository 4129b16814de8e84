"""Adapters in the service: each dialect's way to name them, over HTTP, with LoRA files for the embedded model."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import webuiapi
from PIL import Image
from typer.testing import CliRunner

from diffray.cli.app import app
from diffray.cli.serve import _worn
from diffray.model import CheckpointError, ImageRequest
from diffray.model.encoding import read_provenance
from diffray.model.infotext import parse_infotext
from diffray.serve.config import InvalidConfig, Memory, ServeConfig
from diffray.serve.engines import Engines
from diffray.serve.work import Finished, Work

from .ask import Answer, ask
from .live import Live, live
from .loras import write_lora

IMAGES = "/v1/diffray/images"
BODY = {"prompt": "a red circle", "seed": 5, "steps": 4}
WEBUI = {"prompt": "a red circle", "seed": 5, "steps": 4, "width": 64, "height": 64, "cfg_scale": 3.0}
NAMES = ["ink 2.0", "watercolour"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two adapters, and of something else."""
    place = tmp_path_factory.mktemp("secret-place") / "loras"
    for seed, name in enumerate(NAMES):
        write_lora(place / f"{name}.safetensors", seed)
    (place / "notes.txt").write_text("nothing")
    return place


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[Live]:
    """The embedded model with adapters, and once more without."""
    models = {"embedded": {"adapters": str(folder)}, "bare": {}}
    with live(ServeConfig.checked({"models": models, "log": "off"})) as running:
        yield running


@pytest.fixture
def webui(service: Live) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{service.url}/sdapi/v1", sampler="DPM++ 2M", scheduler="Automatic")


@pytest.fixture
def sdk(service: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def images(service: Live, **body: Any) -> Answer:
    return ask(service.url + IMAGES, BODY | body)


def made(service: Live, **body: Any) -> dict[str, Any]:
    """The first image of the native answer."""
    answer = images(service, **body)
    assert answer.status == 200, answer.data
    found: dict[str, Any] = answer.json["images"][0]
    return found


def wearing(service: Live, *names: str, **body: Any) -> bytes:
    """The file with these adapters at 0.8."""
    chosen = [{"name": name, "weight": 0.8} for name in names]
    return base64.b64decode(made(service, adapters=chosen, **body)["image"])


def pixels(data: bytes | str) -> bytes:
    data = data if isinstance(data, bytes) else base64.b64decode(data)
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def steps_done(service: Live) -> float:
    lines = ask(service.url + "/metrics").data.decode().splitlines()
    return sum(
        float(line.rpartition(" ")[2]) for line in lines if line.startswith("diffray_step_seconds_count")
    )


# ---- what they do ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_adapter_changes_the_picture_and_weight_0_does_not(service: Live, folder: Path) -> None:
    plain, worn = made(service), made(service, adapters=[{"name": "watercolour", "weight": 0.8}])
    assert pixels(plain["image"]) != pixels(worn["image"])
    assert worn["parameters"]["adapters"] == [{"name": "watercolour", "weight": 0.8}]
    checksum = hashlib.sha256((folder / "watercolour.safetensors").read_bytes()).hexdigest()
    assert worn["adapter_checksums"] == {"watercolour": checksum}
    none = made(service, adapters=[{"name": "watercolour", "weight": 0}])
    assert none["image"] == plain["image"]
    assert none["adapter_checksums"] == {}
    assert made(service, model="bare")["parameters"]["adapters"] == []
    assert pixels(made(service, model="bare")["image"]) == pixels(plain["image"])


def test_strangers_with_different_adapters_get_what_they_get_alone(service: Live) -> None:
    kinds = [(), ("ink 2.0",), ("watercolour",), ("watercolour", "ink 2.0")]
    alone = [wearing(service, *names) for names in kinds]
    assert len({pixels(data) for data in alone}) == len(kinds)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda names: wearing(service, *names), kinds * 2))
    assert together == alone * 2


def test_a_job_has_them(service: Live) -> None:
    body = BODY | {"adapters": [{"name": "watercolour", "weight": 0.8}]}
    job = ask(service.url + "/v1/diffray/jobs", body).json["id"]
    address = f"{service.url}/v1/diffray/jobs/{job}"
    for _ in range(600):
        state = ask(address).json
        if state["status"] != "running":
            break
        time.sleep(0.1)
    assert state["images"][0]["adapter_checksums"].keys() == {"watercolour"}
    assert ask(f"{address}/images/0").data == wearing(service, "watercolour")


# ---- dialects ----------------------------------------------------------------------------------------------


def test_lists_name_them_and_no_place(service: Live, sdk: openai.OpenAI, webui: webuiapi.WebUIApi) -> None:
    catalogue = ask(service.url + "/v1/diffray/models")
    assert {m["name"]: m["adapters"] for m in catalogue.json["models"]} == {"embedded": NAMES, "bare": []}
    listed = {model.id: (model.model_extra or {})["adapters"] for model in sdk.models.list()}
    assert listed == {"embedded": NAMES, "bare": []}
    loras = webui.get_loras()
    assert [lora["name"] for lora in loras] == [lora["alias"] for lora in loras] == NAMES
    assert loras[0].keys() == {"name", "alias", "path", "metadata"}
    for said in (catalogue.data.decode(), json.dumps(loras)):
        assert "secret-place" not in said
    webui.util_set_model("bare")
    assert webui.get_loras() == []
    webui.util_set_model("embedded")


@pytest.mark.parametrize(
    "lora",
    [
        {"name": "watercolour", "scale": 0.8},
        [{"name": "ink 2.0", "scale": 0.8}, {"name": "watercolour", "scale": 0.8}],
        [],
    ],
)
def test_openai_s_extension(service: Live, sdk: openai.OpenAI, lora: Any) -> None:
    names = [one["name"] for one in ([lora] if isinstance(lora, dict) else lora)]
    extra = {"lora": lora, "seed": 5, "num_inference_steps": 4}
    answer = sdk.images.generate(prompt="a red circle", extra_body=extra)
    assert answer.data
    assert base64.b64decode(answer.data[0].b64_json or "") == wearing(service, *names)
    source = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(source, "PNG")
    file = ("image.png", source.getvalue(), "image/png")
    edited = sdk.images.edit(image=file, prompt="a red circle", extra_body=extra | {"strength": 0.9})
    start = base64.b64encode(source.getvalue()).decode()
    wanted = wearing(service, *names, init_image=start, strength=0.9)
    assert edited.data
    assert base64.b64decode(edited.data[0].b64_json or "") == wanted
    form = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 4, "strength": 0.9}
    sent = requests.post(
        f"{service.url}/v1/images/edits",
        data=form | {"lora": json.dumps(lora)},
        files={"image": file},
        timeout=60,
    )
    assert base64.b64decode(sent.json()["data"][0]["b64_json"]) == wanted


def test_tags_of_webui_prompts(service: Live, webui: webuiapi.WebUIApi, folder: Path) -> None:
    plain = webui.txt2img(**WEBUI)
    tagged = webui.txt2img(**WEBUI | {"prompt": "a red <lora:watercolour:0.8> circle"})
    common = {"steps": 4, "guidance_scale": 3.0, "sampler": "DPM++ 2M", "schedule": "automatic"}
    assert tagged.image.tobytes() == pixels(wearing(service, "watercolour", **common))
    assert tagged.image.tobytes() != plain.image.tobytes()
    both = webui.txt2img(**WEBUI, negative_prompt="<lyco:watercolour:0.8> <lora:ink 2.0:0.8>")
    assert both.image.tobytes() == pixels(wearing(service, *NAMES, **common))
    none = webui.txt2img(**WEBUI | {"prompt": "a red circle <lora:watercolour:0>"})
    assert none.image.tobytes() == plain.image.tobytes()
    text = tagged.image.info["parameters"]
    assert tagged.info["infotexts"] == [text]
    assert tagged.info["prompt"] == "a red <lora:watercolour:0.8> circle"
    found = parse_infotext(text)
    assert found["Prompt"] == "a red circle <lora:watercolour:0.8>"
    checksum = hashlib.sha256((folder / "watercolour.safetensors").read_bytes()).hexdigest()
    assert found["Lora hashes"] == f"watercolour: {checksum[:10]}"
    again = webui.txt2img(**WEBUI | {"prompt": found["Prompt"]})
    assert again.image.tobytes() == tagged.image.tobytes()


def test_webui_pictures_that_are_composed_here_say_them_too(webui: webuiapi.WebUIApi) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (8, 8, 40, 40))
    result = webui.img2img(
        images=[Image.new("RGB", (64, 64), "blue")],
        mask_image=mask,
        prompt="a star <lora:watercolour:0.8>",
        steps=3,
        width=64,
        height=64,
        seed=1,
    )
    provenance = read_provenance(base64.b64decode(webui_file(result)))
    assert provenance.parameters is not None
    assert provenance.parameters["adapters"] == [{"name": "watercolour", "weight": 0.8}]
    assert "Lora hashes" in parse_infotext(provenance.infotext or "")


def webui_file(result: Any) -> str:
    return str(result.json["images"][0])


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_unknown_names_are_each_dialect_s_own_error_and_cost_no_step(
    service: Live, sdk: openai.OpenAI, webui: webuiapi.WebUIApi
) -> None:
    before = steps_done(service)
    native = images(service, adapters=[{"name": "oil"}])
    assert native.status == 422
    assert native.json["error"]["field"] == "adapters"
    assert "allowed is one of ink 2.0, watercolour" in native.json["error"]["message"]
    bare = images(service, model="bare", adapters=[{"name": "watercolour"}])
    assert (bare.status, bare.json["error"]["field"]) == (422, "adapters")
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.images.generate(prompt="x", extra_body={"lora": {"name": "oil"}})
    assert caught.value.param == "lora"
    assert "ink 2.0, watercolour" in caught.value.message
    with pytest.raises(RuntimeError) as refused:
        webui.txt2img(**WEBUI | {"prompt": "a fox <lora:oil:0.8>"})
    status, text = refused.value.args
    assert (status, json.loads(text)["field"]) == (422, "prompt")
    assert "ink 2.0, watercolour" in json.loads(text)["detail"]
    assert steps_done(service) == before


def test_a_file_that_changed_costs_only_those_who_want_it(tmp_path: Path) -> None:
    for seed, name in enumerate(NAMES):
        write_lora(tmp_path / f"{name}.safetensors", seed)
    config = ServeConfig.checked({"models": {"embedded": {"adapters": str(tmp_path)}}, "log": "off"})
    with live(config) as changing:
        write_lora(tmp_path / "new", 9).replace(tmp_path / "ink 2.0.safetensors")
        refused = images(changing, adapters=[{"name": "ink 2.0"}])
        assert (refused.status, refused.code) == (503, "adapter_unavailable")
        assert str(tmp_path) not in refused.data.decode()
        worn = made(changing, adapters=[{"name": "watercolour"}])
        assert worn["adapter_checksums"].keys() == {"watercolour"}
        assert made(changing)


PATHS = [
    "../watercolour",
    "/etc/passwd",
    "loras/watercolour",
    "C:\\x",
    "file:///x",
    ".hidden",
    "a\0b",
    "",
    " ",
]


@pytest.mark.parametrize(
    "adapters",
    [
        *([{"name": name}] for name in [*PATHS, "x" * 300, "watercolour.safetensors", "Watercolour"]),
        *([{"name": "watercolour", "weight": weight}] for weight in ("1", True, None, 10.5, -11, [1], {})),
        "watercolour",
        {"name": "watercolour"},
        [["watercolour", 1]],
        ["watercolour"],
        [{}],
        [{"name": 5}],
        [{"name": "watercolour", "path": "/etc/passwd"}],
        [{"name": "watercolour"}, {"name": "watercolour", "weight": 0.5}],
        [{"name": f"a{i}"} for i in range(33)],
    ],
)
def test_mistakes_are_the_client_s(service: Live, adapters: Any) -> None:
    answer = images(service, adapters=adapters)
    assert answer.status == 422, answer.data
    assert answer.json["error"]["field"].startswith("adapters")
    assert len(answer.json["error"]["message"]) < 500
    lora = adapters
    if isinstance(adapters, list):
        renamed = {"weight": "scale"}
        lora = [
            {renamed.get(k, k): v for k, v in one.items()} if isinstance(one, dict) else one
            for one in adapters
        ]
    if lora != {"name": "watercolour"}:
        said = ask(f"{service.url}/v1/images/generations", {"prompt": "x", "lora": lora})
        assert said.status == 400, said.data
        assert said.json["error"]["param"].startswith("lora")


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("<lora:../../etc/passwd:1>", "name"),
        (f"<lora:{'x' * 300}:1>", "name"),
        ("<lora:watercolour:much>", "weight"),
        ("<lora:watercolour:nan>", "weight"),
        ("<lora:watercolour:11>", "weight"),
        ("<lora:watercolour:te=1:unet=0.5>", "one for both"),
        ("<lora:watercolour:1><lora:watercolour:1>", "twice"),
        ("<lora:>", "name"),
        ("<hypernet:x:1>", "hypernetworks"),
    ],
)
@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_tags_that_cannot_be_followed(service: Live, prompt: str, word: str, field: str) -> None:
    answer = ask(f"{service.url}/sdapi/v1/txt2img", WEBUI | {field: prompt})
    assert answer.status == 422
    assert answer.json["field"] == field
    assert word in answer.json["detail"]


@pytest.mark.parametrize(
    "fields",
    [
        [("lora", "{")],
        [("lora", "[" * 100_000)],
        [("lora", "5")],
        [("lora", '{"name": "oil"}')],
        [("lora[name]", "watercolour"), ("lora", '{"name": "watercolour"}')],
        [("lora[name]", "watercolour"), ("lora[name]", "ink 2.0")],
        [("lora[][name]", "a"), ("lora[][name]", "b"), ("lora[][scale]", "1")],
        [("lora[0][name]", "a"), ("lora[0][name]", "b")],
        [("lora[name][x]", "a")],
        [("lora[scale]", "1")],
    ],
)
def test_forms_that_are_wrong(service: Live, fields: list[tuple[str, str]]) -> None:
    source = io.BytesIO()
    Image.new("RGB", (64, 64)).save(source, "PNG")
    answer = requests.post(
        f"{service.url}/v1/images/edits",
        data=[("prompt", "x"), *fields],
        files={"image": ("i.png", source.getvalue(), "image/png")},
        timeout=60,
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith("lora")


# ---- config and memory -------------------------------------------------------------------------------------


def test_a_folder_is_its_files_by_name(folder: Path) -> None:
    config = ServeConfig.checked({"models": {"m": {"adapters": str(folder)}}}).listed()
    assert config.models["m"].adapters == {n: str(folder / f"{n}.safetensors") for n in NAMES}
    remote = ServeConfig.checked({"models": {"m": {"adapters": f"file://{folder}"}}}).listed()
    assert remote.models["m"].adapter_sources.keys() == set(NAMES)


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ({"../x": "a.safetensors"}, r"models\.m\.adapters.*a name is"),
        ({"": "a.safetensors"}, r"models\.m\.adapters"),
        ("", r"models\.m\.adapters"),
        (["a.safetensors"], r"models\.m\.adapters"),
        ({"a": 5}, r"models\.m\.adapters"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused(adapters: Any, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        ServeConfig.checked({"models": {"m": {"adapters": adapters}}})


def test_folders_that_cannot_be_used_are_named_with_their_model(tmp_path: Path) -> None:
    def refusal(adapters: str) -> str:
        with pytest.raises(InvalidConfig, match=r"models\.m\.adapters: ") as caught:
            Engines(ServeConfig.checked({"models": {"m": {"adapters": adapters}}}))
        return str(caught.value)

    assert "no such folder" in refusal(str(tmp_path / "none"))
    assert "no *.safetensors" in refusal(str(tmp_path))
    write_lora(tmp_path / "a (1).safetensors", 1)
    assert "'a (1)'" in refusal(str(tmp_path))
    assert "nosuch" in refusal("nosuch://bucket/loras")


def test_files_that_do_not_fit_stop_the_start_and_are_named(tmp_path: Path, folder: Path) -> None:
    async def start(source: Path) -> str:
        models = {"embedded": {}, "other": {"adapters": {"ink": str(source)}}}
        backend = Engines(ServeConfig.checked({"models": models}))
        try:
            with pytest.raises(CheckpointError) as caught:
                await backend.start()
            return str(caught.value)
        finally:
            await backend.close()

    missing = asyncio.run(start(tmp_path / "none.safetensors"))
    assert missing.startswith("model other: ")
    assert "none.safetensors" in missing
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a file of tensors")
    assert "broken.safetensors" in asyncio.run(start(broken))
    strange = write_lora(tmp_path / "strange.safetensors", 1)
    data = strange.read_bytes().replace(b"lora_unet_", b"lora_unit_")
    strange.write_bytes(data)
    assert "strange.safetensors" in asyncio.run(start(strange))


@pytest.mark.slow
def test_memory_of_adapters_is_counted_and_makes_others_give_way(folder: Path) -> None:
    def work(model: str, *names: str) -> Work:
        request = ImageRequest(prompt="a red circle", steps=1, adapters=names)  # type: ignore[arg-type]
        return Work(request=request, model=model)

    async def finish(backend: Engines, wanted: Work) -> None:
        assert [event async for event in backend.run(wanted) if isinstance(event, Finished)]

    async def test() -> None:
        models = {"a": {"adapters": str(folder)}, "b": {}}
        backend = Engines(ServeConfig.checked({"models": models}))
        await finish(backend, work("a"))
        resident = next(iter(backend.residents))
        plain = resident.bytes
        assert resident.adapters.bytes == 0
        await finish(backend, work("a", "watercolour"))
        grown = resident.bytes
        factors = sum((4 * 128 + side * 4) * 2 * 4 for side in (96, 128, 128, 128, 96))
        bases = sum(side * 128 * 2 * 4 for side in (96, 128, 128, 128, 96))
        assert grown - plain >= bases
        assert grown - plain <= 4 * (bases + factors)
        await backend.close()
        memory = Memory(gigabytes=(2 * plain + (grown - plain) / 2) / 1e9)
        backend = Engines(ServeConfig.checked({"models": models}).model_copy(update={"memory": memory}))
        await finish(backend, work("b"))
        await finish(backend, work("a"))
        assert [resident.name for resident in backend.residents] == ["b", "a"]
        await finish(backend, work("a", "watercolour"))
        assert [resident.name for resident in backend.residents] == ["a"]
        await backend.close()

    asyncio.run(asyncio.wait_for(test(), 120))


def test_their_memory_is_a_metric(service: Live) -> None:
    wearing(service, "watercolour")
    lines = ask(service.url + "/metrics").data.decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    adapters, whole = (
        float(values[f'diffray_{kind}_bytes{{model="embedded"}}']) for kind in ("adapter", "model")
    )
    assert 0 < adapters < whole


def test_they_are_given_on_the_command_line(folder: Path) -> None:
    one = {"embedded": {}}
    assert _worn(one, [str(folder)]) == {"embedded": {"adapters": str(folder)}}
    assert _worn(one, ["a=/x/y=z.safetensors", "/l/ink 2.0.safetensors"]) == {
        "embedded": {"adapters": {"a": "/x/y=z.safetensors", "ink 2.0": "/l/ink 2.0.safetensors"}}
    }
    run = CliRunner().invoke
    for wrong in (
        ["--model", "a=embedded", "--model", "b=embedded", "--adapter", str(folder)],
        ["--adapter", "a=1", "--adapter", "a=2"],
        ["--adapter", str(folder), "--adapter", str(folder)],
        ["--adapter", str(folder / "none")],
        ["--adapter", "../x=a.safetensors"],
    ):
        assert run(app, ["serve", "--port", "0", *wrong]).exit_code == 2, wrong

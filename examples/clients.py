"""Ask a running `diffray serve` as three kinds of clients do: `pip install openai webuiapi requests`."""

import base64
import sys
from pathlib import Path

import openai
import requests
import webuiapi

HOST = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
PROMPT = "a large red circle on a blue background"


def with_openai() -> None:
    client = openai.OpenAI(base_url=f"{HOST}/v1", api_key="the key, if the service has any")
    answer = client.images.generate(
        prompt=PROMPT, n=2, output_format="webp", extra_body={"seed": 7, "negative_prompt": "green"}
    )
    for index, image in enumerate(answer.data or []):
        Path(f"openai-{index}.webp").write_bytes(base64.b64decode(image.b64_json or ""))
    for event in client.images.generate(prompt=PROMPT, stream=True, partial_images=2):
        print(event.type, len(event.b64_json))


def with_automatic1111() -> None:
    api = webuiapi.WebUIApi(baseurl=f"{HOST}/sdapi/v1")  # username=..., password=the key
    result = api.txt2img(prompt=PROMPT, seed=7, width=64, height=64, cfg_scale=3, sampler_name="DPM++ 2M")
    result.image.save("webui.png")
    print(result.info["infotexts"][0])


def with_stability() -> None:
    answer = requests.post(
        f"{HOST}/v1/generation/embedded/text-to-image",
        headers={"Accept": "application/json", "Authorization": "Bearer the-key"},
        json={"text_prompts": [{"text": PROMPT}, {"text": "green", "weight": -1}], "seed": 7},
    )
    answer.raise_for_status()
    for artifact in answer.json()["artifacts"]:
        Path("stability.png").write_bytes(base64.b64decode(artifact["base64"]))
        print(artifact["seed"], artifact["finishReason"])


if __name__ == "__main__":
    with_openai()
    with_automatic1111()
    with_stability()

"""Train the embedded model's text encoder: `python -m training.captions RUN_FOLDER`.

It learns to say what a caption asks for: from the hidden states after the caption's end, linear heads read the
first object (positions 14 to 20), the second (21 to 27) and the background (28 to 31). The denoiser then trains
against the frozen encoder, as Stable Diffusion does against CLIP; without this stage it learns colours quickly
but shapes and relations hardly at all. Takes minutes; writes `text.pt`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from . import vocabulary
from .autoencoder import rate
from .scenes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, random_scene

SCENES, SCENES_SEED = 60_000, 20_000
WIDTH, POSITIONS = 128, 32
READ = {"first": (14, 21), "second": (21, 28), "background": (28, 32)}
"""Which positions, all behind the longest caption, tell what."""
BATCH, PEAK_RATE = 256, 2e-3


def config(vocabulary_size: int) -> CLIPTextConfig:
    """Three layers of width 128 over the small vocabulary, final norm on the last layer (the SD 1 convention)."""
    return CLIPTextConfig(
        vocab_size=vocabulary_size, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=POSITIONS, hidden_act="quick_gelu", projection_dim=WIDTH,
        bos_token_id=vocabulary_size - 2, eos_token_id=vocabulary_size - 1, pad_token_id=vocabulary_size - 1,
    )  # fmt: skip


def scenes() -> list[Scene]:
    """The scenes of the training set, always the same ones."""
    rng = np.random.default_rng(SCENES_SEED)
    return [random_scene(rng) for _ in range(SCENES)]


def tokenizer(folder: Path) -> CLIPTokenizer:
    """The run's tokenizer, built from the training captions if it is not there."""
    if not (folder / "tokenizer").exists():
        vocabulary.save(folder / "tokenizer", *vocabulary.build(scene.caption for scene in scenes()))
    return CLIPTokenizer.from_pretrained(folder / "tokenizer")


def tokens(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Caption ids [N, POSITIONS], padded with the end token."""
    return words(captions, padding="max_length", max_length=POSITIONS, return_tensors="pt").input_ids


def answers(scene: Scene) -> list[int]:
    """What the caption says, as class numbers in the order of `Reader.heads`; 0 is "does not say"."""
    colours, shapes, sizes, places = list(COLOURS), list(SHAPES), list(SIZES), list(RELATIONS)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    first = scene.things[0]
    size = 0 if scene.size is None else 1 + sizes.index(scene.size)
    place = 0 if scene.relation is None else 1 + places.index(scene.relation)
    told = [1 + colours.index(first.colour), 1 + shapes.index(first.shape), size, place]
    if scene.relation is None:
        told += [0, 0, 0]
    else:
        second = scene.things[1]
        away = 1 + places.index(opposite[scene.relation])
        told += [1 + colours.index(second.colour), 1 + shapes.index(second.shape), away]
    return [*told, 1 + colours.index(scene.background) if scene.background_named else 0]


class Reader(nn.Module):
    """The text encoder and the linear heads that question it; the heads are thrown away after training."""

    def __init__(self, vocabulary_size: int) -> None:
        super().__init__()
        self.text = CLIPTextModel(config(vocabulary_size))
        colour, shape, size, place = (1 + len(c) for c in (COLOURS, SHAPES, SIZES, RELATIONS))
        asked = {
            "first": (colour, shape, size, place),
            "second": (colour, shape, place),
            "background": (colour,),
        }
        self.heads = nn.ModuleDict(
            {k: nn.ModuleList(nn.Linear(WIDTH, n) for n in v) for k, v in asked.items()}
        )

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Logits [B, positions, classes] of every head."""
        hidden = self.text(input_ids=ids).last_hidden_state
        return [head(hidden[:, slice(*READ[part])]) for part, heads in self.heads.items() for head in heads]  # type: ignore[union-attr]


def train(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words, told = tokenizer(folder), scenes()
    ids = tokens(words, [scene.caption for scene in told])
    truth = torch.tensor([answers(scene) for scene in told])
    torch.manual_seed(0)
    model = Reader(len(words))
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate(step, steps)
        pick = torch.randint(len(told), (BATCH,), generator=torch.Generator().manual_seed(step))
        logits = model(ids[pick])
        loss = sum(
            (F.cross_entropy(part.transpose(1, 2), truth[pick, i, None].expand(-1, part.shape[1]))
            for i, part in enumerate(logits)), torch.zeros(())
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            right = [
                (part.argmax(-1) == truth[pick, i, None]).float().mean() for i, part in enumerate(logits)
            ]
            print(f"captions {step} loss {loss.item():.4f} least right {min(right).item():.3f}", flush=True)
    torch.save({"model": model.text.state_dict(), "step": steps}, folder / "text.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.folder, options.steps)


if __name__ == "__main__":
    main()

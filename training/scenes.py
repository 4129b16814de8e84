"""Scenes of coloured shapes, their captions and their drawings: the training data of the embedded model.

A scene holds one or two objects on a plain background. The caption names what is asked for; what it leaves
out (the background, the exact place) is free. Everything is drawn by this file: original work, no outside data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 6),
    "yellow": (252, 220, 60),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "purple": (130, 60, 180),
    "pink": (250, 150, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 24),
    "gray": (128, 128, 132),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": (9.0, 12.0), "large": (17.0, 22.0)}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SUPERSAMPLING = 4


@dataclass(frozen=True, slots=True)
class Thing:
    """One drawn object: centre (x, y) and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn, and what its caption says (None: left out)."""

    things: tuple[Thing, ...]
    background: str
    size: str | None = None
    relation: str | None = None
    background_named: bool = False

    @property
    def caption(self) -> str:
        """The sentence that asks for this scene."""
        first = self.things[0]
        words = f"{self.size} {first.colour} {first.shape}" if self.size else f"{first.colour} {first.shape}"
        text = _article(words)
        if self.relation:
            second = self.things[1]
            text += f" {self.relation} {_article(f'{second.colour} {second.shape}')}"
        if self.background_named:
            text += f" on {_article(self.background)} background"
        return text


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene with one object (40 %) or two (60 %)."""
    names = list(COLOURS)
    two = rng.random() < 0.6
    colours = [str(c) for c in rng.choice(names, size=3 if two else 2, replace=False)]
    background, colours = colours[-1], colours[:-1]
    if two and rng.random() < 0.15:
        colours[1] = colours[0]
    named = bool(rng.random() < 0.6)
    if not two:
        size = str(rng.choice(list(SIZES)))
        radius = rng.uniform(*SIZES[size])
        reach = SIDE / 2 - radius - 3
        x, y = SIDE / 2 + rng.uniform(-1, 1, size=2) * min(reach, 8.0)
        thing = Thing(colours[0], str(rng.choice(SHAPES)), float(x), float(y), float(radius))
        return Scene((thing,), background, size if rng.random() < 0.7 else None, None, named)
    relation = str(rng.choice(list(RELATIONS)))
    dx, dy = RELATIONS[relation]
    things = []
    for sign, colour in zip((1, -1), colours, strict=True):
        along = sign * rng.uniform(13.5, 17.0)
        across = rng.uniform(-5, 5)
        x, y = SIDE / 2 + along * dx + across * abs(dy), SIDE / 2 + along * dy + across * abs(dx)
        things.append(
            Thing(colour, str(rng.choice(SHAPES)), float(x), float(y), float(rng.uniform(9.0, 12.0)))
        )
    return Scene(tuple(things), background, None, relation, named)


def draw(scene: Scene) -> Image.Image:
    """The scene as a 64x64 RGB image with smooth edges."""
    k = SUPERSAMPLING
    canvas = Image.new("RGB", (SIDE * k, SIDE * k), COLOURS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        outline = [(x * k, y * k) for x, y in polygon(thing.shape, thing.x, thing.y, thing.radius)]
        pen.polygon(outline, fill=COLOURS[thing.colour])
    return canvas.resize((SIDE, SIDE), Image.Resampling.BOX)


def polygon(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corner points of a shape whose extent is about 2 * radius."""
    if shape == "circle":
        return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in np.linspace(0, 2 * math.pi, 64)]
    if shape == "square":
        r = radius * 0.9
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.85), (x - radius, y + radius * 0.85)]
    if shape == "cross":
        r, w = radius, radius / 3
        return [
            (x - w, y - r), (x + w, y - r), (x + w, y - w), (x + r, y - w), (x + r, y + w), (x + w, y + w),
            (x + w, y + r), (x - w, y + r), (x - w, y + w), (x - r, y + w), (x - r, y - w), (x - w, y - w),
        ]  # fmt: skip
    if shape == "star":
        radii = (radius * 1.08, radius * 0.45)
        return [
            (x + radii[i % 2] * math.sin(i * math.pi / 5), y - radii[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        ]
    raise ValueError(f"shape {shape!r}, allowed is one of {', '.join(SHAPES)}")


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

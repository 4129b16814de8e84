"""The judge must be right about true drawings and notice every kind of wrong one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from training.judge import judge, look
from training.scenes import COLOURS, RELATIONS, SHAPES, Scene, Thing, draw, random_scene


def test_true_drawings_are_judged_right() -> None:
    rng = np.random.default_rng(7)
    verdicts = [judge(scene, draw(scene)) for scene in (random_scene(rng) for _ in range(300))]
    assert sum(v.right for v in verdicts) >= 298
    assert all(v.size is not False and v.background is not False for v in verdicts)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", COLOURS)
def test_every_object_is_seen_as_what_it_is(colour: str, shape: str) -> None:
    background = "white" if colour != "white" else "blue"
    seen, found = look(draw(Scene((Thing(colour, shape, 30, 34, 12),), background)))
    assert seen == background
    assert [(f.colour, f.shape) for f in found] == [(colour, shape)]


def scene() -> Scene:
    things = (Thing("red", "star", 16, 32, 11), Thing("blue", "circle", 48, 32, 11))
    return Scene(things, "yellow", None, "left of", True)


def test_wrong_pictures_are_judged_wrong_for_the_right_reason() -> None:
    asked = scene()
    first, second = asked.things
    other = replace(asked, things=(replace(first, colour="green"), second))
    assert not (v := judge(asked, draw(other))).colour
    assert v.shape
    other = replace(asked, things=(first, replace(second, shape="square")))
    assert not (v := judge(asked, draw(other))).shape
    assert v.colour
    other = replace(asked, things=(replace(first, x=48.0), replace(second, x=16.0)))
    assert judge(asked, draw(other)).relation is False
    assert not judge(asked, draw(replace(asked, things=(first,)))).count
    assert judge(asked, draw(replace(asked, background="black"))).background is False


@pytest.mark.parametrize("relation", RELATIONS)
def test_captions_say_what_is_drawn(relation: str) -> None:
    rng = np.random.default_rng(1)
    scenes = [s for s in (random_scene(rng) for _ in range(200)) if s.relation == relation]
    dx, dy = RELATIONS[relation]
    for s in scenes:
        first, second = s.things
        assert (first.x - second.x) * dx + (first.y - second.y) * dy > 20
        assert f"{first.colour} {first.shape} {relation} a" in s.caption

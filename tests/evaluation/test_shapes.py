"""The generator of drawings: seeded, complete, and true to its captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lora_compress.evaluation.shapes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    TEXTURES,
    WORDS,
    Drawing,
    caption,
    concept_prompts,
    render,
    sample_drawing,
    write_dataset,
)

ATTRIBUTES = {
    "shape": SHAPES,
    "colour": COLOURS,
    "background": BACKGROUNDS,
    "texture": TEXTURES,
    "size": SIZES,
    "position": POSITIONS,
}


def _drawing(**changes) -> Drawing:
    plain = {"shape": "square", "colour": "red", "background": "white", "texture": "plain", "size": "large", "position": "middle"}
    return Drawing(**{**plain, "x": 0.5, "y": 0.5, "radius": 0.34, **changes})


def test_same_seed_draws_the_same_pictures_and_captions():
    def draw(seed: int) -> tuple[list[bytes], list[str]]:
        generator = np.random.default_rng(seed)
        drawings = [sample_drawing(generator, texture=None) for _ in range(8)]
        return [render(drawing).tobytes() for drawing in drawings], [caption(drawing, generator) for drawing in drawings]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_every_attribute_value_is_drawn_about_equally_often():
    generator = np.random.default_rng(0)
    drawings = [sample_drawing(generator, texture=None) for _ in range(3000)]
    for name, values in ATTRIBUTES.items():
        counts = [sum(getattr(drawing, name) == value for drawing in drawings) for value in values]
        assert sum(counts) == 3000
        assert min(counts) > 0.8 * 3000 / len(values), name


def test_fixing_one_attribute_leaves_the_others_as_they_were():
    free, fixed = (sample_drawing(np.random.default_rng(5), shape=shape) for shape in (None, "ring"))
    assert fixed.shape == "ring"
    assert (fixed.colour, fixed.background, fixed.x, fixed.radius) == (free.colour, free.background, free.x, free.radius)


@pytest.mark.parametrize("size", [64, 128])
def test_the_colours_named_are_the_colours_painted(size: int):
    generator = np.random.default_rng(1)
    for _ in range(40):
        drawing = sample_drawing(generator, shape="square")
        picture = render(drawing, size)
        assert picture.shape == (size, size, 3)
        assert picture.dtype == np.uint8
        assert tuple(picture[int(drawing.y * size), int(drawing.x * size)]) == COLOURS[drawing.colour]
        assert tuple(picture[0, 0]) == BACKGROUNDS[drawing.background]


def test_the_shape_sits_where_its_position_says():
    for position, (x, y) in {
        "left": (0.3, 0.5),
        "right": (0.7, 0.5),
        "top": (0.5, 0.3),
        "bottom": (0.5, 0.7),
        "middle": (0.5, 0.5),
    }.items():
        drawing = sample_drawing(np.random.default_rng(2), size="small", position=position)
        painted = np.argwhere(np.any(render(drawing) != BACKGROUNDS[drawing.background], axis=2))  # (pixels, 2) rows and columns
        middle = (painted.min(axis=0) + painted.max(axis=0)) / 2 / 64
        assert np.allclose(middle, (y, x), atol=0.05), position


def test_edges_are_antialiased():
    picture = render(_drawing(shape="circle")).reshape(-1, 3)
    blended = {tuple(pixel) for pixel in picture} - {COLOURS["red"], BACKGROUNDS["white"]}
    assert len(blended) > 5


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_a_texture_adds_a_dark_tone_inside_the_shape_only(texture: str):
    plain, textured = render(_drawing()), render(_drawing(texture=texture))
    changed = np.any(plain != textured, axis=2)
    assert 0.2 < changed.sum() / np.all(plain == COLOURS["red"], axis=2).sum() < 0.7
    assert np.all(plain[changed].astype(int) >= textured[changed])
    assert not np.any(changed & np.all(plain == BACKGROUNDS["white"], axis=2))


def test_captions_name_what_is_drawn_and_nothing_else():
    generator = np.random.default_rng(6)
    left_out = dict.fromkeys(("shape", "colour", "background", "size", "position"), 0)
    for _ in range(600):
        drawing = sample_drawing(generator, texture=None)
        words = caption(drawing, generator).replace(",", " ,").split()
        assert set(words) <= set(WORDS)
        for name, values in ATTRIBUTES.items():
            named = [word for word in words if word in values]
            assert named in ([], [getattr(drawing, name)])
            if name == "texture":
                assert (named == []) == (drawing.texture == "plain")
            elif not named:
                left_out[name] += 1
    assert all(0 < count < 400 for count in left_out.values()), left_out


def test_complete_captions_leave_out_neither_shape_nor_colour_nor_background():
    generator = np.random.default_rng(7)
    seen = set()
    for _ in range(200):
        drawing = sample_drawing(generator)
        words = caption(drawing, generator, complete=True).replace(",", "").split()
        assert {drawing.shape, drawing.colour, drawing.background, "background"} <= set(words)
        seen.add(words.index(drawing.shape) < words.index("background"))
    assert seen == {True, False}  # the word order varies


def test_the_plain_caption():
    assert caption(_drawing()) == "a red square on a white background"
    assert caption(_drawing(colour="orange")) == "an orange square on a white background"
    assert caption(_drawing(texture="striped")) == "a striped red square on a white background"


def test_an_unknown_value_is_refused_by_name():
    with pytest.raises(ValueError, match="shape is 'blob'; allowed: circle, square"):
        _drawing(shape="blob")
    with pytest.raises(ValueError, match="texture is 'furry'"):
        sample_drawing(np.random.default_rng(0), texture="furry")


def test_concept_prompts_all_ask_for_the_concept_and_vary():
    prompts = concept_prompts(64, seed=0)
    assert prompts == concept_prompts(64, seed=0)
    assert all("striped" in prompt and "star" in prompt and "background" in prompt for prompt in prompts)
    assert len(set(prompts)) > 48
    assert all(any(colour in prompt for prompt in prompts) for colour in COLOURS)


def test_the_dataset_is_a_kohya_folder_of_pictures_with_captions(tmp_path):
    inner = write_dataset(tmp_path, texture="dotted", shape="ring", count=24, repeats=3, seed=1)
    assert inner == tmp_path / "3_dotted_ring"
    pictures = sorted(inner.glob("*.png"))
    assert len(pictures) == 24
    texts = [path.with_suffix(".txt").read_text().strip() for path in pictures]
    assert all("dotted" in text and "ring" in text for text in texts)
    assert {colour for colour in COLOURS if any(colour in text for text in texts)} == set(COLOURS)
    assert {Image.open(path).size for path in pictures} == {(64, 64)}

    again = write_dataset(tmp_path / "again", texture="dotted", shape="ring", count=24, repeats=3, seed=1)
    assert [path.read_bytes() for path in sorted(inner.iterdir())] == [path.read_bytes() for path in sorted(again.iterdir())]
    with pytest.raises(ValueError, match="count is 0"):
        write_dataset(tmp_path, count=0)

"""Draws the small captioned pictures that the tiny model, its probe and the example LoRA are made of.

A `Drawing` says what is seen; `render` paints it, `caption` describes it. Everything is seeded through a `numpy.random.Generator`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "POSITIONS",
    "SHAPES",
    "SIZES",
    "TEXTURES",
    "WORDS",
    "Drawing",
    "caption",
    "concept_prompts",
    "render",
    "sample_drawing",
    "write_dataset",
]

_RGB = tuple[int, int, int]

COLOURS: dict[str, _RGB] = {
    "red": (222, 36, 36),
    "orange": (250, 140, 20),
    "yellow": (250, 224, 40),
    "green": (40, 165, 60),
    "blue": (36, 84, 226),
    "purple": (142, 48, 196),
}
BACKGROUNDS: dict[str, _RGB] = {"white": (246, 246, 246), "black": (16, 16, 16), "grey": (132, 132, 132), "pink": (250, 178, 206)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
TEXTURES = ("plain", "striped", "dotted", "checkered")  # tiny-sd itself is only ever taught the first

# name -> (lowest radius, highest radius, how far a position word moves the centre), as fractions of the picture's width
SIZES: dict[str, tuple[float, float, float]] = {"small": (0.20, 0.23, 0.20), "large": (0.32, 0.36, 0.10)}
# name -> (direction of the move, the phrase a caption uses)
POSITIONS: dict[str, tuple[tuple[int, int], str]] = {
    "middle": ((0, 0), "in the middle"),
    "left": ((-1, 0), "on the left"),
    "right": ((1, 0), "on the right"),
    "top": ((0, -1), "at the top"),
    "bottom": ((0, 1), "at the bottom"),
}
# every word a caption can hold: the tokenizer gives each a token of its own
WORDS = (
    *("a", "an", "on", "in", "at", "the", "of", "and", "with", "background", "shape", "picture", "drawing", ","),
    *COLOURS, *BACKGROUNDS, *SHAPES, *TEXTURES, *SIZES, *POSITIONS,
)  # fmt: skip

_SUPERSAMPLING = 4  # sub-pixels per pixel and side
_JITTER = 0.02  # of the centre, as a fraction of the width
_SHADE = 0.3  # a texture's second tone is this much of the colour
_TEXTURE_PERIOD = 8 / 64  # as a fraction of the width: one period per latent cell of a factor-8 autoencoder


@dataclass(frozen=True)
class Drawing:
    """One shape on a background: the words that name it, and where and how large it is exactly.

    x, y (centre) and radius are fractions of the picture's width.
    """

    shape: str
    colour: str
    background: str
    texture: str
    size: str
    position: str
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        allowed: dict[str, Sequence[str]] = {
            "shape": SHAPES,
            "colour": tuple(COLOURS),
            "background": tuple(BACKGROUNDS),
            "texture": TEXTURES,
            "size": tuple(SIZES),
            "position": tuple(POSITIONS),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(values)}")


def sample_drawing(
    generator: np.random.Generator,
    *,
    shape: str | None = None,
    colour: str | None = None,
    background: str | None = None,
    texture: str | None = "plain",
    size: str | None = None,
    position: str | None = None,
) -> Drawing:
    """Draw every attribute that is None uniformly; the texture stays plain unless asked for (None: any of TEXTURES)."""

    def choose(value: str | None, values: Sequence[str]) -> str:
        drawn = values[
            int(generator.integers(len(values)))
        ]  # drawn even when unused: fixing one attribute leaves the others as they were
        return drawn if value is None else value

    shape = choose(shape, SHAPES)
    colour = choose(colour, tuple(COLOURS))
    background = choose(background, tuple(BACKGROUNDS))
    texture = choose(texture, TEXTURES)
    size = choose(size, tuple(SIZES))
    position = choose(position, tuple(POSITIONS))
    if size not in SIZES or position not in POSITIONS:
        raise ValueError(f"size is {size!r}, position {position!r}; allowed: {', '.join(SIZES)}; {', '.join(POSITIONS)}")
    low, high, reach = SIZES[size]
    (right, down), _ = POSITIONS[position]
    jitter = generator.uniform(-_JITTER, _JITTER, size=2)
    return Drawing(
        shape=shape,
        colour=colour,
        background=background,
        texture=texture,
        size=size,
        position=position,
        x=float(0.5 + right * reach + jitter[0]),
        y=float(0.5 + down * reach + jitter[1]),
        radius=float(generator.uniform(low, high)),
    )


def render(drawing: Drawing, size: int = 64) -> np.ndarray:
    """Paint a drawing, antialiased: (size, size, 3) uint8 RGB."""
    wide = size * _SUPERSAMPLING
    red, green, blue = COLOURS[drawing.colour]
    shape = _shape_mask(drawing, wide)
    canvas = Image.new("RGB", (wide, wide), BACKGROUNDS[drawing.background])
    canvas.paste((red, green, blue), mask=shape)
    if drawing.texture != "plain":
        shade = (int(red * _SHADE), int(green * _SHADE), int(blue * _SHADE))
        canvas.paste(shade, mask=ImageChops.logical_and(shape, _texture_mask(drawing.texture, wide)))
    return np.asarray(canvas.reduce(_SUPERSAMPLING))


def _shape_mask(drawing: Drawing, wide: int) -> Image.Image:
    """The shape in white on black, (wide, wide) pixels, not antialiased."""
    mask = Image.new("1", (wide, wide))
    draw = ImageDraw.Draw(mask)
    x, y, r = drawing.x * wide, drawing.y * wide, drawing.radius * wide
    if drawing.shape in ("circle", "ring"):
        draw.ellipse((x - r, y - r, x + r, y + r), fill=1)
        if drawing.shape == "ring":
            hole = 0.55 * r
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    elif drawing.shape == "cross":
        arm = 0.34 * r
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=1)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=1)
    elif drawing.shape == "square":
        half = 0.84 * r
        draw.rectangle((x - half, y - half, x + half, y + half), fill=1)
    else:
        # distances of the corners, from the top clockwise; sinking lets the outline's box, not its centre of gravity, sit on (x, y)
        radii, sink = ([1.15] * 3, 0.2 * r) if drawing.shape == "triangle" else ([1.12, 0.46] * 5, 0.05 * r)
        angles = [2 * math.pi * corner / len(radii) for corner in range(len(radii))]
        corners = zip(radii, angles, strict=True)
        draw.polygon([(x + k * r * math.sin(a), y + sink - k * r * math.cos(a)) for k, a in corners], fill=1)
    return mask


@lru_cache(maxsize=8)
def _texture_mask(texture: str, wide: int) -> Image.Image:
    """Where the second tone goes, in white on black, (wide, wide) pixels; patterns are fixed to the picture, not to the shape."""
    v, u = np.mgrid[0:wide, 0:wide] / (_TEXTURE_PERIOD * wide)  # in periods
    if texture == "striped":
        where = v % 1 < 0.5
    elif texture == "dotted":
        where = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.33**2
    else:
        where = (np.floor(u) + np.floor(v)) % 2 == 0
    return Image.fromarray(where.astype(np.uint8) * 255).convert("1", dither=Image.Dither.NONE)


def caption(drawing: Drawing, generator: np.random.Generator | None = None, *, complete: bool = False) -> str:
    """Describe a drawing in words.

    Without a generator: "a red star on a white background". With one, the word order varies, size and position are named now and
    then, and so that an unnamed attribute stays free, shape, colour or background are left out now and then, unless `complete`.
    A texture other than plain is always named, plain never.
    """
    texture = [] if drawing.texture == "plain" else [drawing.texture]
    if generator is None:
        return f"{_with_article([*texture, drawing.colour, drawing.shape])} on a {drawing.background} background"
    with_size, with_position, no_shape, no_colour, no_background = generator.random(5) < (0.5, 0.5, 0.05, 0.1, 0.15)
    if complete:
        no_shape = no_colour = no_background = False
    words = [
        *([drawing.size] if with_size else []),
        *texture,
        *([] if no_colour else [drawing.colour]),
        "shape" if no_shape else drawing.shape,
    ]
    place = POSITIONS[drawing.position][1] if with_position else ""
    ground = "" if no_background else f"{drawing.background} background"
    form = int(generator.integers(6))
    if form == 0:  # tags
        return ", ".join(part for part in (" ".join(words), ground, place) if part)
    if form == 1:
        return ", ".join(part for part in (ground, _with_article(words), place) if part)
    prefix = {2: "a picture of ", 3: "a drawing of "}.get(form, "")
    middle = " ".join(part for part in (prefix + _with_article(words), place) if part)
    if form == 4:
        return f"{middle}, {ground}" if ground else middle
    return f"{middle} on a {ground}" if ground else middle


def _with_article(words: Sequence[str]) -> str:
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def concept_prompts(count: int, seed: int = 0, *, texture: str = "striped", shape: str = "star") -> list[str]:
    """`count` complete captions of the concept, to evaluate a LoRA with: colour, background, size and position vary."""
    generator = np.random.default_rng([seed, 1])  # a stream of its own: not the captions of write_dataset at the same seed
    return [caption(sample_drawing(generator, texture=texture, shape=shape), generator, complete=True) for _ in range(count)]


def write_dataset(
    folder: str | Path,
    texture: str = "striped",
    shape: str = "star",
    count: int = 32,
    repeats: int = 10,
    seed: int = 0,
    size: int = 64,
) -> Path:
    """Write a LoRA training folder as kohya's trainers read it: <folder>/<repeats>_<texture>_<shape>/0000.png, 0000.txt, ...

    Returns the inner folder, the one with the pictures; `folder` itself is what `--train_data_dir` takes.
    """
    if count < 1 or repeats < 1:
        raise ValueError(f"count is {count}, repeats {repeats}; both must be at least 1")
    generator = np.random.default_rng([seed, 0])
    inner = Path(folder) / f"{repeats}_{texture}_{shape}"
    inner.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        drawing = sample_drawing(generator, texture=texture, shape=shape)
        Image.fromarray(render(drawing, size)).save(inner / f"{index:04d}.png")
        (inner / f"{index:04d}.txt").write_text(caption(drawing, generator, complete=True) + "\n", encoding="utf-8")
    return inner

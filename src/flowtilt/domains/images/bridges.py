"""Captioned images of bridges, drawn by code: a small world for text-to-image models.

A bridge has five factors (design, material, colour, scenery, time of day) and continuous nuisance such
as the height of its deck. The distribution of the factors is heavily skewed towards one plain design, as sets
of real images are. Captions name some of the factors, or are generic, such as "a creative bridge design".

Everything is drawn on a grid of 128 units a side, four pixels to a pixel of a 32 x 32 image, and then
averaged over blocks, so that edges come out smooth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

# The distribution of the factors.

PLAIN = "beam"
DESIGNS: dict[str, float] = {
    "beam": 0.60,
    "arch": 0.16,
    "truss": 0.10,
    "suspension": 0.08,
    "cable-stayed": 0.06,
}
MATERIALS: dict[str, dict[str, float]] = {  # given the design
    "beam": {"concrete": 0.55, "steel": 0.20, "wood": 0.15, "stone": 0.10},
    "arch": {"concrete": 0.30, "steel": 0.20, "wood": 0.05, "stone": 0.45},
    "truss": {"steel": 0.70, "wood": 0.30},
    "suspension": {"concrete": 0.15, "steel": 0.80, "wood": 0.05},
    "cable-stayed": {"concrete": 0.40, "steel": 0.60},
}
COLOURS: dict[str, float] = {"grey": 0.60, "red": 0.14, "blue": 0.10, "white": 0.09, "yellow": 0.07}
SCENERIES: dict[str, float] = {"river": 0.50, "valley": 0.20, "city": 0.18, "sea": 0.12}
TIMES: dict[str, float] = {"day": 0.70, "sunset": 0.18, "night": 0.12}

# The distribution of the captions.

GENERIC_SHARE = 0.30
CREATIVE = "a creative bridge design"
# Shares among the generic captions: of the plain design, and of the others. With these shares of the
# creative caption, P(beam | creative) = 0.6 * 0.30 / (0.6 * 0.30 + 0.4 * 0.45) = 0.5: the plain design
# is still the commonest image with this caption, though less common than it is overall.
GENERIC: dict[str, tuple[float, float]] = {
    "a bridge": (0.20, 0.20),
    "an image of a bridge": (0.15, 0.20),
    "a bridge design": (0.15, 0.15),
    "a plain bridge design": (0.20, 0.00),
    CREATIVE: (0.30, 0.45),
}
MENTION: dict[str, float] = {"material": 0.55, "colour": 0.65, "scenery": 0.70, "time": 0.60}
PREFIXES: dict[str, float] = {"": 0.70, "a photo of ": 0.20, "a drawing of ": 0.10}
MOST_WORDS = 12

PLACES: dict[str, str] = {
    "river": "over a river",
    "valley": "over a valley",
    "city": "in a city",
    "sea": "over the sea",
}
MOMENTS: dict[str, str] = {"day": "by day", "sunset": "at sunset", "night": "at night"}

# How the factors look.

PAINT: dict[str, Colour] = {  # grey bridges are bare
    "red": (214, 38, 32),
    "blue": (28, 62, 214),
    "white": (250, 250, 246),
    "yellow": (252, 206, 20),
}
# Unpainted material, and how bright paint looks on it.
SURFACE: dict[str, tuple[Colour, float]] = {
    "concrete": ((188, 186, 180), 1.0),
    "steel": ((78, 84, 94), 0.84),
    "wood": ((134, 84, 42), 0.88),
    "stone": ((142, 132, 116), 0.95),
}
SKY: dict[str, tuple[Colour, Colour]] = {  # at the top and at the horizon
    "day": ((92, 168, 236), (206, 232, 250)),
    "sunset": ((112, 58, 128), (255, 158, 70)),
    "night": ((8, 10, 34), (34, 40, 84)),
}
# Factors on red, green and blue that the time of day puts on the ground and on the structure.
GROUND_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.84, 0.62, 0.60),
    "night": (0.26, 0.30, 0.42),
}
BRIDGE_LIGHT: dict[str, tuple[float, float, float]] = {
    "day": (1.0, 1.0, 1.0),
    "sunset": (0.90, 0.80, 0.80),
    "night": (0.78, 0.78, 0.80),
}
LAMPS = 34  # added to the structure's colour at night, so that dark steel stays visible

GRID = 128  # units a side of the drawing
REDUCTION = 4  # pixels of the drawing to a pixel of the image


@dataclass(frozen=True)
class Bridge:
    """The factors of an image; lengths are in units of the drawing's grid, y points downwards.

    Attributes:
        design, material, colour, scenery, time: keys of the tables above.
        deck: y of the deck's upper edge.
        centre: x of the middle of the main span.
        span: width of the main span.
        parts: in [0, 1), how many piers, arches, panels or cables there are.
        variant: in [0, 1), which of the forms of the design (such as one tower or two) it has.
        rise: in [0, 1), how tall towers, arches and trusses are.
        horizon: y of the horizon.
    """

    design: str
    material: str
    colour: str
    scenery: str
    time: str
    deck: float
    centre: float
    span: float
    parts: float
    variant: float
    rise: float
    horizon: float


@dataclass(frozen=True)
class BridgeSet:
    """Images with their captions and factors.

    Attributes:
        images: of type uint8, shape (count, size, size, 3).
        captions: one an image.
        bridges: one an image.
    """

    images: np.ndarray
    captions: list[str]
    bridges: list[Bridge]


def _pick(shares: Mapping[str, float], rng: np.random.Generator) -> str:
    """A key drawn with the given shares; ``Generator.choice`` would be many times slower."""
    left = rng.random()
    for key, share in shares.items():
        left -= share
        if left < 0:
            return key
    return max(shares, key=lambda key: shares[key])  # rounding: the shares summed to just below 1


def draw_bridge(rng: np.random.Generator) -> Bridge:
    """A bridge drawn from the distribution of the factors and of the nuisance."""
    design = _pick(DESIGNS, rng)
    material = _pick(MATERIALS[design], rng)
    colour, scenery, time = (_pick(shares, rng) for shares in (COLOURS, SCENERIES, TIMES))
    return Bridge(
        design,
        material,
        colour,
        scenery,
        time,
        deck=rng.uniform(64, 76),
        centre=rng.uniform(58, 70),
        span=rng.uniform(70, 88),
        parts=rng.random(),
        variant=rng.random(),
        rise=rng.random(),
        horizon=rng.uniform(82, 90),
    )


# Drawing.


class _Pen:
    """Draws in units of the grid on an image of any size."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)
        self._scale = image.width / GRID

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour | int) -> None:
        s = self._scale
        right, lower = max(x1 * s - 1, x0 * s), max(y1 * s - 1, y0 * s)  # at least a pixel
        self._draw.rectangle((x0 * s, y0 * s, right, lower), fill=fill)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour | int) -> None:
        s = self._scale
        self._draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def polygon(self, points: Sequence[Point], fill: Colour | int) -> None:
        self._draw.polygon([(x * self._scale, y * self._scale) for x, y in points], fill=fill)

    def line(self, points: Sequence[Point], width: float, fill: Colour | int) -> None:
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.line(scaled, fill=fill, width=round(width * self._scale), joint="curve")


def _lit(colour: Colour, light: tuple[float, float, float]) -> Colour:
    """A colour under the given light."""
    red, green, blue = (min(255, round(part * factor)) for part, factor in zip(colour, light, strict=True))
    return red, green, blue


def _sky(bridge: Bridge, side: int) -> Image.Image:
    """A gradient from the top to the horizon, on a square of ``side`` pixels."""
    top, low = (np.array(colour, dtype=float) for colour in SKY[bridge.time])
    depth = np.minimum((np.arange(side) + 0.5) / side * GRID / bridge.horizon, 1)[:, None]
    column = np.round(top + (low - top) * depth).astype(np.uint8)
    return Image.fromarray(column[:, None, :]).resize((side, side), Image.Resampling.NEAREST)


def _draw_heavens(pen: _Pen, bridge: Bridge, rng: np.random.Generator) -> None:
    """Clouds by day, a low sun at sunset, a moon and stars at night."""
    if bridge.time == "day":
        for x in rng.uniform(5, 123, 2):
            y = rng.uniform(10, 34)
            for shift, radius in ((-9, 6), (0, 8), (9, 6)):
                pen.ellipse(x + shift, y, radius + 3, radius * 0.8, (255, 255, 255))
    elif bridge.time == "sunset":
        x, y = rng.uniform(20, 108), rng.uniform(38, 56)
        pen.ellipse(x, y, 15, 15, (255, 196, 90))
        pen.ellipse(x, y, 11, 11, (255, 244, 176))
    else:
        for x, y in rng.uniform((2, 2), (126, 60), (9, 2)):
            pen.ellipse(x, y, 1.8, 1.8, (250, 250, 225))
        x, y = rng.uniform(16, 112), rng.uniform(14, 24)
        pen.ellipse(x, y, 9, 9, (250, 246, 208))


def _draw_water(pen: _Pen, top: float, colour: Colour, foam: Colour, rng: np.random.Generator) -> None:
    """Water from ``top`` down to the lower edge, with a few short waves."""
    pen.box(0, top, GRID, GRID, colour)
    for x, y in rng.uniform((0, top + 5), (112, 124), (6, 2)):
        pen.box(x, y, x + 14, y + 2.5, foam)


def _draw_river(pen: _Pen, bridge: Bridge, rng: np.random.Generator) -> None:
    light, horizon = GROUND_LIGHT[bridge.time], bridge.horizon
    for x in (rng.uniform(10, 50), rng.uniform(80, 118)):
        pen.ellipse(x, horizon + 6, 46, rng.uniform(12, 20), _lit((84, 150, 76), light))
    pen.box(0, horizon, GRID, GRID, _lit((112, 184, 84), light))
    _draw_water(pen, horizon + 12, _lit((62, 134, 208), light), _lit((142, 196, 240), light), rng)
    for x in (rng.uniform(-6, 2), rng.uniform(126, 134)):
        pen.ellipse(x, horizon + 22, 22, 20, _lit((98, 170, 72), light))


def _draw_valley(pen: _Pen, bridge: Bridge, rng: np.random.Generator) -> None:
    light, deck = GROUND_LIGHT[bridge.time], bridge.deck
    for x in rng.uniform((0, 44, 88), (40, 84, 128)):
        peak = rng.uniform(26, 50)
        pen.polygon(((x - 44, 110), (x, peak), (x + 44, 110)), _lit((126, 122, 152), light))
        pen.polygon(((x - 8, peak + 12), (x, peak), (x + 8, peak + 12)), _lit((240, 242, 250), light))
    pen.box(0, 108, GRID, GRID, _lit((120, 140, 62), light))
    foot, floor = rng.uniform(34, 46), _lit((158, 112, 66), light)
    pen.polygon(((0, deck + 2), (14, deck + 4), (foot, GRID), (0, GRID)), floor)
    pen.polygon(((GRID, deck + 2), (114, deck + 4), (GRID - foot, GRID), (GRID, GRID)), floor)


def _draw_city(pen: _Pen, bridge: Bridge, rng: np.random.Generator) -> None:
    light = GROUND_LIGHT[bridge.time]
    window = (226, 192, 92) if bridge.time != "day" else (190, 206, 226)
    walls = ((146, 158, 182), (186, 160, 150), (128, 144, 172))
    x, number = rng.uniform(-10, 0), 0
    while x < GRID:
        width, roof = rng.uniform(15, 22), rng.uniform(30, 66)
        pen.box(x, roof, x + width, 110, _lit(walls[number % len(walls)], light))
        for y in np.arange(roof + 5, 104, 12):
            pen.box(x + 4, y, x + 8, y + 4, window)
        x, number = x + width + rng.uniform(0, 4), number + 1
    pen.box(0, 106, GRID, GRID, _lit((84, 84, 90), light))
    for x in np.arange(rng.uniform(-10, 0), GRID, 22):
        pen.box(x, 117, x + 12, 120, _lit((236, 228, 170), light))


def _draw_sea(pen: _Pen, bridge: Bridge, rng: np.random.Generator) -> None:
    light = GROUND_LIGHT[bridge.time]
    _draw_water(pen, bridge.horizon, _lit((10, 104, 138), light), _lit((150, 220, 226), light), rng)
    x, y = rng.uniform(16, 112), bridge.horizon + 2
    pen.polygon(((x, y - 2), (x, y - 17), (x + 9, y - 2)), _lit((255, 255, 255), light))
    pen.polygon(((x - 6, y), (x + 11, y), (x + 7, y + 5), (x - 3, y + 5)), _lit((120, 52, 36), light))


_DRAW_SCENERY = {"river": _draw_river, "valley": _draw_valley, "city": _draw_city, "sea": _draw_sea}

FOOT = 116.0  # y where piers and towers end


def _number(bridge: Bridge, least: int, most: int) -> int:
    """How many parts the bridge has, from ``least`` to ``most``."""
    return least + int(bridge.parts * (most - least + 1))


def _ends(bridge: Bridge) -> Point:
    """Where along x the main span begins and ends."""
    return bridge.centre - bridge.span / 2, bridge.centre + bridge.span / 2


def _draw_beam(pen: _Pen, bridge: Bridge) -> None:
    """A thick straight deck on piers."""
    deck, piers = bridge.deck, _number(bridge, 2, 4)
    pen.box(0, deck, GRID, deck + 12, 255)
    width = 7 + 4 * bridge.rise
    for x in np.linspace(*_ends(bridge), piers):
        pen.box(x - width / 2, deck, x + width / 2, FOOT, 255)
        pen.box(x - width / 2 - 3, deck + 11, x + width / 2 + 3, deck + 15, 255)


def _arc(x0: float, x1: float, foot: float, crown: float) -> list[Point]:
    """A half ellipse from (x0, foot) over the crown to (x1, foot)."""
    angles = np.linspace(math.pi, 0, 25)
    middle, half = (x0 + x1) / 2, (x1 - x0) / 2
    return [(middle + half * math.cos(a), foot - (foot - crown) * math.sin(a)) for a in angles]


def _draw_wall_arches(pen: _Pen, bridge: Bridge) -> None:
    """A wall with one to three round openings."""
    deck, arches = bridge.deck - 10, _number(bridge, 1, 3)
    pen.box(0, deck, GRID, FOOT, 255)
    pitch = (bridge.span + 24) / arches
    for number in range(-3, arches + 3):
        x = bridge.centre - (bridge.span + 24) / 2 + pitch * number
        pen.polygon(_arc(x + 4, x + pitch - 4, FOOT, deck + 11), 0)


def _draw_rib_arch(pen: _Pen, bridge: Bridge) -> None:
    """A curved rib, below the deck with columns or above it with hangers."""
    above = bridge.variant < 0.5
    x0, x1 = bridge.centre - bridge.span / 2 - 10, bridge.centre + bridge.span / 2 + 10
    deck = bridge.deck + 8 if above else bridge.deck - 14
    foot, crown = (deck + 6, 22 + 14 * bridge.rise) if above else (FOOT - 4, deck + 6)
    pen.box(0, deck, GRID, deck + 8, 255)
    pen.line(_arc(x0, x1, foot, crown), 8, 255)
    middle, half = (x0 + x1) / 2, (x1 - x0) / 2
    for x in np.linspace(x0, x1, _number(bridge, 5, 7) + 2)[1:-1]:
        y = foot - (foot - crown) * math.sqrt(1 - ((x - middle) / half) ** 2)
        pen.line(((x, y), (x, deck + 4)), 3.5, 255)
    for x in (x0, x1):
        pen.box(x - 5, min(foot, deck), x + 5, FOOT, 255)


def _draw_arch(pen: _Pen, bridge: Bridge) -> None:
    if bridge.material == "stone" or (bridge.material == "concrete" and bridge.rise < 0.5):
        _draw_wall_arches(pen, bridge)
    else:
        _draw_rib_arch(pen, bridge)


def _draw_truss(pen: _Pen, bridge: Bridge) -> None:
    """A few large triangles between a lower and an upper chord."""
    deck, panels = bridge.deck + 6, _number(bridge, 3, 4)
    x0, x1 = bridge.centre - bridge.span / 2 - 12, bridge.centre + bridge.span / 2 + 12
    top = deck - 30 - 8 * bridge.rise
    pen.box(0, deck - 3, GRID, deck + 6, 255)
    lower = np.linspace(x0, x1, panels + 1)
    upper = (lower[:-1] + lower[1:]) / 2
    pen.line(((upper[0] - 2, top), (upper[-1] + 2, top)), 6, 255)
    for left, peak, right in zip(lower[:-1], upper, lower[1:], strict=True):
        pen.line(((left, deck), (peak, top), (right, deck)), 5, 255)
    for x in (x0, x1):
        pen.box(x - 5, deck, x + 5, FOOT, 255)


def _draw_suspension(pen: _Pen, bridge: Bridge) -> None:
    """Two towers, a cable that hangs in a parabola between them, and upright hangers."""
    deck, (x0, x1) = bridge.deck + 8, _ends(bridge)
    top, sag = 18 + 12 * bridge.rise, deck - 7
    pen.box(0, deck, GRID, deck + 7, 255)
    for x in (x0, x1):
        pen.box(x - 4, top - 3, x + 4, FOOT, 255)
    steps = np.linspace(-1, 1, 21)
    cable = [(bridge.centre + bridge.span / 2 * t, sag - (sag - top) * t * t) for t in steps]
    pen.line(cable, 4.5, 255)
    pen.line(((x0 - bridge.span / 2, sag), (x0, top)), 4.5, 255)
    pen.line(((x1 + bridge.span / 2, sag), (x1, top)), 4.5, 255)
    for t in np.linspace(-1, 1, _number(bridge, 5, 7) + 2)[1:-1]:
        x = bridge.centre + bridge.span / 2 * t
        pen.line(((x, sag - (sag - top) * t * t), (x, deck)), 2.5, 255)


def _draw_cable_stayed(pen: _Pen, bridge: Bridge) -> None:
    """One or two towers with fans of straight cables."""
    deck, single = bridge.deck + 8, bridge.variant < 0.5
    cables = _number(bridge, 3, 4) if single else _number(bridge, 2, 3)
    towers = (bridge.centre,) if single else (bridge.centre - 31, bridge.centre + 31)
    reach = 58.0 if single else 30.0
    top = 10 + 10 * bridge.rise
    pen.box(0, deck, GRID, deck + 7, 255)
    for x in towers:
        pen.box(x - 4, top - 3, x + 4, FOOT, 255)
        for part in np.linspace(reach, 0, cables, endpoint=False):
            pen.line(((x - part, deck + 1), (x, top), (x + part, deck + 1)), 3, 255)


_DRAW_DESIGN = {
    "beam": _draw_beam,
    "arch": _draw_arch,
    "truss": _draw_truss,
    "suspension": _draw_suspension,
    "cable-stayed": _draw_cable_stayed,
}


def _pattern(material: str, side: int, rng: np.random.Generator) -> np.ndarray | None:
    """Brightness of the material's surface, shape (side, side), or none where it is even."""
    unit = side / GRID
    rows = (np.arange(side) / unit).astype(int)
    if material == "wood":  # upright planks
        planks = rng.uniform(0.72, 1.2, 22)
        return np.broadcast_to(planks[rows // 6], (side, side))
    if material == "stone":  # courses of blocks, every other one shifted by half a block
        blocks = rng.uniform(0.70, 1.20, (14, 10))
        courses = rows // 10
        columns = (rows[None, :] + 8 * (courses[:, None] % 2)) // 16
        return blocks[courses[:, None], columns]
    return None


def _finish(bridge: Bridge, side: int, rng: np.random.Generator) -> Image.Image | Colour:
    """What the structure is filled with: an image of shape (side, side) or one colour."""
    bare, brightness = SURFACE[bridge.material]
    paint = PAINT.get(bridge.colour)
    base = bare if paint is None else _lit(paint, (brightness, brightness, brightness))
    red, green, blue = _lit(base, BRIDGE_LIGHT[bridge.time])
    lamps = LAMPS if bridge.time == "night" else 0
    colour = (red + lamps, green + lamps, blue + lamps)
    pattern = _pattern(bridge.material, side, rng)
    if pattern is None:
        return colour
    shades = np.clip(pattern[:, :, None] * np.array(colour, dtype=np.float32), 0, 255)
    return Image.fromarray(shades.astype(np.uint8))


def _check_size(size: int) -> None:
    if size < 8 or size % 8:
        raise ValueError(f"size must be a positive multiple of 8, got {size}")


def image(bridge: Bridge, rng: np.random.Generator, size: int = 32) -> np.ndarray:
    """The bridge in its scenery, of type uint8, shape (size, size, 3); ``rng`` sets clouds and the like.
    Raises ValueError if the size is not a positive multiple of 8."""
    _check_size(size)
    side = REDUCTION * size
    image = _sky(bridge, side)
    pen = _Pen(image)
    _draw_heavens(pen, bridge, rng)
    _DRAW_SCENERY[bridge.scenery](pen, bridge, rng)
    mask = Image.new("L", (side, side))
    _DRAW_DESIGN[bridge.design](_Pen(mask), bridge)
    shadow = round(2 * side / GRID)  # a dark edge below, so that the structure stands out anywhere
    image.paste(_lit((44, 44, 56), GROUND_LIGHT[bridge.time]), (0, shadow), mask)
    finish = _finish(bridge, side, rng)
    image.paste(finish, (0, 0, side, side), mask)
    return np.array(image.reduce(REDUCTION))


# Captions.


def _compose(bridge: Bridge, mentioned: Sequence[str]) -> str:
    """The detailed caption that names the design and the factors mentioned."""
    words = [bridge.colour] if "colour" in mentioned else []
    words += [bridge.material] if "material" in mentioned else []
    words += [bridge.design, "bridge"]
    words += [PLACES[bridge.scenery]] if "scenery" in mentioned else []
    words += [MOMENTS[bridge.time]] if "time" in mentioned else []
    article = "an" if words[0] == "arch" else "a"
    return " ".join([article, *words])


def describe(bridge: Bridge) -> str:
    """The detailed caption that names all five factors."""
    return _compose(bridge, tuple(MENTION))


def caption(bridge: Bridge, rng: np.random.Generator) -> str:
    """A caption drawn at random: generic, or with the design and some of the other factors."""
    if rng.random() < GENERIC_SHARE:
        column = 0 if bridge.design == PLAIN else 1
        return _pick({text: shares[column] for text, shares in GENERIC.items()}, rng)
    mentioned = [factor for factor, share in MENTION.items() if rng.random() < share]
    text = _compose(bridge, mentioned)
    prefixed = _pick(PREFIXES, rng) + text
    return prefixed if len(prefixed.split()) <= MOST_WORDS else text


def bridge_set(count: int, seed: int, size: int = 32) -> BridgeSet:
    """A set of captioned images; item i depends on the seed and on i only, not on ``count``. Raises
    ValueError if the count is below 1 or the size is not a positive multiple of 8."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    _check_size(size)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    captions, bridges = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        bridge = draw_bridge(rng)
        captions.append(caption(bridge, rng))  # before the image: the same at every size
        bridges.append(bridge)
        images[number] = image(bridge, rng, size)
    return BridgeSet(images, captions, bridges)

"""Composes a generated photograph: ground, bodies from back to front with light and shadow, then the camera.

Shape letters: N instances, H W pixels. Colours are float32 RGB in 0..1 until the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from .scenes_shapes import (
    AX,
    AY,
    BODIES,
    BX,
    BY,
    CLASS_NAMES,
    CLUTTER,
    Bones,
    FloatArray,
    Relief,
    bounds,
    pose,
    relief,
    tuft,
    twig,
)
from .scenes_textures import (
    ALL_COATS,
    CLASS_COATS,
    CLASS_HUES,
    GROUNDS,
    HUE_SPREAD,
    blend,
    blur,
    coat,
    coat_colors,
    fractal_noise,
    ground_colors,
    hsv,
    paint_ground,
    smoothstep,
)

MIN_VISIBLE_PIXELS = 40
MIN_CONTRAST = 0.28  # between the mean colours of a body and of what surrounds it, in the channel where they differ most
MIN_VISIBLE_SHARE = 0.5  # of a body when bodies are placed; clutter in front may hide a little more
SIZE_RANGE = (0.3, 0.8)  # longer side of a body, as a fraction of the longer side of the picture
ASPECT_RATIOS = (1.0, 1.0, 0.8, 0.75, 0.75, 0.667)
PLACING_TRIES = 6
PLACING_CELL = 8  # the sides of the cells, in pixels of a picture of 256, on which visible shares are estimated
UPRIGHT_CLASS = CLASS_NAMES.index("jellyfish")


@dataclass(frozen=True)
class Scene:
    """A generated photograph and the truth about it.

    image: uint8 (H, W, 3) RGB. masks: bool (N, H, W), the visible parts, disjoint. boxes: float32 (N, 4) xywh in pixels,
    tight around the masks. class_labels: int64 (N,) into CLASS_NAMES. jpeg_quality: what a file of it is saved with.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float32]
    class_labels: NDArray[np.int64]
    jpeg_quality: int


@dataclass
class Item:
    """A posed body waiting to be painted; `class_label` is None for clutter."""

    bones: Bones
    depth: float
    class_label: int | None


@dataclass
class _Light:
    """x, y, z towards the light; ambient share; how dark shadows are."""

    direction: tuple[float, float, float]
    ambient: float
    shadow: float


def render_scene(seed: int | Sequence[int], *, size: int = 256, num_objects: int | None = None, difficulty: float = 1.0) -> Scene:
    """A scene that depends on its arguments only, on every machine.

    size: the longer side; the aspect ratio varies. num_objects: how many are tried (None: 1 to 3); one that would hide
    another or find no room is left out. difficulty: 0 (plain ground, sharp, nothing in the way) to 1.
    """
    if size < 32:
        raise ValueError(f"size must be at least 32 pixels, got {size}")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty must lie in 0..1, got {difficulty}")
    if num_objects is not None and num_objects < 0:
        raise ValueError(f"num_objects must not be negative, got {num_objects}")
    rng = Generator(PCG64(SeedSequence(seed)))
    height, width = _frame(rng, size)
    light = _draw_light(rng, difficulty)
    canvas, palette = _ground(rng, height, width, difficulty)
    items = _place_bodies(rng, height, width, num_objects, difficulty)
    items += _place_clutter(rng, height, width, difficulty)
    canvas, masks, class_labels = _paint(rng, canvas, palette, items, light, difficulty)
    image = _camera(rng, canvas, difficulty)
    masks, class_labels = _drop_hidden(masks, class_labels)
    quality = int(rng.integers(70, 96)) if difficulty > 0 else 95
    return Scene(image, masks, tight_boxes(masks), class_labels, quality)


def tight_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Boolean masks (N, H, W), none of them empty -> xywh (N, 4) in pixels."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]
    return boxes


def _drop_hidden(masks: NDArray[np.bool_], class_labels: NDArray[np.int64]):
    keep = masks.sum((1, 2)) >= MIN_VISIBLE_PIXELS
    return masks[keep], class_labels[keep]


def _frame(rng: Generator, size: int) -> tuple[int, int]:
    short = max(round(size * float(rng.choice(ASPECT_RATIOS))), 24)
    return (size, short) if rng.random() < 0.3 else (short, size)


def _draw_light(rng: Generator, difficulty: float) -> _Light:
    angle, slant = 2 * np.pi * rng.random(), rng.uniform(0.4, 0.85)
    direction = (float(np.cos(angle)) * slant, float(np.sin(angle)) * slant, (1 - slant * slant) ** 0.5)
    return _Light(direction, rng.uniform(0.4, 0.65), rng.uniform(0.15, 0.55) * max(difficulty, 0.5))


def _ground(rng: Generator, height: int, width: int, difficulty: float) -> tuple[FloatArray, tuple[FloatArray, ...]]:
    """The picture without bodies, and its main colours. At difficulty 0 it is one plain, softly graded colour."""
    names = list(GROUNDS)
    main, other = (GROUNDS[names[int(i)]] for i in rng.integers(0, len(names), 2))
    colors = ground_colors(rng, main)
    plain = colors[0] * (np.linspace(1.05, 0.95, height, dtype=np.float64).astype(np.float32))[:, None, None]
    plain = plain + np.zeros((height, width, 3), np.float32)
    if difficulty == 0:
        return plain, colors
    textured = paint_ground(rng, main, colors, height, width)
    layout, edge = rng.random(), fractal_noise(rng, height, width, 3, 3)
    if layout < 0.4:
        second = paint_ground(rng, other, ground_colors(rng, other), height, width)
        if layout < 0.25:  # a horizon, at times a steep one
            slope, level = rng.normal(0, 0.15), rng.uniform(0.15, 0.6)
            ramp = np.linspace(0, 1, height)[:, None] + slope * np.linspace(-0.5, 0.5, width)[None, :]
            field = (level - ramp).astype(np.float32) + (edge - np.float32(0.5)) * np.float32(rng.uniform(0.05, 0.3))
            weight = smoothstep(field, -0.02, rng.uniform(0.0, 0.1))
        else:  # patches
            weight = smoothstep(edge, 0.5, rng.uniform(0.55, 0.75))
        textured = blend(textured, second, weight)
    sigma = float(rng.choice([0.0, 0.0, 0.6, 1.2, 2.2])) * rng.uniform(0.5, 1.0) * max(height, width) / 256
    textured = blur(textured, sigma)
    return plain + (textured - plain) * np.float32(difficulty), colors


def _place_bodies(rng: Generator, height: int, width: int, num_objects: int | None, difficulty: float) -> list[Item]:
    """Bodies of random classes; some are set on top of an earlier one, mostly of its own class."""
    side = max(height, width)
    count = int(rng.choice([1, 2, 3], p=[0.4, 0.38, 0.22])) if num_objects is None else num_objects
    largest = SIZE_RANGE[1] * min(1.0, 1.45 / max(count, 1) ** 0.6)
    items: list[Item] = []
    for _ in range(count):
        class_label, extent = int(rng.integers(len(BODIES))), side * rng.uniform(0.36, largest)
        neighbor = items[int(rng.integers(len(items)))] if items and rng.random() < 0.5 * difficulty else None
        if neighbor is not None:
            extent = 0.5 * (extent + _extent(neighbor.bones))
            if neighbor.class_label is not None and rng.random() < 0.75:
                class_label = neighbor.class_label
        extent = min(max(extent, SIZE_RANGE[0] * side), SIZE_RANGE[1] * side)
        for _ in range(PLACING_TRIES):
            center = _choose_center(rng, height, width, extent, items, neighbor)
            turn = rng.normal(0, 0.5) if class_label == UPRIGHT_CLASS else 2 * np.pi * rng.random()
            bones = pose(BODIES[class_label](rng), rng, extent=float(extent), center=center, angle=float(turn))
            item = Item(bones, 0.5 * rng.random() + 0.5 * extent / side, class_label)
            if min(visible_shares([*items, item], height, width)) >= MIN_VISIBLE_SHARE:
                items.append(item)
                break
    return items


def visible_shares(items: list[Item], height: int, width: int) -> list[float]:
    """How much of each body lies inside the picture with no other body in front, estimated on coarse cells."""
    cell = max(height, width) / 256 * PLACING_CELL
    rows, columns = round(height / cell), round(width / cell)
    taken = np.ones((3 * rows, 3 * columns), np.bool_)  # the picture lies in the middle, so that what it cuts off counts
    taken[rows : 2 * rows, columns : 2 * columns] = False
    shares = [0.0] * len(items)
    for index in sorted(range(len(items)), key=lambda index: -items[index].depth):
        bones = items[index].bones / cell
        bones[:, [AX, BX]] += columns
        bones[:, [AY, BY]] += rows
        body = relief(bones, 3 * rows, 3 * columns)
        if body is None:
            continue
        covered = body.coverage > np.float32(0.5)
        shares[index] = float((covered & ~taken[body.window]).sum() / max(int(covered.sum()), 1))
        taken[body.window] |= covered
    return shares


def _extent(bones: Bones) -> float:
    left, top, right, bottom = bounds(bones)
    return max(right - left, bottom - top)


def _choose_center(
    rng: Generator, height: int, width: int, extent: float, items: list[Item], neighbor: Item | None
) -> tuple[float, float]:
    """Beside or on the neighbour; otherwise the freest of a few random places, mostly inside the picture."""
    if neighbor is not None:
        left, top, right, bottom = bounds(neighbor.bones)
        angle, reach = 2 * np.pi * rng.random(), rng.uniform(0.3, 0.55) * (0.5 * extent + 0.5 * _extent(neighbor.bones))
        x, y = 0.5 * (left + right) + reach * np.cos(angle), 0.5 * (top + bottom) + reach * np.sin(angle)
        return float(min(max(x, 0.1 * width), 0.9 * width)), float(min(max(y, 0.1 * height), 0.9 * height))
    inset = extent * (0.5 if rng.random() < 0.75 else 0.15)
    best, best_gap = (0.5 * width, 0.5 * height), -np.inf
    for _ in range(8):
        x = rng.uniform(min(inset, 0.45 * width), max(width - inset, 0.55 * width))
        y = rng.uniform(min(inset, 0.45 * height), max(height - inset, 0.55 * height))
        gaps = [0.0]
        for item in items:
            left, top, right, bottom = bounds(item.bones)
            gap = max(abs(x - 0.5 * (left + right)), abs(y - 0.5 * (top + bottom))) - 0.5 * (extent + _extent(item.bones))
            gaps.append(min(gap, 0.0))
        if min(gaps) > best_gap:
            best, best_gap = (float(x), float(y)), min(gaps)
    return best


def _place_clutter(rng: Generator, height: int, width: int, difficulty: float) -> list[Item]:
    side, items = max(height, width), []
    for _ in range(round(float(rng.integers(0, 3)) * difficulty)):
        kind = CLUTTER[int(rng.integers(len(CLUTTER)))]
        center = (rng.uniform(0, width), rng.uniform(0, height))
        turn = rng.normal(0, 0.15) if kind is tuft else 2 * np.pi * rng.random()
        bones = pose(kind(rng), rng, extent=side * rng.uniform(0.06, 0.2), center=center, angle=float(turn))
        in_front = kind in (tuft, twig) and rng.random() < 0.4
        items.append(Item(bones, 2.0 if in_front else rng.uniform(-0.5, 0.15), None))
    return items


def _paint(
    rng: Generator, canvas: FloatArray, palette: tuple[FloatArray, ...], items: list[Item], light: _Light, difficulty: float
) -> tuple[FloatArray, NDArray[np.bool_], NDArray[np.int64]]:
    """Paint items from back to front. A pixel belongs to the body that gives more than half of its light."""
    height, width, _ = canvas.shape
    share = np.zeros((sum(item.class_label is not None for item in items), height, width), np.float32)
    class_labels: list[int] = []
    for item in sorted(items, key=lambda item: item.depth):
        body = relief(item.bones, height, width)
        if body is None:
            if item.class_label is not None:
                class_labels.append(item.class_label)
            continue
        scale = max(height, width) / 256
        out_of_focus = rng.random() < (0.25 if item.class_label is None else 0.12) * difficulty
        sigma = rng.uniform(0.5, 1.3) * scale if out_of_focus else 0.0
        _cast_shadow(canvas, body, light, rng.uniform(0.02, 0.07) * _extent(item.bones))
        color = _shade(_dress(rng, item, body, palette, difficulty), body, light, rng.uniform(0.0, 0.35))
        if item.class_label is not None:
            color = _set_off(color, canvas[body.window], body.coverage, MIN_CONTRAST * (1.5 - 0.5 * difficulty))
        alpha = blur(body.coverage, sigma)
        color = blur(color, sigma)
        canvas[body.window] = blend(canvas[body.window], color, alpha)
        share[:, body.window[0], body.window[1]] *= 1 - alpha
        if item.class_label is not None:
            share[len(class_labels), body.window[0], body.window[1]] = alpha
            class_labels.append(item.class_label)
    return canvas, share > np.float32(0.5), np.asarray(class_labels, dtype=np.int64)


def _dress(rng: Generator, item: Item, body: Relief, palette: tuple[FloatArray, ...], difficulty: float) -> FloatArray:
    """The coat of an item, before light falls on it -> (H, W, 3)."""
    if item.class_label is None:
        colors = palette if rng.random() < 0.5 else coat_colors(rng, rng.random(), None)
        kind = str(rng.choice(["mottled", "mottled", "ribs", "spots", "bands"]))
        return coat(rng, kind, (colors[0] * np.float32(rng.uniform(0.7, 1.3)), colors[1], colors[2]), body)
    own_hue = rng.normal(CLASS_HUES[item.class_label], HUE_SPREAD)
    hue = own_hue if rng.random() > 0.35 else rng.random()
    camouflage = palette if rng.random() < 0.12 * difficulty else None
    kinds = CLASS_COATS[item.class_label] if rng.random() < 0.67 else ALL_COATS
    return coat(rng, kinds[int(rng.integers(len(kinds)))], coat_colors(rng, hue, camouflage), body)


def _set_off(color: FloatArray, below: FloatArray, coverage: FloatArray, wanted: float) -> FloatArray:
    """Lighten or darken a body whose mean colour is closer than `wanted` to that of what surrounds it."""
    inside, outside = coverage > np.float32(0.5), coverage < np.float32(0.5)
    if not inside.any() or not outside.any():
        return color
    own, other = (pixels.mean(0, dtype=np.float64).round(4) for pixels in (color[inside], below[outside]))
    missing = wanted - float(np.abs(own - other).max())
    if missing <= 0:
        return color
    room_above, room_below = 0.9 - float(own.max()), float(own.max()) - 0.12
    lighten = room_above > missing and (float((own - other).sum()) > 0 or room_below < missing)
    if lighten:
        return color + np.float32(missing)
    return color * np.float32(max(1 - missing / max(float(own.max()), 0.1), 0.25))


def _shade(color: FloatArray, body: Relief, light: _Light, gloss: float) -> FloatArray:
    """Lambert's law on the height field, a soft highlight, and darker folds."""
    height = blur(body.height, 0.8)
    slope_y, slope_x = np.gradient(height)
    limit = np.float32(2.0)
    slope_y, slope_x = np.clip(slope_y, -limit, limit), np.clip(slope_x, -limit, limit)
    x, y, z = (np.float32(v) for v in light.direction)
    facing = (z - slope_x * x - slope_y * y) / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    ambient = np.float32(light.ambient)
    lit = ambient + (np.float32(1.25) - ambient) * np.maximum(facing, 0)
    highlight = np.maximum(facing, 0)
    for _ in range(4):  # the 16th power
        highlight = highlight * highlight
    return color * lit[..., None] + (highlight * np.float32(gloss))[..., None]


def _cast_shadow(canvas: FloatArray, body: Relief, light: _Light, distance: float) -> None:
    """Darken the canvas (in place) beside the body, away from the light."""
    height, width, _ = canvas.shape
    reach = int(distance * 2.5) + 2
    top, left = max(body.top - reach, 0), max(body.left - reach, 0)
    rows, columns = body.coverage.shape
    bottom, right = min(body.top + rows + reach, height), min(body.left + columns + reach, width)
    shift_y, shift_x = (round(-distance * light.direction[axis] * 1.5) for axis in (1, 0))
    cast = np.zeros((bottom - top, right - left), np.float32)
    y, x = body.top - top + shift_y, body.left - left + shift_x
    y0, x0, y1, x1 = max(y, 0), max(x, 0), min(y + rows, bottom - top), min(x + columns, right - left)
    if y0 >= y1 or x0 >= x1:
        return
    cast[y0:y1, x0:x1] = body.coverage[y0 - y : y1 - y, x0 - x : x1 - x]
    cast = blur(cast, 0.5 * distance + 0.5)
    canvas[top:bottom, left:right] *= (1 - np.float32(light.shadow) * cast)[..., None]


def _camera(rng: Generator, canvas: FloatArray, difficulty: float) -> NDArray[np.uint8]:
    """Uneven light, white balance, saturation, contrast, exposure, lens and sensor -> uint8 (H, W, 3)."""
    height, width, _ = canvas.shape
    amount = np.float32(difficulty)
    dapple = fractal_noise(rng, height, width, rng.uniform(1.5, 5), 2) - np.float32(0.5)
    canvas = canvas * (1 + dapple * amount * np.float32(rng.uniform(0.1, 0.7)))[..., None]
    gains = 1 + amount * (rng.normal(0, 0.06, 3) + rng.normal(0, 0.12)).astype(np.float32)
    canvas = canvas * gains
    grey = (canvas[..., :1] * np.float32(0.3) + canvas[..., 1:2] * np.float32(0.59)) + canvas[..., 2:] * np.float32(0.11)
    saturation = np.float32(1 - difficulty * float(rng.choice([0.0, 0.0, 0.2, 0.35, 0.6])))
    canvas = np.clip(grey + (canvas - grey) * saturation, 0, 1)
    contrast = np.float32(difficulty * rng.uniform(-0.25, 0.7))
    canvas = canvas + contrast * canvas * (1 - canvas) * (2 * canvas - 1) * 2
    haze = np.float32(difficulty * max(rng.normal(0, 0.06), 0.0))
    canvas = canvas * (1 - haze) + haze * hsv(0.58, 0.1, 0.9)
    canvas = blur(canvas, (0.35 + 0.35 * difficulty * rng.random()) * max(height, width) / 256)
    grain = rng.standard_normal(canvas.shape).astype(np.float32)  # drawn in float64: float32's tail asks libm
    noise = np.float32(difficulty * rng.uniform(0.005, 0.035)) * grain
    canvas = canvas + noise * np.sqrt(np.maximum(canvas, 0) + np.float32(0.1))
    return np.clip(canvas * 255 + np.float32(0.5), 0, 255).astype(np.uint8)

"""Surfaces of the generated photographs: noise, the coats of bodies and the grounds they lie on.

Colours are float32 RGB in 0..1. Colour ranges of classes, clutter and grounds overlap on purpose: no threshold on colour
finds the bodies, while their shape, relief, shadow and pattern do. Grounds are calmer than coats.

Shape letters: H W pixels; colours are (3,) or (H, W, 3). Determinism over machines: see scenes_shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

from .scenes_shapes import EYE, LIMB, FloatArray, Relief

# What a coat of each class mostly looks like; one in three takes any of the others.
CLASS_COATS: tuple[tuple[str, ...], ...] = (
    ("bumps", "bumps", "tips"),
    ("bands", "spots", "scales"),
    ("spiral", "spiral", "mottled"),
    ("ribs", "tips", "spots"),
    ("bands", "ribs", "mottled"),
)
ALL_COATS = ("bumps", "tips", "bands", "spots", "scales", "spiral", "mottled", "ribs")
CLASS_HUES = (0.04, 0.22, 0.1, 0.72, 0.58)  # centres; the spread is wider than their distance
HUE_SPREAD = 0.13


@dataclass(frozen=True)
class Ground:
    """A kind of ground: ranges of hue, saturation and value, and the texture that carries them."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]
    texture: str


GROUNDS: dict[str, Ground] = {
    "sand": Ground((0.07, 0.13), (0.15, 0.5), (0.5, 0.85), "grain"),
    "meadow": Ground((0.18, 0.34), (0.3, 0.7), (0.3, 0.65), "blades"),
    "water": Ground((0.48, 0.66), (0.2, 0.65), (0.25, 0.75), "ripples"),
    "cobbles": Ground((0.0, 1.0), (0.03, 0.25), (0.35, 0.75), "cells"),
    "foliage": Ground((0.12, 0.42), (0.2, 0.6), (0.2, 0.55), "bokeh"),
    "soil": Ground((0.02, 0.1), (0.25, 0.6), (0.2, 0.5), "grain"),
    "bark": Ground((0.03, 0.12), (0.1, 0.45), (0.25, 0.6), "blades"),
    "snow": Ground((0.55, 0.7), (0.02, 0.15), (0.7, 0.92), "grain"),
    "dusk": Ground((0.7, 1.05), (0.1, 0.35), (0.3, 0.8), "bokeh"),
    "reef": Ground((0.4, 1.1), (0.1, 0.45), (0.3, 0.65), "cells"),
}


def hsv(hue: float, saturation: float, value: float) -> FloatArray:
    """Hue wraps around; saturation and value are clipped -> (3,)."""
    saturation, value = min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0)
    channels = [min(max(abs((hue * 6 + shift) % 6 - 3) - 1, 0.0), 1.0) for shift in (0, 4, 2)]
    return np.array([value * (1 - saturation + saturation * c) for c in channels], dtype=np.float32)


def lattice_noise(rng: Generator, height: int, width: int, rows: float, columns: float) -> FloatArray:
    """Smooth noise in 0..1 with about `rows` x `columns` cells -> (H, W)."""
    lattice = rng.random((max(int(rows), 1) + 3, max(int(columns), 1) + 3), dtype=np.float32)
    inner = (1.0, 1.0, lattice.shape[1] - 1.0, lattice.shape[0] - 1.0)
    smooth = Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC, box=inner)
    return np.clip(np.asarray(smooth), 0, 1)


def fractal_noise(rng: Generator, height: int, width: int, cells: float, octaves: int, stretch: float = 1.0) -> FloatArray:
    """Octaves of noise, about 0..1 -> (H, W); `cells` along the longer side; `stretch` > 1 draws it out vertically."""
    side, total, weight = max(height, width), np.zeros((height, width), np.float32), np.float32(1.0)
    norm = np.float32(0.0)
    for _ in range(octaves):
        if cells > side / 1.5:
            break
        total += weight * lattice_noise(rng, height, width, cells * height / side / stretch, cells * width / side)
        norm += weight
        cells, weight = cells * 2.1, weight * np.float32(0.6)
    mean = total / max(norm, np.float32(1e-6))
    return np.clip((mean - np.float32(0.5)) * np.float32(1.6) + np.float32(0.5), 0, 1)


def cell_noise(rng: Generator, height: int, width: int, cell: float) -> tuple[FloatArray, FloatArray]:
    """Cobbles: (distance to the joint in 0..1, a random number per cell), each (H, W)."""
    rows, columns = int(height / cell) + 3, int(width / cell) + 3
    jitter_y, jitter_x, tone = rng.random((3, rows + 2, columns + 2), dtype=np.float32)
    y = (np.arange(height, dtype=np.float32) / np.float32(cell))[:, None] + np.zeros((1, width), np.float32)
    x = (np.arange(width, dtype=np.float32) / np.float32(cell))[None, :] + np.zeros((height, 1), np.float32)
    row, column = y.astype(np.int64), x.astype(np.int64)
    nearest, second = np.full((height, width), 9, np.float32), np.full((height, width), 9, np.float32)
    tones = np.zeros((height, width), np.float32)
    for i in (0, 1, 2):
        for j in (0, 1, 2):
            index = (row + i) * (columns + 2) + column + j
            off_y = row + np.float32(i - 1) + jitter_y.ravel()[index] - y
            off_x = column + np.float32(j - 1) + jitter_x.ravel()[index] - x
            distance = (off_y * off_y + off_x * off_x).astype(np.float32)
            closer = distance < nearest
            second = np.where(closer, nearest, np.minimum(second, distance))
            nearest = np.where(closer, distance, nearest)
            tones = np.where(closer, tone.ravel()[index], tones)
    return np.clip((np.sqrt(second) - np.sqrt(nearest)) * np.float32(1.8), 0, 1), tones


def blend(first: FloatArray, second: FloatArray, weight_HW: FloatArray) -> FloatArray:
    return first + (second - first) * weight_HW[..., None]


def smoothstep(field: FloatArray, low: float, high: float) -> FloatArray:
    t = np.clip((field - np.float32(low)) / np.float32(high - low), 0, 1)
    return t * t * (3 - 2 * t)


def blur(array: FloatArray, sigma: float) -> FloatArray:
    """Gaussian blur of the first two axes."""
    if sigma < 0.15:
        return array
    for axis in (0, 1):
        array = ndimage.gaussian_filter1d(array, sigma, axis=axis, mode="nearest", truncate=2.5)
    return array


def _wave(phase: FloatArray) -> FloatArray:
    """Triangle wave 0..1 of period 1: no sine, so that every machine gets the same pixels."""
    return np.abs((phase - np.floor(phase)) * 2 - 1)


def _pattern(rng: Generator, kind: str, body: Relief, noise: FloatArray) -> FloatArray:
    """Where the second colour of a coat lies -> (H, W) in 0..1."""
    u, v = body.along, body.across
    frequency = np.float32(rng.uniform(3.5, 9))
    wobble = (noise - np.float32(0.5)) * np.float32(rng.uniform(0.2, 0.9))
    if kind == "bands":
        return smoothstep(_wave(u * frequency + wobble), 0.42, 0.58)
    if kind == "ribs":
        return smoothstep(_wave(v * np.float32(rng.uniform(0.8, 1.6)) + wobble), 0.4, 0.6)
    if kind == "spiral":
        return smoothstep(_wave(u * frequency + v * np.float32(rng.choice([-0.5, 0.5])) + wobble * 0.5), 0.42, 0.58)
    if kind == "scales":
        return smoothstep(_wave(u * frequency * 3 + v * 0.5) * _wave(u * frequency * 3 - v * 0.5), 0.15, 0.4)
    if kind == "bumps":
        return smoothstep(_wave(u * frequency * 1.5 + 0.5) * _wave(v * 1.5 + 0.5) + wobble * np.float32(0.2), 0.35, 0.6)
    if kind == "tips":
        return smoothstep(u + wobble, 0.25, 0.85)
    height, width = u.shape
    if kind == "spots":
        cells = rng.uniform(5, 12)
        return smoothstep(
            lattice_noise(rng, height, width, cells * height / max(u.shape), cells * width / max(u.shape)), 0.55, 0.68
        )
    return noise


def coat(rng: Generator, kind: str, colors: tuple[FloatArray, FloatArray, FloatArray], body: Relief) -> FloatArray:
    """Paint a body: pattern, mottling, tone of the parts -> (H, W, 3)."""
    height, width = body.coverage.shape
    noise = fractal_noise(rng, height, width, max(3.0, max(height, width) / 16), 3)
    base = blend(colors[0], colors[2], noise * np.float32(rng.uniform(0.15, 0.5)))
    pattern = _pattern(rng, kind, body, noise)
    painted = blend(base, colors[1], pattern * np.float32(rng.uniform(0.55, 0.95)))
    limb_tone = np.float32(rng.uniform(0.75, 1.1))
    tone = np.where(body.part == LIMB, limb_tone, np.float32(1))
    tone = np.where(body.part == EYE, np.float32(0.15), tone)
    return painted * tone[..., None]


def ground_colors(rng: Generator, ground: Ground) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Three related colours of one ground."""
    hue, saturation, value = (rng.uniform(*span) for span in (ground.hue, ground.saturation, ground.value))
    darker = hsv(hue + rng.normal(0, 0.03), saturation * 1.15, value * rng.uniform(0.62, 0.82))
    accent = hsv(hue + rng.normal(0, 0.06), saturation * rng.uniform(0.6, 1.2), value * rng.uniform(0.85, 1.2))
    return hsv(hue, saturation, value), darker, accent


def coat_colors(
    rng: Generator, hue: float, camouflage: tuple[FloatArray, ...] | None
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Base, pattern and mottling colour of a coat; `camouflage` lends it colours of the ground."""
    saturation, value = rng.uniform(0.12, 0.72), rng.uniform(0.28, 0.95)
    second_value = value + rng.choice([-1, 1]) * rng.uniform(0.2, 0.5)
    second = hsv(hue + rng.normal(0, 0.1), saturation * rng.uniform(0.3, 1.2), min(max(second_value, 0.08), 0.98))
    third = hsv(hue + rng.normal(0, 0.06), saturation, value * rng.uniform(0.6, 1.3))
    base = hsv(hue, saturation, value)
    if camouflage is None:
        return base, second, third
    return camouflage[0] * np.float32(rng.choice([0.7, 1.3])), second, camouflage[2]


def paint_ground(
    rng: Generator, ground: Ground, colors: tuple[FloatArray, FloatArray, FloatArray], height: int, width: int
) -> FloatArray:
    """A ground of the given colours over the whole picture -> (H, W, 3)."""
    side = max(height, width)
    tones = fractal_noise(rng, height, width, rng.uniform(2, 5), 3)
    if ground.texture == "blades":
        field = fractal_noise(rng, height, width, side / rng.uniform(5, 9), 2, stretch=rng.uniform(4, 9))
        slant = ((tones - np.float32(0.5)) * np.float32(side / 12)).astype(np.int64)
        columns = np.clip(np.arange(width)[None, :] + slant, 0, width - 1)
        field = np.take_along_axis(field, columns, axis=1)
    elif ground.texture == "ripples":
        field = fractal_noise(rng, height, width, rng.uniform(5, 12), 3, stretch=rng.uniform(0.2, 0.35))
    elif ground.texture == "cells":
        joint, tone = cell_noise(rng, height, width, side * rng.uniform(0.05, 0.13))
        field = tone * np.float32(0.8) + np.float32(0.2) * fractal_noise(rng, height, width, side / 8, 2)
        painted = blend(blend(colors[0], colors[1], field), colors[2], tones * np.float32(0.5))
        return painted * (np.float32(0.62) + np.float32(0.38) * smoothstep(joint, 0, 0.5))[..., None]
    elif ground.texture == "bokeh":
        field = smoothstep(fractal_noise(rng, height, width, rng.uniform(5, 10), 2), 0.3, 0.7)
    else:
        field = fractal_noise(rng, height, width, rng.uniform(12, 40), 4)
    painted = blend(colors[0], colors[1], smoothstep(field, 0.15, 0.9))
    painted = blend(painted, colors[2], smoothstep(tones, 0.4, 0.8) * np.float32(0.7))
    if ground.texture in ("grain", "blades"):
        slope = np.diff(field, axis=1, prepend=field[:, :1]) * np.float32(rng.uniform(0.5, 1.5))
        painted = painted * np.clip(1 + slope, np.float32(0.6), np.float32(1.4))[..., None]
    return painted

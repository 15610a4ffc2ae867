"""Bodies of the generated photographs: five articulated or holed kinds, and the clutter that belongs to no class.

A body is a set of *bones*: tapered capsules with a radius at either end, in a unit frame (x right, y down). `pose` bends,
turns and scales a body into the image; `relief` turns it into coverage, a height field and coordinates along (u) and
across (v) the bones, which the textures follow.

Shape letters: N bones, K points of a chain, H W the window of the image that a body covers.
Determinism over machines: transcendental functions run in float64 on a few points; whole-image arithmetic is float32 with
the correctly rounded operations + - * / sqrt only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

CLASS_NAMES: tuple[str, ...] = ("starfish", "gecko", "wreath", "jellyfish", "bird")

# Columns of a bone: where it starts, where it ends, its radii there, u there, how far it lies above the ground, its part.
AX, AY, BX, BY, RADIUS_A, RADIUS_B, U_A, U_B, LIFT, PART = range(10)
BODY, LIMB, EYE = 0, 1, 2  # parts: limbs get a tone of their own, eyes are dark

Bones = NDArray[np.float64]  # (N, 10)
FloatArray = NDArray[np.floating]  # float32 all along; numpy's stubs widen sums with Python floats
TURN = 2 * np.pi
MIN_RADIUS = 0.55  # pixels; thinner ends would flicker between covered and not


@dataclass
class Relief:
    """A body on its window of the image: coverage and height (pixels) and coat coordinates, each (H, W) float32."""

    top: int
    left: int
    coverage: FloatArray
    height: FloatArray
    along: FloatArray
    across: FloatArray
    part: FloatArray

    @property
    def window(self) -> tuple[slice, slice]:
        rows, columns = self.coverage.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + columns)


def chain(
    points: NDArray, radii: NDArray, *, along: tuple[float, float] = (0, 1), lift: float | NDArray = 0.0, part: int = BODY
) -> Bones:
    """K points with K radii -> K - 1 bones; `lift` is one number or one per bone."""
    points = np.asarray(points, dtype=np.float64)
    u = np.linspace(along[0], along[1], len(points))
    bones = np.empty((len(points) - 1, 10))
    bones[:, AX : AY + 1], bones[:, BX : BY + 1] = points[:-1], points[1:]
    bones[:, RADIUS_A], bones[:, RADIUS_B] = radii[:-1], radii[1:]
    bones[:, U_A], bones[:, U_B] = u[:-1], u[1:]
    bones[:, LIFT], bones[:, PART] = lift, part
    return bones


def _directions(angles: NDArray) -> NDArray:
    return np.stack([np.cos(angles), np.sin(angles)], -1)


def starfish(rng: Generator) -> Bones:
    num_arms = int(rng.choice([5, 5, 5, 6, 7]))
    thickness, curl = rng.uniform(0.27, 0.35), rng.normal(0, 0.35)
    angles = TURN * (np.arange(num_arms) + rng.uniform(-0.17, 0.17, num_arms)) / num_arms
    t = np.linspace(0.06, 1, 7)
    bones = []
    for angle in angles:
        wave = rng.uniform(0.05, 0.3) * np.sin(TURN * (t * rng.uniform(0.5, 1.0) + rng.random())) * t
        arm = _directions(angle + (curl + rng.normal(0, 0.15)) * t * t + wave) * (t * rng.uniform(0.75, 1.1))[:, None]
        bones.append(chain(arm, thickness * (1.05 - 0.65 * t)))
    heart = chain(np.array([[-0.02, 0.0], [0.02, 0.0]]), np.full(2, thickness * 1.25), along=(0, 0.05))
    return np.concatenate([*bones, heart])


def _gecko_leg(rng: Generator, hip: NDArray, heading: float, side: int, fore: float, thickness: float) -> Bones:
    angle = heading + side * (np.pi / 2 - fore * rng.uniform(0.1, 0.8))
    knee = hip + _directions(np.array([angle]))[0] * rng.uniform(0.17, 0.23)
    bend = angle + side * rng.uniform(0.2, 1.2) * fore
    foot = knee + _directions(np.array([bend]))[0] * rng.uniform(0.14, 0.22)
    parts = [chain(np.stack([hip, knee, foot]), thickness * np.array([1.3, 1.0, 0.9]), part=LIMB, lift=-0.03)]
    for spread in (-0.6, 0.6):  # a paw with two broad lobes: single toes would be thinner than a cell of a mask grid
        toe = foot + _directions(np.array([bend - 0.4 * side * fore + spread]))[0] * 0.08
        parts.append(chain(np.stack([foot, toe]), thickness * np.array([1.0, 0.9]), part=LIMB, lift=-0.03))
    return np.concatenate(parts)


def gecko(rng: Generator) -> Bones:
    s = np.linspace(0, 1, 19)
    amplitude, frequency, phase = rng.uniform(0.4, 1.5), rng.uniform(0.7, 1.3), rng.random()
    heading = amplitude * np.sin(TURN * (frequency * s + phase)) + rng.normal(0, 1.6) * np.maximum(s - 0.55, 0)
    spine = np.cumsum(_directions(heading), axis=0) * (2.0 / len(s))
    knots = [0, 0.04, 0.11, 0.18, 0.25, 0.38, 0.5, 0.6, 1]
    fatness = rng.uniform(1.4, 1.8)
    radii = fatness * np.interp(s, knots, [0.05, 0.1, 0.125, 0.09, 0.12, 0.14, 0.12, 0.09, 0.05])
    bones = [chain(spine, radii, lift=0.02)]
    for index, fore in ((5, -1.0), (9, 1.0)):
        for side in (-1, 1):
            bones.append(_gecko_leg(rng, spine[index], heading[index], side, fore, 0.06 * fatness))
    sideways = _directions(np.array([heading[1] + np.pi / 2]))[0] * 0.085 * fatness
    for side in (-1, 1):
        eye = spine[1] + side * sideways
        bones.append(chain(np.stack([eye, eye + 0.01]), np.full(2, 0.03 * fatness), part=EYE, lift=0.08))
    return np.concatenate(bones)


def wreath(rng: Generator) -> Bones:
    """A hoop of one to three twisted strands, some with spurs: a body with a hole."""
    num_strands = int(rng.choice([1, 2, 2, 3]))
    theta = np.linspace(0, TURN, 31)
    wobble = 1 + rng.uniform(0, 0.09) * np.sin(int(rng.integers(2, 4)) * theta + TURN * rng.random())
    twists, offset = int(rng.integers(3, 6)), 0.0 if num_strands == 1 else rng.uniform(0.1, 0.12)
    thickness = rng.uniform(0.18, 0.23) if num_strands == 1 else rng.uniform(0.13, 0.15)
    bones = []
    for strand in range(num_strands):
        angle = twists * theta + TURN * strand / num_strands
        points = _directions(theta) * (wobble * 0.78 + offset * np.cos(angle))[:, None]
        lift = 0.1 * np.sin(0.5 * (angle[1:] + angle[:-1])) if num_strands > 1 else 0.0
        radii = thickness * (1 + 0.12 * np.sin(4 * theta + strand))
        bones.append(chain(points, radii, along=(0, 3), lift=lift))
    if rng.random() < 0.4:
        for angle in TURN * (np.arange(7) + rng.uniform(-0.3, 0.3, 7)) / 7:
            root, tip = _directions(np.array([angle, angle + rng.uniform(0.1, 0.3)])) * [[0.8], [1.12]]
            bones.append(chain(np.stack([root, tip]), thickness * np.array([0.8, 0.55]), part=LIMB, lift=-0.03))
    return np.concatenate(bones)


def jellyfish(rng: Generator) -> Bones:
    opening, dome = rng.uniform(1.15, 1.6), rng.uniform(0.24, 0.33)
    theta = np.linspace(-opening, opening, 11)
    arc = np.stack([np.sin(theta) * rng.uniform(0.42, 0.55), -np.cos(theta) * rng.uniform(0.35, 0.5)], -1)
    bones = [chain(arc, dome * (1.05 - 0.7 * (theta / opening) ** 2), lift=0.12)]
    t = np.linspace(0, 1, 9)
    num_tentacles, drift = int(rng.integers(3, 6)), rng.normal(0, 0.3)
    for root in np.linspace(-0.5, 0.5, num_tentacles) + rng.uniform(-0.04, 0.04, num_tentacles):
        wave = rng.uniform(0.03, 0.1) * np.sin(TURN * (rng.uniform(0.8, 1.8) * t + rng.random())) * (0.3 + t)
        length = rng.uniform(0.7, 1.25)
        points = np.stack([root * (1 + 0.35 * t) + wave + drift * t * t, -0.22 + length * t], -1)
        bones.append(chain(points, rng.uniform(0.095, 0.125) * (1.1 - 0.35 * t), part=LIMB, lift=-0.1))
    return np.concatenate(bones)


def _bird_wing(rng: Generator, side: int, reach: float, raise_: float) -> Bones:
    arm = np.array([[0.05, -0.16], [0.45, -0.34], [0.75, -0.26], [1.02, -0.12]])
    arm[:, 1] += raise_ * arm[:, 0]
    num_feathers = 5
    t = np.linspace(0.1, 1, num_feathers)
    roots = np.stack([np.interp(t, np.linspace(0, 1, 4), arm[:, axis]) for axis in (0, 1)], -1)
    angles = np.pi / 2 + 0.25 - (0.3 + rng.uniform(0.6, 1.1)) * t**1.5
    tips = roots + _directions(angles) * (rng.uniform(0.3, 0.44) * (0.8 + 0.3 * t))[:, None]
    bones = [chain(arm, np.array([0.2, 0.18, 0.17, 0.14]), lift=0.05)]
    for root, tip in zip(roots, tips, strict=True):
        middle = 0.5 * (root + tip)
        bones.append(chain(np.stack([root, middle, tip]), np.array([0.13, 0.15, 0.1]), part=LIMB, lift=-0.04))
    wing = np.concatenate(bones)
    wing[:, [AX, BX]] *= side * reach
    return wing


def bird(rng: Generator) -> Bones:
    trunk = np.array([[0, -0.62], [0, -0.5], [0, -0.3], [0, -0.05], [0, 0.2], [0, 0.36]])
    bones = [chain(trunk, rng.uniform(1.4, 1.8) * np.array([0.08, 0.11, 0.1, 0.15, 0.13, 0.08]), lift=0.08)]
    bones.append(chain(np.array([[0, -0.64], [0, -0.76]]), np.array([0.07, 0.04]), part=EYE, lift=0.02))
    raise_ = rng.normal(0, 0.25)
    for side in (-1, 1):
        bones.append(_bird_wing(rng, side, rng.uniform(0.6, 0.88), raise_ + rng.normal(0, 0.15)))
    fan, length = rng.uniform(0.12, 0.4), rng.uniform(0.3, 0.5)
    for spread in np.linspace(-fan, fan, 3):
        tip = np.array([0, 0.3]) + _directions(np.array([np.pi / 2 + spread]))[0] * length
        bones.append(chain(np.stack([[0, 0.3], tip]), np.array([0.11, 0.13]), part=LIMB, lift=-0.02))
    return np.concatenate(bones)


def pebble(rng: Generator) -> Bones:
    points = rng.uniform(-0.5, 0.5, (3, 2)) * [1.0, 0.6]
    return chain(points, rng.uniform(0.3, 0.55, 3))


def leaf(rng: Generator) -> Bones:
    t = np.linspace(0, 1, 9)
    points = np.stack([2 * t - 1, rng.normal(0, 0.25) * np.sin(np.pi * t)], -1)
    return chain(points, rng.uniform(0.22, 0.42) * np.sin(np.pi * (0.03 + 0.94 * t)) + 0.02, lift=-0.1)


def twig(rng: Generator) -> Bones:
    t = np.linspace(-1, 1, 7)
    stem = np.stack([t, np.cumsum(rng.normal(0, 0.12, 7))], -1)
    bones = [chain(stem, rng.uniform(0.04, 0.09) * (1.2 - 0.5 * (t + 1) / 2))]
    for index in rng.choice(np.arange(1, 6), int(rng.integers(1, 4)), replace=False):
        tip = stem[index] + [rng.uniform(0.15, 0.5), rng.choice([-1, 1]) * rng.uniform(0.2, 0.5)]
        bones.append(chain(np.stack([stem[index], tip]), np.array([0.04, 0.015])))
    return np.concatenate(bones)


def tuft(rng: Generator) -> Bones:
    """Blades of grass from one root."""
    t = np.linspace(0, 1, 5)
    bones = []
    for lean in rng.normal(0, 0.5, int(rng.integers(3, 8))):
        points = np.stack([rng.uniform(-0.25, 0.25) + lean * t * t, 1 - rng.uniform(1.2, 2.0) * t], -1)
        bones.append(chain(points, rng.uniform(0.03, 0.055) * (1.1 - t) + 0.008))
    return np.concatenate(bones)


BODIES: tuple[Callable[[Generator], Bones], ...] = (starfish, gecko, wreath, jellyfish, bird)
CLUTTER: tuple[Callable[[Generator], Bones], ...] = (pebble, pebble, leaf, twig, tuft)


def pose(bones: Bones, rng: Generator, *, extent: float, center: tuple[float, float], angle: float) -> Bones:
    """Bend the body by a smooth random field, foreshorten, turn, and fit its longer side to `extent` pixels at `center`."""
    bones = bones.copy()
    frequencies, phases = rng.normal(0, 1.6, (2, 2)), TURN * rng.random((2, 2))
    amplitudes = rng.uniform(0.0, 0.07, (2, 2))
    squeeze, viewpoint = rng.uniform(0.72, 1.0), TURN * rng.random()
    for columns in ([AX, AY], [BX, BY]):
        points = bones[:, columns]
        for wave in (0, 1):
            phase = points[:, :1] * frequencies[wave, 0] + points[:, 1:] * frequencies[wave, 1] + phases[wave]
            points = points + amplitudes[wave] * np.sin(phase)
        points = _turn(points, viewpoint) * [1.0, squeeze]
        bones[:, columns] = _turn(points, angle - viewpoint)
    bones[:, [RADIUS_A, RADIUS_B]] *= np.sqrt(squeeze)
    left, top, right, bottom = bounds(bones)
    scale = extent / max(right - left, bottom - top)
    bones[:, [AX, BX]] = (bones[:, [AX, BX]] - 0.5 * (left + right)) * scale + center[0]
    bones[:, [AY, BY]] = (bones[:, [AY, BY]] - 0.5 * (top + bottom)) * scale + center[1]
    bones[:, [RADIUS_A, RADIUS_B]] = np.maximum(bones[:, [RADIUS_A, RADIUS_B]] * scale, MIN_RADIUS)
    bones[:, LIFT] *= scale
    return bones


def _turn(points: NDArray, angle: float) -> NDArray:
    """(K, 2) turned by `angle`; written out, since BLAS may round otherwise on another machine."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.stack([cosine * points[:, 0] - sine * points[:, 1], sine * points[:, 0] + cosine * points[:, 1]], -1)


def bounds(bones: Bones) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the body, radii included."""
    low = [np.minimum(bones[:, a] - bones[:, RADIUS_A], bones[:, b] - bones[:, RADIUS_B]) for a, b in ((AX, BX), (AY, BY))]
    high = [np.maximum(bones[:, a] + bones[:, RADIUS_A], bones[:, b] + bones[:, RADIUS_B]) for a, b in ((AX, BX), (AY, BY))]
    return float(low[0].min()), float(low[1].min()), float(high[0].max()), float(high[1].max())


def relief(bones: Bones, height: int, width: int) -> Relief | None:
    """The posed body on the pixels of a (height, width) image, or None when it lies outside."""
    left, top, right, bottom = bounds(bones)
    x0, y0 = max(int(np.floor(left)) - 2, 0), max(int(np.floor(top)) - 2, 0)
    x1, y1 = min(int(np.ceil(right)) + 2, width), min(int(np.ceil(bottom)) + 2, height)
    if x1 - x0 < 3 or y1 - y0 < 3:
        return None
    shape = (y1 - y0, x1 - x0)
    margin, surface = np.full(shape, -9, np.float32), np.full(shape, -1e6, np.float32)
    along, across, part = (np.zeros(shape, np.float32) for _ in range(3))
    bones = bones.copy()
    bones[:, [AX, BX]] -= x0 + 0.5  # pixel (0, 0) of the window has its centre there
    bones[:, [AY, BY]] -= y0 + 0.5
    for bone in bones.astype(np.float32):
        _raise_bone(bone, margin, surface, along, across, part)
    np.clip(margin + np.float32(0.5), 0, 1, out=margin)
    np.maximum(surface, 0, out=surface)
    return Relief(y0, x0, margin, surface, along, across, part)


def _raise_bone(
    bone: FloatArray, margin: FloatArray, surface: FloatArray, along: FloatArray, across: FloatArray, part: FloatArray
) -> None:
    """Add one bone to the buffers (in place), touching only the pixels around it."""
    ax, ay, bx, by, radius_a, radius_b, u_a, u_b, lift, kind = bone
    reach = max(radius_a, radius_b) + 2
    rows, columns = margin.shape
    x0, x1 = max(int(min(ax, bx) - reach), 0), min(int(max(ax, bx) + reach) + 2, columns)
    y0, y1 = max(int(min(ay, by) - reach), 0), min(int(max(ay, by) + reach) + 2, rows)
    if x0 >= x1 or y0 >= y1:
        return
    window = (slice(y0, y1), slice(x0, x1))
    x = np.arange(x0, x1, dtype=np.float32)[None, :] - ax
    y = np.arange(y0, y1, dtype=np.float32)[:, None] - ay
    dx, dy = bx - ax, by - ay
    squared_length = max(dx * dx + dy * dy, np.float32(1e-6))
    t = np.clip((x * (dx / squared_length)) + (y * (dy / squared_length)), 0, 1)
    off_x, off_y = x - t * dx, y - t * dy
    distance = np.sqrt(off_x * off_x + off_y * off_y)
    radius = radius_a + t * (radius_b - radius_a)
    inside = radius - distance
    rise = np.sqrt(np.maximum(inside * (radius + distance), 0)) + np.minimum(inside, 0) + lift
    np.maximum(margin[window], inside, out=margin[window])
    higher = rise > surface[window]
    side = np.where(x * dy > y * dx, np.float32(1), np.float32(-1))
    np.copyto(surface[window], rise, where=higher)
    np.copyto(along[window], u_a + t * (u_b - u_a), where=higher)
    np.copyto(across[window], side * distance / radius, where=higher)
    np.copyto(part[window], kind, where=higher)

"""Pictures for people: instances drawn on an image, and sheets of such pictures.

Shape letters: n instances, H W rows and columns of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

# Soft, of similar lightness, neighbours far apart in hue.
PALETTE = (
    (255, 122, 89),
    (64, 156, 255),
    (120, 200, 80),
    (190, 120, 240),
    (255, 190, 60),
    (40, 190, 185),
    (245, 110, 175),
    (150, 150, 250),
    (205, 160, 110),
    (170, 205, 50),
    (235, 95, 110),
    (90, 205, 240),
)
_FILL_OPACITY, _SHADOW_OPACITY = 0.42, 0.35
_MIN_SIDE = 640
_MOST_NAMES = 30
_NORMAL_QUANTILES = torch.special.ndtri(torch.linspace(0, 1, 256).clamp(1e-3, 1 - 1e-3)).numpy()
_INK, _MUTED, _PAPER = (38, 42, 48), (105, 112, 122), (255, 255, 255)

Box = tuple[float, float, float, float]


def draw_instances(
    image: Image.Image,
    result: Mapping[str, Any],
    id2label: Mapping[int, str] | None = None,
    *,
    threshold: float = 0.0,
    max_instances: int = 300,
    side: int | None = None,
    with_boxes: bool = True,
    with_masks: bool = True,
    with_labels: bool = True,
    text_size: int | None = None,
) -> Image.Image:
    """Masks with contours, boxes and names over a picture.

    result: the post-processing's format, `boxes` (n, 4) xyxy and `labels` (n,), optionally `masks` (n, H, W) and `scores`
    (n,): without scores (annotations, pseudo masks) only names are written. Of the instances that reach `threshold` the
    `max_instances` best are drawn, the largest first, so that small ones stay visible; more than 30 are drawn without their
    names, which would hide them. side: longer side of the result; left
    out, the picture keeps its size but is enlarged to at least 640 pixels. Resizing comes first, so that lines and text stay
    crisp: for a sheet, give the sheet's cell size. text_size: of the names, in pixels of the result; left out, it grows with it.
    """
    scale = (side or max(_MIN_SIDE, *image.size)) / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    line_width = max(1.6, max(size) / 360)
    boxes_n4 = torch.as_tensor(result["boxes"]).cpu().float().reshape(-1, 4) * scale
    rows = _rows_to_draw(result, boxes_n4, threshold, max_instances)
    colors = {row: PALETTE[row % len(PALETTE)] for row in rows}
    if with_masks and result.get("masks") is not None:
        for row in rows:
            mask_HW = torch.as_tensor(result["masks"][row]).cpu().numpy() > 0.5
            canvas = _draw_mask(canvas, mask_HW, colors[row], line_width)
    if with_boxes:
        canvas = _draw_boxes(canvas, {row: _box(boxes_n4[row]) for row in rows}, colors, line_width)
    if with_labels and len(rows) <= _MOST_NAMES:
        texts = {row: _text(result, row, id2label) for row in rows}
        _draw_labels(canvas, {row: _box(boxes_n4[row]) for row in rows}, texts, colors, text_size)
    return canvas


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    titles: Sequence[str] = (),
    captions: Sequence[str] = (),
    *,
    cell_size: int = 400,
    gap: int = 12,
) -> Image.Image:
    """Pictures in rows, with a title over each column and a caption under each row; None leaves a cell empty.

    Each picture keeps its aspect ratio within `cell_size` squared; a row is as high as its highest picture.
    """
    num_columns = max([len(row) for row in rows] + [len(titles), 1])
    cells = [[None if cell is None else _fitted(cell, cell_size) for cell in row] for row in rows]
    title_height = 34 if titles else 0
    caption_height = 28 if captions else 0
    heights = [max([cell.height for cell in row if cell is not None], default=cell_size) for row in cells]
    width = num_columns * (cell_size + gap) + gap
    height = gap + title_height + sum(row_height + caption_height + gap for row_height in heights)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        center = gap + column * (cell_size + gap) + cell_size / 2
        draw.text((center, gap + 10), _shortened(title, 18, cell_size), _INK, _font(18), anchor="mm")
    top = gap + title_height
    for k, row in enumerate(cells):
        for column, cell in enumerate(row):
            if cell is not None:
                left = gap + column * (cell_size + gap) + (cell_size - cell.width) // 2
                sheet.paste(cell, (left, top + (heights[k] - cell.height) // 2))
        top += heights[k]
        if k < len(captions):
            draw.text((gap, top + 14), _shortened(captions[k], 15, width - 2 * gap), _MUTED, _font(15), anchor="lm")
        top += caption_height + gap
    return sheet


def _rows_to_draw(result: Mapping[str, Any], boxes_n4: Tensor, threshold: float, max_instances: int) -> list[int]:
    scores = result.get("scores")
    scores_n = torch.ones(len(boxes_n4)) if scores is None else torch.as_tensor(scores).cpu().float()
    best = torch.argsort(scores_n, descending=True, stable=True)[:max_instances]
    best = best[scores_n[best] >= threshold]
    areas = (boxes_n4[best, 2:] - boxes_n4[best, :2]).prod(-1)
    return best[torch.argsort(areas, descending=True, stable=True)].tolist()


def _box(box_4: Tensor) -> Box:
    x1, y1, x2, y2 = box_4.tolist()
    return x1, y1, x2, y2


def _text(result: Mapping[str, Any], row: int, id2label: Mapping[int, str] | None) -> str:
    label = int(result["labels"][row])
    name = str(label) if id2label is None else id2label[label]
    return name if result.get("scores") is None else f"{name} {float(result['scores'][row]):.2f}"


def _draw_mask(canvas: Image.Image, mask_HW: np.ndarray, color: tuple[int, ...], line_width: float) -> Image.Image:
    """A translucent fill, a light line along the edge and a soft shadow around it, so that the edge shows on any ground.

    All three are smooth functions of the distance from the edge. The distance comes from blurring: across a straight edge
    a blurred mask is the normal distribution function, whose inverse gives the distance in units of the radius.
    """
    if not mask_HW.any():
        return canvas
    radius = max(1.0, 0.5 * canvas.width / mask_HW.shape[1])  # wide enough to hide the steps of enlarged masks
    mask = Image.fromarray(mask_HW.astype(np.uint8) * 255).resize(canvas.size, Image.Resampling.BILINEAR)
    margin = round(4 * radius + line_width) + 1
    left, top, right, bottom = mask.getbbox() or (0, 0, *canvas.size)
    area = (
        max(left - margin, 0),
        max(top - margin, 0),
        min(right + margin, canvas.width),
        min(bottom + margin, canvas.height),
    )
    level_HW = np.asarray(mask.crop(area).filter(ImageFilter.GaussianBlur(radius)))
    distance_HW = radius * _NORMAL_QUANTILES[level_HW]  # pixels, positive inside
    fill_HW = (distance_HW + 0.5).clip(0, 1) * _FILL_OPACITY
    line_HW = (line_width / 2 + 0.5 - np.abs(distance_HW)).clip(0, 1)
    shadow_HW = (1 + (distance_HW + line_width / 2) / line_width).clip(0, 1) * (distance_HW < 0) * _SHADOW_OPACITY
    pixels = np.asarray(canvas.crop(area), dtype=np.float32)
    tint = (np.array(color) + 255) / 2
    for paint, opacity_HW in ((_INK, shadow_HW), (color, fill_HW), (tint, line_HW)):
        pixels = pixels + (np.asarray(paint, dtype=np.float32) - pixels) * opacity_HW[..., None]
    canvas = canvas.copy()
    canvas.paste(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), area[:2])
    return canvas


def _draw_boxes(
    canvas: Image.Image, boxes: Mapping[int, Box], colors: Mapping[int, tuple[int, ...]], line_width: float
) -> Image.Image:
    layer = Image.new("RGBA", canvas.size)
    draw, width = ImageDraw.Draw(layer), max(1, round(line_width * 0.8))
    for row, box in boxes.items():
        x1, y1, x2, y2 = (round(value) for value in box)
        outline = (x1, y1, max(x2 - 1, x1 + 1), max(y2 - 1, y1 + 1))
        draw.rounded_rectangle(outline, radius=3 * width, outline=(*colors[row], 235), width=width)
    return Image.alpha_composite(canvas.convert("RGBA"), layer).convert("RGB")


def _draw_labels(
    canvas: Image.Image,
    boxes: Mapping[int, Box],
    texts: Mapping[int, str],
    colors: Mapping[int, tuple[int, ...]],
    text_size: int | None,
) -> None:
    """Names on small plates at the boxes' corners, each at the first place where it covers no other; one that finds no
    place is left out rather than printed over another."""
    text_size = text_size or max(12, round(max(canvas.size) / 48))
    font, draw = _font(text_size), ImageDraw.Draw(canvas)
    height = round(text_size * 1.45)
    taken: list[Box] = []
    for row, box in sorted(boxes.items(), key=lambda item: item[1][1]):
        width = round(font.getlength(texts[row]) + text_size * 0.8)
        place = _free_place(box, width, height, canvas.size, taken)
        if place is None:
            continue
        taken.append(place)
        draw.rounded_rectangle(place, radius=height / 4, fill=colors[row])
        middle = ((place[0] + place[2]) / 2, (place[1] + place[3]) / 2)
        draw.text(middle, texts[row], _INK, font, anchor="mm")


def _free_place(box: Box, width: int, height: int, canvas_size: tuple[int, int], taken: list[Box]) -> Box | None:
    x1, y1, x2, y2 = box
    corners = [(x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x2 - width, y1), (x1, y2), (x2 - width, y2)]
    for left, top in corners:
        left = min(max(left, 0), max(canvas_size[0] - width, 0))
        if 0 <= top <= canvas_size[1] - height:
            place = (left, top, left + width, top + height)
            if not any(_overlap(place, other) for other in taken):
                return place
    return None


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _fitted(image: Image.Image, cell_size: int) -> Image.Image:
    scale = cell_size / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _shortened(text: str, text_size: int, width: float) -> str:
    font = _font(text_size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _font(size: int) -> Any:
    return ImageFont.load_default(size)

"""The canvas on which boxes are drawn, with a mouse or a finger (`gradio_image_annotation`)."""

from __future__ import annotations

from typing import Any

import gradio as gr
from gradio_image_annotation import image_annotator

from boxes import MAX_BOXES, NamedBox
from uploads import take_uploads_only, uploaded_path


def box_canvas(label: str) -> image_annotator:
    """Gives {"image": path of the uploaded file, "boxes": list of NamedBox}, or None."""
    return image_annotator(
        label=label,
        image_type="filepath",
        sources=["upload", "clipboard"],
        disable_edit_boxes=True,
        box_min_size=4,
        handle_size=10,
        boxes_alpha=0.15,
        show_remove_button=True,
        show_download_button=False,
        show_share_button=False,
        elem_id="canvas",
    )


def annotated(path: str, boxes: list[NamedBox]) -> dict[str, Any]:
    """The value that shows these boxes on this picture."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    return {"image": path, "boxes": [dict(zip(corners, b.corners(), strict=True)) | {"label": b.name} for b in boxes]}


def _drawn(payload: Any) -> dict[str, Any] | None:
    if payload is None or payload.image is None:
        return None
    if payload.orientation:
        raise gr.Error("Please turn the picture before you upload it.")
    return {"image": uploaded_path(payload.image), "boxes": [_box(box) for box in payload.boxes[: MAX_BOXES + 1]]}


def _box(drawn: dict[str, Any]) -> NamedBox:
    """The canvas counts in its own pixels and says how many of them make one of the picture."""
    try:
        scale = float(drawn.get("scaleFactor") or 1)
        x1, y1, x2, y2 = (float(drawn[side]) / scale for side in ("xmin", "ymin", "xmax", "ymax"))
    except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise gr.Error("These boxes cannot be read.") from None
    return NamedBox(x1, y1, x2, y2, str(drawn.get("label") or "")[:60])


take_uploads_only(image_annotator, _drawn)

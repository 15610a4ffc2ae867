"""Instance masks from boxes, to try in a browser, from Python (gradio_client) or from an agent (MCP).

`SIM_MODEL=owner/name SIM_REVISION=commit python app.py`; without them, the checkpoint that comes with sim_hf.
"""

from __future__ import annotations

import html
import json
import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image
from starlette.middleware import Middleware

from box_canvas import annotated, box_canvas
from boxes import MAX_TEXT, boxes_inside, parse_boxes
from example_pictures import examples
from segmenter import MIN_SCORE, Found, Segmenter, load_segmenter
from uploads import MAX_UPLOAD_BYTES, BodyLimit, UploadError, read_upload, restrict_pillow, take_uploads_only, uploaded_path

TITLE = "Masks from boxes"
SUBTITLE = (
    "A small network that learned to cut out objects from **bounding boxes alone**: in training it never saw a mask. "
    "Mask2Former with [SIM (CVPR 2023)](https://arxiv.org/abs/2303.08578)."
)
DEFAULT_SCORE = 0.5
_HEIGHT = 400
_QUEUE_LENGTH = 16
_STATE_SECONDS, _SESSIONS = 1800, 50  # how long, and of how many visitors, the last result is kept for the slider
_CLEAN_EVERY, _FILES_LIVE = 300, 3600  # seconds; longer than the longest wait in the queue
# One picture at a time, whoever sends it: memory and threads are those of one request.
_BUSY = {"concurrency_id": "network", "concurrency_limit": 1}
_SHOW_RESULT = "() => document.querySelector('#{}').scrollIntoView({{behavior: 'smooth', block: 'nearest'}})"
take_uploads_only(gr.Image, uploaded_path)
_CSS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "style.css")


def build(segmenter: Segmenter) -> gr.Blocks:
    gr.set_static_paths([example.path for example in examples()])  # served as they lie, and never cleaned away
    with gr.Blocks(title=TITLE, delete_cache=(_CLEAN_EVERY, _FILES_LIVE)) as demo:
        gr.Markdown(f"# {TITLE}\n{SUBTITLE}", elem_id="head")
        with gr.Tabs():
            with gr.Tab("Find objects"):
                _find_tab(segmenter)
            with gr.Tab("Boxes to masks"):
                _boxes_tab(segmenter)
        with gr.Accordion(f"The {len(segmenter.names)} classes that it can name", open=False):
            gr.HTML(f"<p>{html.escape(', '.join(segmenter.names.values()))}</p>")
        _endpoints(segmenter)
    demo.queue(max_size=_QUEUE_LENGTH, default_concurrency_limit=1)
    return demo


def _find_tab(segmenter: Segmenter) -> None:
    with gr.Row():
        with gr.Column(min_width=320):
            picture = _picture_input("Your picture")
            gallery = _example_gallery()
        with gr.Column(min_width=320, elem_id="found"):
            score = gr.Slider(
                MIN_SCORE,
                1,
                DEFAULT_SCORE,
                step=0.01,
                label="Least score",
                info="Lower shows more objects, and more doubtful ones.",
            )
            result = _Result("Pick an example or upload a picture, and its objects are shown here.", "instances.json")
    found = gr.State(time_to_live=_STATE_SECONDS)

    def find(path: str | None, least_score: float) -> list[Any]:
        if path is None:
            return [None, *result.empty()]
        try:
            instances = segmenter.find(read_upload(path))
        except UploadError as error:
            return [None, *result.empty(str(error))]
        return [instances, *result.filled(instances, least_score)]

    def filtered(instances: Found | None, least_score: float) -> list[Any]:
        return [gr.skip()] * 4 if instances is None else result.filled(instances, least_score)

    picture.change(
        find, [picture, score], [found, *result.outputs], api_visibility="private", show_progress_on=result.status, **_BUSY
    ).then(None, js=_SHOW_RESULT.format("found"))
    score.change(
        filtered, [found, score], result.outputs, api_visibility="private", show_progress="hidden", trigger_mode="always_last"
    )
    pictures = [str(example.path) for example in examples()]

    def choose(chosen: gr.SelectData) -> str:
        return pictures[chosen.index]

    gallery.select(choose, None, picture, api_visibility="private", show_progress="hidden")


def _boxes_tab(segmenter: Segmenter) -> None:
    with gr.Row():
        with gr.Column(min_width=320):
            canvas = box_canvas("Draw a box around each object")
            gr.Markdown("The square draws, the hand moves, the bin removes.", elem_id="tools")
            button = gr.Button("Make masks", variant="primary", elem_id="make-masks")
            gallery = _example_gallery()
            with gr.Accordion("Paste boxes, name the objects", open=False):
                text = gr.Textbox(
                    label="Boxes",
                    info="One a line: x1, y1, x2, y2 in pixels. Or the COCO JSON of this picture.",
                    placeholder="40, 30, 200, 160",
                    lines=3,
                    max_lines=8,
                    max_length=MAX_TEXT,
                    elem_id="pasted",
                )
                put = gr.Button("Put these boxes on the picture", elem_id="put-boxes")
                name = gr.Dropdown(
                    ["", *sorted(segmenter.names.values())],
                    value="",
                    label="What is in the boxes?",
                    info="May be left empty. A class that the network knows makes better masks.",
                )
        with gr.Column(min_width=320, elem_id="masks"):
            result = _Result("Draw boxes on a picture, then press “Make masks”: one mask a box is shown here.", "masks.json")

    def fill(drawn: dict[str, Any] | None, name: str) -> list[Any]:
        try:
            if drawn is None:
                raise UploadError("There is no picture yet: upload one, or pick an example.")
            instances = segmenter.fill(read_upload(drawn["image"]), drawn["boxes"], name)
        except UploadError as error:
            return result.empty(str(error))
        return result.filled(instances)

    def paste(drawn: dict[str, Any] | None, text: str) -> tuple[Any, Any]:
        try:
            if drawn is None:
                raise UploadError("There is no picture yet: upload one, or pick an example.")
            boxes = boxes_inside(parse_boxes(text), read_upload(drawn["image"]).size)
        except UploadError as error:
            return gr.skip(), _message(str(error), "error")
        return annotated(drawn["image"], boxes), _message(f"{_counted(len(boxes), 'box', 'boxes')} on the picture.")

    button.click(fill, [canvas, name], result.outputs, api_visibility="private", show_progress_on=result.status, **_BUSY).then(
        None, js=_SHOW_RESULT.format("masks")
    )
    put.click(paste, [canvas, text], [canvas, result.status], api_visibility="private", show_progress="hidden", **_BUSY)
    canvas.upload(lambda: result.empty(), None, result.outputs, api_visibility="private", show_progress="hidden")
    canvas.clear(lambda: result.empty(), None, result.outputs, api_visibility="private", show_progress="hidden")
    choices = examples()

    def choose(chosen: gr.SelectData) -> list[Any]:
        example = choices[chosen.index]
        return [annotated(str(example.path), example.boxes), *result.empty()]

    gallery.select(choose, None, [canvas, *result.outputs], api_visibility="private", show_progress="hidden")


def _endpoints(segmenter: Segmenter) -> None:
    """`/segment` and `/label`, for gradio_client and as MCP tools; the tabs above have their own handlers."""

    def segment(image: str, score: float = DEFAULT_SCORE) -> tuple[Image.Image, dict]:
        """Find the objects of a picture and cut them out: instance segmentation.

        Args:
            image: A JPEG, PNG or WebP file of at most 25 million pixels.
            score: The least score of an instance, 0.05 to 1.

        Returns:
            The picture with the instances drawn on it, and a COCO document (images, categories, annotations) with their
            masks as run lengths, boxes, areas and scores, best first.
        """
        try:
            instances = segmenter.find(read_upload(_given(image)))
        except UploadError as error:
            raise gr.Error(str(error)) from None
        return instances.drawn(score), instances.coco(score)

    def label(image: str, boxes: str, name: str = "") -> tuple[Image.Image, dict]:
        """Turn bounding boxes of a picture into masks: one for each box, in the same order.

        Args:
            image: A JPEG, PNG or WebP file of at most 25 million pixels.
            boxes: One box a line, as x1, y1, x2, y2 in pixels; or the COCO JSON of this picture. At most 50 boxes.
            name: What is in the boxes, if known: a class that the network knows makes better masks.

        Returns:
            The picture with the masks drawn on it, and a COCO document (images, categories, annotations) with a mask as
            run lengths and a score for each box.
        """
        try:
            instances = segmenter.fill(read_upload(_given(image)), parse_boxes(boxes or ""), (name or "")[:60])
        except UploadError as error:
            raise gr.Error(str(error)) from None
        return instances.drawn(), instances.coco()

    image = _picture_input("image", visible=False)
    score = gr.Slider(MIN_SCORE, 1, DEFAULT_SCORE, label="score", visible=False)
    boxes = gr.Textbox(label="boxes", max_length=MAX_TEXT, visible=False)
    name = gr.Textbox(label="name", value="", visible=False)
    outputs = [gr.Image(label="picture", visible=False), gr.JSON(label="coco", visible=False)]
    gr.Button(visible=False).click(segment, [image, score], outputs, api_name="segment", **_BUSY)
    gr.Button(visible=False).click(label, [image, boxes, name], outputs, api_name="label", **_BUSY)


class _Result:
    """A picture with instances, what is to be said about it, their table and their COCO file; before that, what to do."""

    def __init__(self, invitation: str, file_name: str) -> None:
        self.invitation, self.file_name = invitation, file_name
        self.picture = gr.Image(
            label="Result", interactive=False, format="webp", buttons=["fullscreen"], height=_HEIGHT, visible=False
        )
        self.status = gr.HTML(_message(invitation, "invitation"), elem_classes="status", apply_default_css=False)
        self.table = gr.HTML(visible=False, apply_default_css=False)
        self.download = gr.DownloadButton("Download COCO JSON", visible=False)

    @property
    def outputs(self) -> list[gr.components.Component]:
        return [self.picture, self.status, self.table, self.download]

    def empty(self, error: str = "") -> list[Any]:
        message = _message(error, "error") if error else _message(self.invitation, "invitation")
        hidden = gr.update(value=None, visible=False)
        return [hidden, message, hidden, hidden]

    def filled(self, found: Found, least_score: float = 0.0) -> list[Any]:
        count = found.count(least_score)
        content = json.dumps(found.coco(least_score)).encode()
        path = save_bytes_to_cache(content, self.file_name, self.download.GRADIO_CACHE) if count else None
        return [
            gr.update(value=found.drawn(least_score), visible=True),
            _message(_summary(found, count)),
            gr.update(value=_table(found, least_score), visible=count > 0),
            gr.update(value=path, visible=count > 0),
        ]


def _summary(found: Found, count: int) -> str:
    if count:
        return f"{_counted(count, 'object', 'objects')} in {found.seconds:.2f} s."
    if not found.annotations:
        return "No object found in this picture."
    return f"No object has this score: the best has {found.annotations[0]['score']:.2f}. Move the slider to the left."


def _table(found: Found, least_score: float) -> str:
    rows = [
        f'<tr><td><span class="dot" style="background:{color}"></span>{html.escape(name)}</td>'
        f"<td>{score:.2f}</td><td>{area:,}</td></tr>"
        for color, name, score, area in found.table(least_score)
    ]
    head = "<tr><th>label</th><th>score</th><th>area, pixels</th></tr>"
    return f'<table class="instances"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'


def _picture_input(label: str, visible: bool = True) -> gr.Image:
    """A picture as the path of an uploaded file."""
    return gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=_HEIGHT,
        visible=visible,
        buttons=["fullscreen"],
        placeholder="JPEG, PNG or WebP, up to 10 MB",
    )


def _example_gallery() -> gr.Gallery:
    gr.Markdown("Or take one of these:")
    return gr.Gallery(
        [str(example.path) for example in examples()],
        label="Examples",
        show_label=False,
        columns=6,
        height="auto",
        object_fit="cover",
        allow_preview=False,
        interactive=False,
        buttons=[],
        elem_classes="examples",
    )


def _given(path: str | None) -> str:
    if path is None:
        raise UploadError("There is no picture.")
    return path


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _message(text: str, kind: str = "") -> str:
    return f'<p role="{"alert" if kind == "error" else "status"}" class="{kind}">{html.escape(text)}</p>'


def main() -> None:
    restrict_pillow()
    build(load_segmenter()).launch(
        max_file_size=MAX_UPLOAD_BYTES,
        show_error=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        state_session_capacity=_SESSIONS,
        app_kwargs={"middleware": [Middleware(BodyLimit)]},
        mcp_server=True,
        ssr_mode=False,
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css_paths=_CSS,
    )


if __name__ == "__main__":
    main()

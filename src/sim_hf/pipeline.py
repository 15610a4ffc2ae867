"""pipeline("instance-segmentation"): images -> per object a label, a score, a box and a mask.

This file imports nothing of the package at its top, so that it can travel to the Hub with a model's code.

Shape letters: H W rows and columns of an image, S T columns and rows of a mask's box.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForInstanceSegmentation
from transformers.image_utils import load_image
from transformers.pipelines import PIPELINE_REGISTRY, ImageSegmentationPipeline
from transformers.pipelines.base import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

TASK = "instance-segmentation"
MASK_FORMATS = ("array", "rle")
DEFAULT_THRESHOLD = 0.5


class InstanceSegmentationPipeline(Pipeline):
    """The objects of images, best first; masks may overlap.

    ```python
    segmenter = pipeline("instance-segmentation", model="folder or Hub id")
    segmenter("street.jpg", threshold=0.3)
    # [{"label": "car", "score": 0.93, "box": {"xmin": 12, "ymin": 40, "xmax": 210, "ymax": 160}, "mask": array (H, W) bool}, ...]
    ```
    An image is a path, a URL, a PIL image, an array (H, W, 3), a tensor (3, H, W), or a record that has one as `image` (a row
    of a data set). A list gives a list; a data set, a generator or another iterable is streamed: iterate over what comes back
    (`len` is known where the input's is). Images of a batch are only put together when they are padded alike, so the masks do
    not depend on `batch_size`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False
    image_processor: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.image_processor, "post_process_crops"):
            raise ValueError(
                f"task {TASK!r} needs a SIMForInstanceSegmentation and a SIMImageProcessor, got"
                f" {type(self.model).__name__} and {type(self.image_processor).__name__}; stock Mask2Former checkpoints load into"
                " the former: pipeline(task, model=SIMForInstanceSegmentation.from_pretrained(...), image_processor=...)"
            )
        self.model.eval()

    def __call__(self, inputs: Any, boxes: Any = None, *, progress: bool = False, **kwargs: Any) -> Any:
        """-> per image a list of `{"label": str, "score": float, "box": {"xmin", "ymin", "xmax", "ymax"}, "mask"}`.

        boxes: (n, 4) xyxy pixels of the image, or one such list for each image of a list: masks of exactly these boxes, in
        their order, inside them and with the box as given; `label` is then None (in a stream, records hold their own `boxes`).
        threshold: least score (0.5). mask_threshold: least probability of a mask's pixel (0.5). max_instances: at most this
        many per image (100, or as many as the network has queries). mask_format: "array" (H, W) bool, or "rle", COCO's
        compressed run lengths. batch_size, num_workers, timeout: as in every pipeline. progress: show a bar for a list or a
        stream.
        """
        if boxes is not None:
            inputs = _with_boxes(inputs, boxes)
        if _is_one_image(inputs):
            return super().__call__(inputs, **kwargs)
        results: Any = super().__call__(_stream(inputs), **kwargs)
        # Lists are streamed, too, so that the bar moves; a pipeline gives a list for a list.
        if progress:
            results = tqdm(results, total=_length(inputs), desc=TASK, unit="image")
        return list(results) if isinstance(inputs, list | tuple) else results

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict, dict, dict]:
        steps = {"timeout": 0, "threshold": 1, "mask_threshold": 1, "max_instances": 1, "mask_format": 2}
        unknown = sorted(set(kwargs) - set(steps))
        if unknown:
            raise ValueError(f"task {TASK!r} has no option {', '.join(unknown)}; its options are {', '.join(steps)}")
        if kwargs.get("mask_format", "array") not in MASK_FORMATS:
            raise ValueError(f"mask_format must be one of {MASK_FORMATS}, got {kwargs['mask_format']!r}")
        preprocessing, forward, postprocessing = (
            {name: value for name, value in kwargs.items() if steps[name] == step} for step in range(3)
        )
        return preprocessing, forward, postprocessing

    def preprocess(self, input_: Any, timeout: float | None = None) -> dict[str, Any]:
        record = input_ if isinstance(input_, Mapping) and "image" in input_ else {"image": input_}
        image = _picture(record["image"], timeout)
        if record.get("boxes") is not None:
            return {"picture": image, "boxes": torch.as_tensor(record["boxes"], dtype=torch.float32).reshape(-1, 4)}
        return dict(self.image_processor([image], return_tensors="pt"))

    def _forward(
        self,
        items: list[dict[str, Any]],
        threshold: float = DEFAULT_THRESHOLD,
        mask_threshold: float = 0.5,
        max_instances: int | None = None,
    ) -> list[dict[str, Any]]:
        """Masks are made here, on the device of the network; what leaves it is small."""
        results: list[Any] = [None] * len(items)
        groups: dict[Any, list[int]] = {}
        for index, item in enumerate(items):
            if "boxes" in item:
                results[index] = self._masks_of_boxes(item["picture"], item["boxes"])
            else:
                groups.setdefault(item["pixel_values"].shape[-2:], []).append(index)
        for indices in groups.values():
            batch = {name: torch.cat([items[index][name] for index in indices]) for name in items[indices[0]]}
            outputs = self.model(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
            found = self.image_processor.post_process_crops(
                outputs,
                original_sizes=batch["original_sizes"],
                input_sizes=batch["input_sizes"],
                threshold=threshold,
                mask_threshold=mask_threshold,
                max_instances=max_instances,
            )
            for index, result, size in zip(indices, found, batch["original_sizes"].tolist(), strict=True):
                results[index] = {**result, "size": size}
        return results

    def _masks_of_boxes(self, picture: Image.Image, boxes_n4: Tensor) -> dict[str, Any]:
        try:
            from sim_hf.data import read_image
            from sim_hf.labeling import masks_for_boxes
        except ImportError as error:
            raise ValueError("masks for given boxes need the package sim_hf itself, not only the model's code") from error
        found = masks_for_boxes(self.model, self.image_processor, read_image(picture), boxes_n4)
        return {
            "scores": found.confidence_n,
            "labels": [None] * len(found),
            "boxes": boxes_n4,
            "corners": torch.tensor(found.corners).reshape(-1, 2),
            "crops": [crop.T for crop in found.crops],
            "size": list(found.size),
        }

    def postprocess(self, model_outputs: dict[str, Any], mask_format: str = "array") -> list[dict[str, Any]]:
        found = {
            name: value.tolist() if isinstance(value, Tensor) else value
            for name, value in model_outputs.items()
            if name != "crops"
        }
        names = self.model.config.id2label or {}
        is_prompted = None in found["labels"]
        objects = []
        for row, crop_ST in enumerate(model_outputs["crops"]):
            label, box = found["labels"][row], found["boxes"][row]
            mask_HW = _full_mask(crop_ST, found["corners"][row], found["size"])
            objects.append(
                {
                    "label": None if label is None else names.get(label, str(label)),
                    "score": found["scores"][row],
                    "box": _box_record(box if is_prompted else [int(side) for side in box]),
                    "mask": mask_HW if mask_format == "array" else _run_lengths(mask_HW),
                }
            )
        return objects

    def run_single(self, inputs: Any, preprocess_params: dict, forward_params: dict, postprocess_params: dict) -> Any:
        batch: Any = [self.preprocess(inputs, **preprocess_params)]
        (outputs,) = self._outputs(batch, forward_params)
        return self.postprocess(outputs, **postprocess_params)

    def _outputs(self, batch: Any, forward_params: dict) -> Any:
        """`forward` of transformers is typed for one image."""
        return self.forward(batch, **forward_params)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> _Stream:
        """transformers' own pads the images of a batch alike or refuses them; here a batch is a list."""
        source, length = inputs.source, inputs.length
        has_rows = length is not None and hasattr(source, "__getitem__")
        wrapper: Any = PipelineDataset if has_rows else PipelineIterator
        rows = wrapper(source, self.preprocess, preprocess_params)
        # Several workers would each run through an iterable that cannot be divided.
        workers = num_workers if has_rows else min(num_workers, 1)
        loader: Any = DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=list)

        def results() -> Iterator[list[dict[str, Any]]]:
            for batch in loader:
                for outputs in self._outputs(batch, forward_params):
                    yield self.postprocess(outputs, **postprocess_params)

        return _Stream(results, length)


class DefaultThresholdImageSegmentationPipeline(ImageSegmentationPipeline):
    """transformers' pipeline("image-segmentation") with the threshold that fits our scores.

    Its own default of 0.9 is made for class probabilities; our score is that times the mean mask probability. For every other
    model nothing changes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if hasattr(self.image_processor, "post_process_crops"):  # ours
            self._postprocess_params.setdefault("threshold", DEFAULT_THRESHOLD)


class _Stream:
    """Results as they are made; every iteration starts anew where the input can."""

    def __init__(self, make: Callable[[], Iterator[list[dict[str, Any]]]], length: int | None) -> None:
        self._make, self._length = make, length

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return self._make()

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the input of this pipeline has no length")
        return self._length


class _Inputs(torch.utils.data.Dataset):
    """Any iterable in the clothes of a data set, which is what a pipeline streams."""

    def __init__(self, source: Any) -> None:
        self.source, self.length = source, _length(source)


def _stream(inputs: Any) -> _Inputs:
    if not hasattr(inputs, "__iter__") and not hasattr(inputs, "__getitem__"):
        raise ValueError(f"expected an image, a list of images or a data set, got {type(inputs).__name__}")
    return _Inputs(inputs)


def _length(inputs: Any) -> int | None:
    try:
        return len(inputs)
    except TypeError:
        return None


def _is_one_image(inputs: Any) -> bool:
    return isinstance(inputs, str | bytes | PathLike | Image.Image | np.ndarray | Tensor | Mapping)


def _with_boxes(inputs: Any, boxes: Any) -> Any:
    if _is_one_image(inputs):
        return {"image": inputs, "boxes": boxes}
    if not isinstance(inputs, list | tuple):
        raise ValueError("`boxes` go with an image or a list of images; the records of a stream hold `image` and `boxes`")
    return [{"image": image, "boxes": own} for image, own in zip(inputs, boxes, strict=True)]


def _picture(image: Any, timeout: float | None) -> Image.Image:
    """The image as it is in its file: the image processor turns it upright and into RGB."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray | Tensor):
        return _from_array(image)
    if isinstance(image, Mapping) and {"bytes", "path"} <= set(image):  # a row whose image is not decoded
        image = image["bytes"] if image["bytes"] is not None else image["path"]
    if isinstance(image, bytes):
        return Image.open(BytesIO(image))
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        return load_image(image, timeout=timeout)
    if isinstance(image, str | PathLike):
        return Image.open(fspath(image))
    raise ValueError(f"expected a path, a URL, a PIL image, an array or a tensor as image, got {type(image).__name__}")


def _from_array(pixels: np.ndarray | Tensor) -> Image.Image:
    """(H, W), (H, W, 1, 3 or 4) or (3, H, W); uint8, uint16, or float in 0..1 or 0..255."""
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else pixels
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)) or 0 in array.shape:
        raise ValueError(f"an image must be (H, W), (H, W, 3) or (3, H, W), got {tuple(array.shape)}")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype == np.uint16:
        array = array / 257
    elif np.issubdtype(array.dtype, np.floating) and array.max() <= 1:
        array = array * 255
    return Image.fromarray(np.rint(array).clip(0, 255).astype(np.uint8))


def _full_mask(crop_ST: Tensor, corner: Sequence[int], size: Sequence[int]) -> np.ndarray:
    left, top = corner
    mask_HW = np.zeros(tuple(size), dtype=bool)
    mask_HW[top : top + crop_ST.shape[1], left : left + crop_ST.shape[0]] = crop_ST.T.numpy()
    return mask_HW


def _box_record(box: Sequence[float]) -> dict[str, float]:
    return dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))


def _run_lengths(mask_HW: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths, ready for JSON."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ValueError("mask_format='rle' needs the package pycocotools") from error
    run_lengths: Any = coco_mask.encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in run_lengths["size"]], "counts": run_lengths["counts"].decode("ascii")}


def register() -> None:
    """Name both pipelines to transformers. Called once, when the package is imported."""
    PIPELINE_REGISTRY.register_pipeline(
        TASK, InstanceSegmentationPipeline, pt_model=AutoModelForInstanceSegmentation, type="image"
    )
    # Not through `register_pipeline`, which warns of a task that it knows.
    PIPELINE_REGISTRY.supported_tasks["image-segmentation"]["impl"] = DefaultThresholdImageSegmentationPipeline

"""Where to look to see one object enlarged: what labelling does at inference (`labeling.py`), as an augmentation.

At 256 pixels a person of a COCO photograph is some 25 x 50 pixels, 6 x 13 cells of the mask grid. A window around one object,
enlarged to the size of the input, shows its outline in many cells, to the colour affinity of its real pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SHARE_RANGE = (0.3, 0.85)  # the longer side of the object's box, of the window's side
_LARGEST = 8.0  # times that a window is enlarged: beyond, there is nothing to see


def object_window(
    boxes_n4: Tensor, image_size: tuple[int, int], size: int, generator: torch.Generator
) -> tuple[int, int, int, int] | None:
    """A random square around a random object, cut at the border of the picture -> (top, left, height, width) in its pixels, or
    None where there is no object. boxes_n4: xyxy pixels; image_size: (height, width); size: pixels of the network's input."""
    if len(boxes_n4) == 0:
        return None
    height, width = image_size
    x1, y1, x2, y2 = boxes_n4[int(torch.randint(len(boxes_n4), (), generator=generator))].tolist()
    share, across, down = torch.rand(3, generator=generator).tolist()
    low, high = _SHARE_RANGE
    side = max(max(x2 - x1, y2 - y1) / (low + (high - low) * share), size / _LARGEST)
    # The whole object is inside, anywhere.
    left, top = x2 - side + across * (side - (x2 - x1)), y2 - side + down * (side - (y2 - y1))
    first_column, first_row = max(0, int(left)), max(0, int(top))
    last_column, last_row = min(width, int(left + side) + 1), min(height, int(top + side) + 1)
    return first_row, first_column, max(1, last_row - first_row), max(1, last_column - first_column)

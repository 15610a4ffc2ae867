"""Box prompts: a query that is made from a box and answers with the mask of what the box holds.

The network is asked twice: the learned queries find objects by themselves, a prompt is told where one is. Prompts share every
layer with the learned queries, look only inside their box, and read the learned queries but are read by nobody: no prediction
depends on what else is asked. In training, prompts from the annotated boxes give the teacher a positive that belongs to its
instance without matching, and the decoder an easier version of its task (the idea of DN-DETR, arXiv 2203.01305).

Shape letters: B images, P prompts an image, C channels, h and w rows and columns of a level, M = h * w its cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .padding import sine_waves


class SIMBoxPromptEncoder(nn.Module):
    """Boxes -> content and position of a query each."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.channels_per_side = hidden_dim // 2
        self.hidden = nn.Linear(4 * self.channels_per_side, hidden_dim)
        self.out = nn.Linear(hidden_dim, 2 * hidden_dim)

    def forward(self, boxes_BP4: Tensor, size: tuple[int, int], valid_BHW: Tensor | None) -> tuple[Tensor, Tensor]:
        """boxes_BP4: xyxy pixels of the padded input of `size` (H, W) -> content and position, (P, B, C) each.

        Like the positions of the image's cells, sides are fractions of the image without its padding.
        """
        extent_B4 = _extent(size, valid_BHW, boxes_BP4)
        angle_BP4 = boxes_BP4.float() / extent_B4[:, None] * (2 * math.pi)
        waves = sine_waves(angle_BP4, self.channels_per_side).flatten(2).to(self.hidden.weight.dtype)
        content, position = self.out(self.hidden(waves).relu()).transpose(0, 1).chunk(2, dim=-1)
        return content, position


def cells_inside(boxes_BP4: Tensor, size: tuple[int, int], level: tuple[int, int]) -> Tensor:
    """The cells of a level that a box touches -> (B, P, M) bool. size: (H, W) of the padded input."""

    def touched(low_BP: Tensor, high_BP: Tensor, length: int, cells: int) -> Tensor:
        edges = torch.arange(cells + 1, device=boxes_BP4.device) * (length / cells)
        low_BP1, high_BP1 = low_BP[..., None], high_BP[..., None]
        holds_low = edges[:-1] <= low_BP1  # so a box without extent touches a cell too
        return (edges[1:] > low_BP1) & (holds_low | (edges[:-1] < high_BP1))

    x1, y1, x2, y2 = boxes_BP4.float().unbind(-1)
    rows_BPh = touched(y1, y2, size[0], level[0])
    columns_BPw = touched(x1, x2, size[1], level[1])
    return (rows_BPh[..., :, None] & columns_BPw[..., None, :]).flatten(2)


def _extent(size: tuple[int, int], valid_BHW: Tensor | None, boxes_BP4: Tensor) -> Tensor:
    """Width, height, width, height of every image without its padding -> (B, 4), at least 1."""
    if valid_BHW is None:
        height, width = size
        return boxes_BP4.new_tensor([width, height, width, height], dtype=torch.float32).expand(len(boxes_BP4), 4)
    height_B, width_B = valid_BHW.any(2).sum(1), valid_BHW.any(1).sum(1)
    return torch.stack([width_B, height_B, width_B, height_B], dim=-1).clamp(min=1).float()

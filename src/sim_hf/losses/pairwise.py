"""Pairwise term of BoxInst (Tian et al. 2021), the second box supervision that SIM keeps.

Two nearby pixels of similar colour probably have the same label. An edge joins a pixel (its anchor) to a pixel of the
dilated 3x3 ring around it; BoxInst counts the edge when the colours are similar *and the anchor lies in the box*. The
other end may lie outside: there the projection term has made the mask empty, and that is what makes "fill the box"
costly. Gating both ends would make it the optimum.

Over all 8 neighbours every pair is met twice, once from each end, with the same similarity and the same loss. So only
half of the neighbours is kept, and an edge weighs 1 for each of its ends that lies in the box: the same sum, half the
work.

Shape letters: B images, G annotated instances, N predictions assigned to an instance, K offsets of the half ring (4 for
a 3x3 kernel), E edges of the batch, T edges of all rows (an instance's edges once per prediction), V cells in or beside
the boxes, instance by instance, H and W the mask grid, P all of its cells, L rows or columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sim_hf.losses.color import rgb_to_lab
from sim_hf.losses.precision import at_least_float32
from sim_hf.structures import rasterize_boxes


@dataclass(frozen=True)
class PairwiseEdges:
    """The edges that count, made once a step and shared by all decoder layers.

    Sorted by instance. instance_ids_E: row of `InstanceTargets`. anchors_E, neighbours_E: flat pixel index (row * W +
    column) of the two ends. weights_E: 1 or 2, how many of the ends lie in the box. shares_E: weights_E divided by its
    sum over the instance. counts_G: edges of each instance. grid_size: (H, W).
    """

    instance_ids_E: Tensor
    anchors_E: Tensor
    neighbours_E: Tensor
    weights_E: Tensor
    shares_E: Tensor
    counts_G: Tensor
    grid_size: tuple[int, int]

    def __len__(self) -> int:
        return self.anchors_E.shape[0]


@torch.no_grad()
def color_similarity(
    images_B3HW: Tensor, valid_BHW: Tensor, *, stride: int = 4, kernel_size: int = 3, dilation: int = 2
) -> Tensor:
    """Colour similarity exp(-0.5 * Lab distance) to half of the dilated ring -> (B, K, H/stride, W/stride) in 0..1.

    images_B3HW: RGB in 0..1. valid_BHW: non-zero where the batch holds image, zero in the padding (and wherever the
    caller wants no colour to count), both at input size. 0 where either end lies outside the grid or touches an invalid
    pixel; the original code asks only that *one* neighbour is valid. K goes by `half_ring_offsets`.
    """
    batch_size, _, height, width = images_B3HW.shape
    if tuple(valid_BHW.shape) != (batch_size, height, width):
        raise ValueError(f"valid must be {(batch_size, height, width)} like the images, got {tuple(valid_BHW.shape)}")
    if height % stride or width % stride:
        raise ValueError(f"image size must be a multiple of the stride {stride}, got {height} x {width}")
    lab_B3HW = rgb_to_lab(functional.avg_pool2d(images_B3HW.float(), stride))
    # A cell is valid when all of its pixels are: the colour of a mixed cell would be blended with the padding.
    valid_BHW = functional.avg_pool2d((valid_BHW != 0).float()[:, None], stride)[:, 0] == 1
    offsets = half_ring_offsets(kernel_size, dilation)
    similarity_BKHW = lab_B3HW.new_zeros(batch_size, len(offsets), *valid_BHW.shape[1:])
    for k, (down, right) in enumerate(offsets):
        anchor, neighbour = _overlap(valid_BHW.shape[1:], down, right)
        distance_BHW = (lab_B3HW[(..., *anchor)] - lab_B3HW[(..., *neighbour)]).square().sum(1).sqrt()
        both_valid_BHW = valid_BHW[(..., *anchor)] & valid_BHW[(..., *neighbour)]
        similarity_BKHW[:, k][(..., *anchor)] = (-0.5 * distance_BHW).exp() * both_valid_BHW
    return similarity_BKHW


@torch.no_grad()
def pairwise_edges(
    similarity_BKHW: Tensor,
    boxes_G4: Tensor,
    image_ids_G: Tensor,
    *,
    stride: float,
    threshold: float = 0.3,
    dilation: int = 2,
) -> PairwiseEdges:
    """The edges of each instance: colours at least `threshold` similar, one or both ends in the instance's box.

    similarity_BKHW is that of `color_similarity` with the same dilation; boxes are xyxy in input pixels, `stride` the
    size of a grid cell in input pixels.
    """
    _, num_offsets, height, width = similarity_BKHW.shape
    if threshold <= 0:
        raise ValueError(f"threshold must be above 0, the similarity of pairs that leave the image, got {threshold}")
    if image_ids_G.shape != boxes_G4.shape[:1]:
        raise ValueError(f"expected one image id per box ({boxes_G4.shape[0]}), got {tuple(image_ids_G.shape)}")
    kernel_size = isqrt(2 * num_offsets + 1)
    if kernel_size < 3 or kernel_size**2 != 2 * num_offsets + 1:
        raise ValueError(f"similarity must hold half a ring of offsets (4 for a 3x3 kernel), got {num_offsets}")
    offsets = half_ring_offsets(kernel_size, dilation)
    steps_K = torch.tensor([down * width + right for down, right in offsets], device=boxes_G4.device)
    # Only a cell in the box, or as far from it as the ring reaches, has an end in the box.
    rows_GH, columns_GW = rasterize_boxes(boxes_G4, height, width, stride)
    near_rows_GH, near_columns_GW = (_grown(line_GL, offsets[-1][0]) for line_GL in (rows_GH, columns_GW))
    places_V = (near_rows_GH[:, :, None] & near_columns_GW[:, None, :]).flatten().nonzero()[:, 0]
    instances_V = places_V // (height * width)
    cells_V = places_V - instances_V * (height * width)
    inside = (rows_GH[:, :, None] & columns_GW[:, None, :]).flatten().to(torch.uint8)
    similar_PK = (similarity_BKHW >= threshold).permute(0, 2, 3, 1).reshape(-1, num_offsets)
    ends_VK = similar_PK.index_select(0, image_ids_G.index_select(0, instances_V) * (height * width) + cells_V).to(torch.uint8)
    for ends_V, step in zip(ends_VK.unbind(1), steps_K.tolist(), strict=True):
        # A neighbour outside of the grid is similar to nobody: whatever stands in for it is multiplied by 0.
        neighbours_V = (places_V + step).clamp_(max=len(inside) - 1)
        ends_V *= inside.index_select(0, places_V) + inside.index_select(0, neighbours_V)
    edges_E = ends_VK.flatten().nonzero()[:, 0]
    rows_E = edges_E // num_offsets
    instance_ids_E, anchors_E = instances_V.index_select(0, rows_E), cells_V.index_select(0, rows_E)
    weights_E = ends_VK.flatten().index_select(0, edges_E).float()
    totals_G = weights_E.new_zeros(boxes_G4.shape[0]).index_add_(0, instance_ids_E, weights_E)
    return PairwiseEdges(
        instance_ids_E=instance_ids_E,
        anchors_E=anchors_E,
        neighbours_E=anchors_E + steps_K.index_select(0, edges_E - rows_E * num_offsets),
        weights_E=weights_E,
        shares_E=weights_E / totals_G.index_select(0, instance_ids_E),
        counts_G=torch.bincount(instance_ids_E, minlength=boxes_G4.shape[0]),
        grid_size=(height, width),
    )


def pairwise_loss(mask_logits_NHW: Tensor, instance_ids_N: Tensor, edges: PairwiseEdges) -> Tensor:
    """-log P(both ends have the same label), mean over the edges of the row's instance -> (N,).

    0 (with a gradient path) for an instance without edges. Rows may come in any order, leave instances out, or share
    one: all decoder layers can be given at once as one long list of rows. BoxInst takes the mean over the edges of all
    instances together, where large boxes outweigh small ones; here every instance has its own mean, as in the other
    terms.
    """
    shape = tuple(mask_logits_NHW.shape)
    if shape[1:] != edges.grid_size:
        raise ValueError(f"mask logits must be on the grid of the edges, (N, *{edges.grid_size}), got {shape}")
    if tuple(instance_ids_N.shape) != shape[:1]:
        raise ValueError(f"expected one instance id per mask ({shape[0]}), got {tuple(instance_ids_N.shape)}")
    counts_N = edges.counts_G[instance_ids_N]
    rows_T = torch.repeat_interleave(counts_N)
    # Where the row's edges begin in the list of edges, minus where they begin in the list of all rows.
    shift_N = (edges.counts_G.cumsum(0) - edges.counts_G)[instance_ids_N] - (counts_N.cumsum(0) - counts_N)
    edges_T = torch.arange(rows_T.shape[0], device=rows_T.device).add_(shift_N.index_select(0, rows_T))
    origin_T = rows_T * (edges.grid_size[0] * edges.grid_size[1])
    anchors_T = edges.anchors_E.index_select(0, edges_T).add_(origin_T)
    neighbours_T = edges.neighbours_E.index_select(0, edges_T).add_(origin_T)
    return _PairwiseMean.apply(mask_logits_NHW, anchors_T, neighbours_T, edges.shares_E.index_select(0, edges_T), rows_T)


def half_ring_offsets(kernel_size: int, dilation: int) -> list[tuple[int, int]]:
    """(down, right) steps to the neighbours that follow the centre in reading order; the others mirror them."""
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
    reach = range(-(kernel_size // 2), kernel_size // 2 + 1)
    return [(down * dilation, right * dilation) for down in reach for right in reach if (down, right) > (0, 0)]


class _PairwiseMean(torch.autograd.Function):
    """sum over the edges of a row of share * -log(p q + (1 - p)(1 - q)), touching the ends of the edges only.

    With x, y the logits of p, q, -log(p q + (1-p)(1-q)) = softplus(x) + softplus(y) - softplus(x + y). Its derivative
    is sigmoid(x) - sigmoid(x + y). The gradient is made at once, while the two ends are at hand: what waits for the
    backward is one map a row instead of five lists of edges. It also lets the value be written with absolute values
    (below), whose own derivative would be wrong at a logit of 0.
    """

    @staticmethod
    def forward(ctx, mask_logits_NHW, anchors_T, neighbours_T, shares_T, rows_T):
        flat_logits = mask_logits_NHW.reshape(-1)
        x_T = at_least_float32(flat_logits.index_select(0, anchors_T))
        y_T = at_least_float32(flat_logits.index_select(0, neighbours_T))
        if ctx.needs_input_grad[0]:
            both_T = (x_T + y_T).sigmoid_()
            gradient = x_T.new_zeros(flat_logits.shape)
            gradient.index_add_(0, anchors_T, x_T.sigmoid().sub_(both_T).mul_(shares_T))
            gradient.index_add_(0, neighbours_T, y_T.sigmoid().sub_(both_T).mul_(shares_T))
            ctx.save_for_backward(gradient.reshape(mask_logits_NHW.shape))
            ctx.logits_dtype = mask_logits_NHW.dtype
        losses_T = _disagreement(x_T, y_T).mul_(shares_T)
        return losses_T.new_zeros(mask_logits_NHW.shape[0]).index_add_(0, rows_T, losses_T)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N):
        (gradient_NHW,) = ctx.saved_tensors
        return (gradient_NHW * grad_N[:, None, None]).to(ctx.logits_dtype), None, None, None, None


def _disagreement(x_T: Tensor, y_T: Tensor) -> Tensor:
    """softplus(x) + softplus(y) - softplus(x + y) without subtracting large numbers, for finite x and y of any size.

    softplus(t) = max(t, 0) + log(1 + exp(-|t|)). The first parts add up to 0 when the signs agree and to min(|x|, |y|)
    when they do not; the logarithms join into one.
    """
    a_T, b_T, both_T = (-x_T.abs()).exp_(), (-y_T.abs()).exp_(), (x_T + y_T).abs_().neg_().exp_()
    tails_T = (a_T + b_T + a_T * b_T).sub_(both_T).div_(both_T.add_(1)).log1p_()
    opposed_T = torch.maximum(torch.minimum(x_T, -y_T), torch.minimum(-x_T, y_T)).clamp_(min=0)
    return tails_T.add_(opposed_T)


def _grown(line_GL: Tensor, reach: int) -> Tensor:
    """Marks (bool) that spread by `reach` cells to both sides."""
    return functional.max_pool1d(line_GL[:, None].float(), 2 * reach + 1, 1, padding=reach)[:, 0] > 0


def _overlap(size: tuple[int, int] | torch.Size, down: int, right: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Row and column slices of the anchors whose neighbour lies on the grid, and of those neighbours."""

    def along(length: int, step: int) -> tuple[slice, slice]:
        reach = max(length - abs(step), 0)
        return slice(max(-step, 0), max(-step, 0) + reach), slice(max(step, 0), max(step, 0) + reach)

    (anchor_rows, neighbour_rows), (anchor_columns, neighbour_columns) = along(size[0], down), along(size[1], right)
    return (anchor_rows, anchor_columns), (neighbour_rows, neighbour_columns)

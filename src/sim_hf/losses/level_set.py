"""Level-set terms of Box2Mask (Li et al. 2022, arXiv 2212.01579), which come from BoxLevelSet (arXiv 2112.03451).

A mask is good when its pixels look alike and the other pixels of its box look alike: the region energy of Chan and Vese
(2001), on colours and on features. And it is good when it hardly changes as every pixel takes the mean of those
neighbours that have its colour: local consistency. The tree filter, with which Box2Mask makes its features, is left out.

Shape letters: B images, N predictions assigned to an instance, C channels, K the 9 cells of a dilated 3x3 window (the
fifth is the cell itself), P cells of the grid, H and W its rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from sim_hf.losses.precision import at_least_float32, autocast_disabled

WINDOW, CENTRE = 9, 4
SMALLEST_SPREAD = 1e-8  # Box2Mask: where all neighbours have one colour
SMALLEST_MASS = 1e-5  # Box2Mask: of a region without any pixel


def region_energy(mask_logits_NHW: Tensor, inside_NHW: Tensor, maps_BCHW: Tensor, image_ids_N: Tensor) -> Tensor:
    """Chan-Vese energy of the two regions inside the box, mean over its cells -> (N,).

    sum over the cells of m |x - c1|^2 + (1 - m) |x - c2|^2, where m is the mask's probability, x a cell of the image's map,
    c1 and c2 the means of x weighted by m and 1 - m; |.|^2 is a sum over the channels (Box2Mask takes their mean: divide the
    map). inside_NHW: bool, the cells that count; a row without any gives 0. The map takes no gradient.
    """
    shape = tuple(mask_logits_NHW.shape)
    _check(mask_logits_NHW, inside_NHW, image_ids_N)
    if maps_BCHW.ndim != 4 or tuple(maps_BCHW.shape[-2:]) != shape[1:]:
        raise ValueError(f"maps must be (B, C, {shape[1]}, {shape[2]}) like the masks, got {tuple(maps_BCHW.shape)}")
    logits_NP = at_least_float32(mask_logits_NHW).flatten(1)
    inside_NP = inside_NHW.flatten(1).to(logits_NP.dtype)
    regions_2NP = torch.stack([logits_NP.sigmoid(), (-logits_NP).sigmoid()]) * inside_NP
    maps_BCP = maps_BCHW.detach().to(logits_NP.dtype).flatten(2)
    energies_2NP = regions_2NP * _distances_to_means(regions_2NP, maps_BCP, image_ids_N)
    return energies_2NP.sum((0, 2)) / inside_NP.sum(-1).clamp(min=1)


@torch.no_grad()
def color_affinity(colors_BCHW: Tensor, valid_BHW: Tensor, *, dilation: int = 2, alpha: float = 0.3) -> Tensor:
    """How much each cell takes of its 8 neighbours (Box2Mask, local consistency) -> (B, K, H, W), sums to 1 over K.

    Softmax over the neighbours of -mean_c (|difference| / (alpha * spread))^2, where the spread is the standard deviation of
    the neighbours' colours. A neighbour outside of the grid or not `valid` takes no part (Box2Mask repeats the border); a
    cell without neighbours keeps its own value (the weight of the window's centre, 0 elsewhere).
    """
    batch_size, num_channels, height, width = colors_BCHW.shape
    if tuple(valid_BHW.shape) != (batch_size, height, width):
        raise ValueError(f"valid must be {(batch_size, height, width)} like the colours, got {tuple(valid_BHW.shape)}")
    if alpha <= 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    colors_BCHW = at_least_float32(colors_BCHW)
    windows_BCKP = _windows(colors_BCHW, dilation).view(batch_size, num_channels, WINDOW, height * width)
    valid_BKP = _windows((valid_BHW != 0).to(colors_BCHW.dtype)[:, None], dilation) > 0
    valid_BKP = valid_BKP & valid_BKP[:, CENTRE : CENTRE + 1]
    valid_BKP[:, CENTRE] = False
    count_B1P = valid_BKP.sum(1, keepdim=True)
    weights_B1KP = valid_BKP[:, None].to(colors_BCHW.dtype)
    mean_BC1P = (windows_BCKP * weights_B1KP).sum(2, keepdim=True) / count_B1P.clamp(min=1)[:, None]
    variance_BC1P = ((windows_BCKP - mean_BC1P).square() * weights_B1KP).sum(2, keepdim=True)
    spread_BC1P = (variance_BC1P / (count_B1P - 1).clamp(min=1)[:, None]).sqrt() + SMALLEST_SPREAD
    differences_BCKP = windows_BCKP - windows_BCKP[:, :, CENTRE : CENTRE + 1]
    score_BKP = -(differences_BCKP / spread_BC1P / alpha).square().mean(1)
    affinity_BKP = score_BKP.masked_fill(~valid_BKP, -torch.inf).softmax(1).masked_fill(count_B1P == 0, 0)
    affinity_BKP[:, CENTRE] = (count_B1P[:, 0] == 0).to(affinity_BKP.dtype)
    return affinity_BKP.view(batch_size, WINDOW, height, width)


def local_consistency_loss(
    mask_logits_NHW: Tensor,
    inside_NHW: Tensor,
    affinity_BKHW: Tensor,
    image_ids_N: Tensor,
    *,
    dilation: int = 2,
    num_iterations: int = 10,
) -> Tensor:
    """L1 between the mask and the mask refined by its image's `color_affinity`, mean over the box's cells -> (N,) in 0..1.

    One iteration replaces every cell by the affine mean of its neighbours; the gradient goes through the refinement too.
    inside_NHW: bool, the cells that count; a row without any gives 0.
    """
    _, height, width = mask_logits_NHW.shape
    _check(mask_logits_NHW, inside_NHW, image_ids_N)
    if tuple(affinity_BKHW.shape[1:]) != (WINDOW, height, width):
        raise ValueError(f"affinity must be (B, {WINDOW}, {height}, {width}), got {tuple(affinity_BKHW.shape)}")
    mask_NHW = at_least_float32(mask_logits_NHW).sigmoid()
    affinity_NKP = affinity_BKHW.to(mask_NHW.dtype).flatten(2)[image_ids_N]
    refined_NHW = mask_NHW
    for _ in range(num_iterations):
        refined_NHW = (_windows(refined_NHW[:, None], dilation) * affinity_NKP).sum(1).view(-1, height, width)
    inside_NP = inside_NHW.flatten(1).to(mask_NHW.dtype)
    differences_NP = (mask_NHW - refined_NHW).abs().flatten(1)
    return (differences_NP * inside_NP).sum(-1) / inside_NP.sum(-1).clamp(min=1)


@torch.no_grad()
def unit_features(features_BCHW: Tensor) -> Tensor:
    """Feature maps with vectors of length 1 over the channels (0 stays 0), float32: an energy on them is in 0..1, whatever
    the network's scale. Divided by the largest entry first, so that no square leaves the range."""
    features_BCHW = at_least_float32(features_BCHW)
    largest_B1HW = features_BCHW.abs().amax(1, keepdim=True)
    features_BCHW = features_BCHW / torch.where(largest_B1HW > 0, largest_B1HW, 1)
    return functional.normalize(features_BCHW, dim=1)


@torch.no_grad()
def _distances_to_means(regions_2NP: Tensor, maps_BCP: Tensor, image_ids_N: Tensor) -> Tensor:
    """Squared distance of each cell's vector to the mean vector of the mask, and of the rest of the box -> (2, N, P).

    Without gradient: the mean is where the energy is smallest, so its own derivative adds nothing. Image by image, as matrix
    products: nothing of size (N, C, P).
    """
    distances_2NP = torch.zeros_like(regions_2NP)
    with autocast_disabled(regions_2NP):
        for image in image_ids_N.unique().tolist():
            rows = (image_ids_N == image).nonzero()[:, 0]
            map_CP = maps_BCP[image]
            map_CP = map_CP - map_CP.mean(1, keepdim=True)  # smaller numbers, of which less is lost in the difference below
            regions_2nP = regions_2NP[:, rows]
            means_2nC = regions_2nP @ map_CP.T / regions_2nP.sum(-1, keepdim=True).clamp(min=SMALLEST_MASS)
            squares_2nP = map_CP.square().sum(0) - 2 * means_2nC @ map_CP + means_2nC.square().sum(-1, keepdim=True)
            distances_2NP[:, rows] = squares_2nP.clamp_(min=0)
    return distances_2NP


def _windows(maps_BCHW: Tensor, dilation: int) -> Tensor:
    """The 3x3 windows of every cell, 0 beyond the grid -> (B, C * K, P)."""
    return functional.unfold(maps_BCHW, 3, dilation=dilation, padding=dilation)


def _check(mask_logits_NHW: Tensor, inside_NHW: Tensor, image_ids_N: Tensor) -> None:
    shape = tuple(mask_logits_NHW.shape)
    if tuple(inside_NHW.shape) != shape:
        raise ValueError(f"inside must have the shape of the logits {shape}, got {tuple(inside_NHW.shape)}")
    if tuple(image_ids_N.shape) != shape[:1]:
        raise ValueError(f"expected one image id per mask ({shape[0]}), got {tuple(image_ids_N.shape)}")

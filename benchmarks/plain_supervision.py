"""The supervision of BoxInst and SIM as published, in plain torch: the peer of `speed_supervision.py`.

Written from the papers' equations the way they are usually written: boxes painted at the input's size, all 8 neighbours by
unfold, a dense tensor for every instance, loops over instances and classes, a full sort. It imports nothing of the package.

Shape letters: B images, G instances, N rows of predictions (several may share an instance), C channels, L prototypes of a
class, M pixels, P all pixels of the mask grid, H W mask grid; 8 neighbours in reading order without the centre.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

# Linear red, green, blue to X, Y, Z, and white (D65), as in scikit-image.
XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.95047, 1.0, 1.08883)


def box_bitmasks(boxes_G4: Tensor, input_size: tuple[int, int], stride: int) -> Tensor:
    """Every box painted at the input's size, then every `stride`-th pixel of it, from the middle of a cell. -> (G, H, W)"""
    height, width = input_size
    bitmasks = []
    for x1, y1, x2, y2 in boxes_G4.tolist():
        full_HW = torch.zeros(height, width, device=boxes_G4.device)
        full_HW[math.ceil(y1) : math.ceil(y2), math.ceil(x1) : math.ceil(x2)] = 1
        bitmask_HW = full_HW[stride // 2 :: stride, stride // 2 :: stride]
        if not bitmask_HW.any():  # smaller than a cell: the one that holds its middle
            bitmask_HW[int((y1 + y2) / 2 / stride), int((x1 + x2) / 2 / stride)] = 1
        bitmasks.append(bitmask_HW)
    return torch.stack(bitmasks)


# BoxInst: colour affinity, pairwise and projection loss


def lab(images_B3HW: Tensor) -> Tensor:
    """sRGB in 0..1 to CIE Lab (D65)."""
    linear_B3HW = torch.where(images_B3HW > 0.04045, ((images_B3HW + 0.055) / 1.055) ** 2.4, images_B3HW / 12.92)
    xyz_B3HW = torch.einsum("dc,bchw->bdhw", linear_B3HW.new_tensor(XYZ_FROM_RGB), linear_B3HW)
    xyz_B3HW = xyz_B3HW / xyz_B3HW.new_tensor(WHITE)[:, None, None]
    f_B3HW = torch.where(xyz_B3HW > 0.008856, xyz_B3HW ** (1 / 3), 7.787 * xyz_B3HW + 16 / 116)
    x_BHW, y_BHW, z_BHW = f_B3HW.unbind(1)
    return torch.stack([116 * y_BHW - 16, 500 * (x_BHW - y_BHW), 200 * (y_BHW - z_BHW)], 1)


def neighbours(maps_BCHW: Tensor, dilation: int) -> Tensor:
    """The dilated 3x3 ring of every pixel, zeros outside. -> (B, C, 8, H, W)"""
    batch_size, channels, height, width = maps_BCHW.shape
    unfolded = functional.unfold(maps_BCHW, kernel_size=3, dilation=dilation, padding=dilation)
    unfolded_BC9HW = unfolded.reshape(batch_size, channels, 9, height, width)
    return torch.cat([unfolded_BC9HW[:, :, :4], unfolded_BC9HW[:, :, 5:]], 2)


def color_similarity(images_B3HW: Tensor, valid_BHW: Tensor, *, stride: int, dilation: int = 2) -> Tensor:
    """exp(-|difference of Lab| / 2) with every neighbour, 0 where one of the two is no image. -> (B, 8, H, W)"""
    lab_B3HW = lab(functional.avg_pool2d(images_B3HW, stride))
    difference_B38HW = lab_B3HW[:, :, None] - neighbours(lab_B3HW, dilation)
    similarity_B8HW = torch.exp(-0.5 * torch.linalg.vector_norm(difference_B38HW, dim=1))
    valid_B1HW = (functional.avg_pool2d(valid_BHW[:, None].float(), stride) == 1).float()
    return similarity_B8HW * neighbours(valid_B1HW, dilation)[:, 0] * valid_B1HW


def pairwise_weights(similarity_B8HW: Tensor, bitmasks_GHW: Tensor, image_ids_G: Tensor, threshold: float = 0.3) -> Tensor:
    """1 where the colours are similar and the pixel lies in the box. -> (G, 8, H, W)"""
    return (similarity_B8HW[image_ids_G] >= threshold).float() * bitmasks_GHW[:, None]


def pairwise_loss(mask_logits_NHW: Tensor, weights_N8HW: Tensor, dilation: int = 2) -> Tensor:
    """-log P(pixel and neighbour have the same label), mean over an instance's weights. -> (N,)"""
    log_object_NHW, log_background_NHW = functional.logsigmoid(mask_logits_NHW), functional.logsigmoid(-mask_logits_NHW)
    both_object_N8HW = log_object_NHW[:, None] + neighbours(log_object_NHW[:, None], dilation)[:, 0]
    both_background_N8HW = log_background_NHW[:, None] + neighbours(log_background_NHW[:, None], dilation)[:, 0]
    losses_N8HW = -torch.logaddexp(both_object_N8HW, both_background_N8HW)
    return (losses_N8HW * weights_N8HW).sum((1, 2, 3)) / weights_N8HW.sum((1, 2, 3)).clamp(min=1)


def projection_loss(mask_logits_NHW: Tensor, bitmasks_NHW: Tensor) -> Tensor:
    """Dice between the maxima along each axis of mask and box, both axes added. -> (N,)"""
    probabilities_NHW = mask_logits_NHW.sigmoid()
    losses = []
    for axis in (1, 2):
        mask_NS, box_NS = probabilities_NHW.max(axis).values, bitmasks_NHW.max(axis).values
        overlap_N = (mask_NS * box_NS).sum(1)
        losses.append(1 - 2 * overlap_N / ((mask_NS**2).sum(1) + (box_NS**2).sum(1) + 1e-5))
    return losses[0] + losses[1]


# SIM: prototypes, semantic map, pseudo masks


@torch.no_grad()
def confident_pixels(
    instance_GHW: Tensor,
    bitmasks_GHW: Tensor,
    features_BCHW: Tensor,
    image_ids_G: Tensor,
    labels_G: Tensor,
    *,
    confident: float = 0.7,
    max_pixels: int | None = 256,
) -> tuple[Tensor, Tensor]:
    """Features and class of the pixels that the teacher is sure of: all of them, or `max_pixels` of an instance, evenly
    spaced. -> (M, C), (M,)"""
    pixels, labels = [], []
    for instance_HW, bitmask_HW, image, label in zip(instance_GHW, bitmasks_GHW, image_ids_G, labels_G, strict=True):
        rows_M, columns_M = torch.nonzero((instance_HW > confident) & (bitmask_HW > 0), as_tuple=True)
        if max_pixels is not None and len(rows_M) > max_pixels:
            rank_M, count = torch.arange(len(rows_M), device=rows_M.device), len(rows_M)
            chosen_M = (rank_M + 1) * max_pixels // count > rank_M * max_pixels // count
            rows_M, columns_M = rows_M[chosen_M], columns_M[chosen_M]
        pixels.append(features_BCHW[image][:, rows_M, columns_M].T)
        labels.append(label.expand(len(rows_M)))
    return torch.cat(pixels), torch.cat(labels)


@torch.no_grad()
def sinkhorn(similarity_ML: Tensor, epsilon: float = 0.05, num_iterations: int = 3) -> Tensor:
    """Optimal transport of pixels to prototypes with equal shares, by scaling columns and rows in turn. -> (M, L)"""
    num_pixels, num_prototypes = similarity_ML.shape
    plan_LM = torch.exp(similarity_ML / epsilon).T
    plan_LM = plan_LM / plan_LM.sum()
    for _ in range(num_iterations):
        plan_LM = plan_LM / plan_LM.sum(1, keepdim=True) / num_prototypes
        plan_LM = plan_LM / plan_LM.sum(0, keepdim=True) / num_pixels
    return plan_LM.T * num_pixels


@torch.no_grad()
def moved_prototypes(
    prototypes_KLC: Tensor, counts_KL: Tensor, pixels_MC: Tensor, labels_M: Tensor, momentum: float = 0.999
) -> Tensor:
    """Class by class: each prototype moves to the mean of the pixels that optimal transport gives it. -> (K, L, C)

    counts_KL: moves so far; the first ones weigh as a running mean.
    """
    prototypes_KLC = prototypes_KLC.clone()
    for label in labels_M.unique().tolist():
        pixels_NC = functional.normalize(pixels_MC[labels_M == label], dim=1)
        prototypes_LC = prototypes_KLC[label]
        assignment_NL = sinkhorn(pixels_NC @ prototypes_LC.T)
        hard_NL = functional.one_hot(assignment_NL.argmax(1), len(prototypes_LC)).float()
        mass_L = hard_NL.sum(0)
        centroids_LC = hard_NL.T @ pixels_NC / mass_L.clamp(min=1)[:, None]
        keep_L1 = torch.clamp(1 - 1 / (counts_KL[label] + 1), max=momentum)[:, None]
        moved_LC = functional.normalize(keep_L1 * prototypes_LC + (1 - keep_L1) * centroids_LC, dim=1)
        prototypes_KLC[label] = torch.where(mass_L[:, None] > 0, moved_LC, prototypes_LC)
    return prototypes_KLC


@torch.no_grad()
def semantic_map(
    features_BCHW: Tensor, prototypes_KLC: Tensor, image_ids_G: Tensor, labels_G: Tensor, temperature: float = 0.1
) -> Tensor:
    """Eq. 1, instance by instance: sigmoid of the largest cosine / temperature. -> (G, H, W)"""
    features_BCHW = functional.normalize(features_BCHW, dim=1)
    maps = []
    for image, label in zip(image_ids_G.tolist(), labels_G.tolist(), strict=True):
        cosine_LHW = torch.einsum("lc,chw->lhw", prototypes_KLC[label], features_BCHW[image])
        maps.append(torch.sigmoid(cosine_LHW.max(0).values / temperature))
    return torch.stack(maps)


@torch.no_grad()
def instance_map(mask_logits_NHW: Tensor, instance_ids_N: Tensor, boxes_G4: Tensor, *, stride: int, mu: float = 5.0) -> Tensor:
    """Eq. 6, instance by instance: its positives' probabilities, weighted by exp(mu * IoU of their box). -> (G, H, W)"""
    maps = []
    for instance, box_4 in enumerate(boxes_G4):
        probabilities_NHW = mask_logits_NHW[instance_ids_N == instance].sigmoid()
        ious = [box_iou(tight_box(probabilities_HW > 0.5, stride), box_4) for probabilities_HW in probabilities_NHW]
        weights_N = torch.exp(mu * torch.stack(ious))
        weights_N = weights_N / weights_N.sum()
        maps.append((weights_N[:, None, None] * probabilities_NHW).sum(0))
    return torch.stack(maps)


def tight_box(mask_HW: Tensor, stride: int) -> Tensor:
    """xyxy in input pixels, zeros for an empty mask."""
    rows_M, columns_M = torch.nonzero(mask_HW, as_tuple=True)
    if len(rows_M) == 0:
        return torch.zeros(4, device=mask_HW.device)
    corners = torch.stack([columns_M.min(), rows_M.min(), columns_M.max() + 1, rows_M.max() + 1])
    return corners.float() * stride


def box_iou(a_4: Tensor, b_4: Tensor) -> Tensor:
    overlap = (torch.minimum(a_4[2:], b_4[2:]) - torch.maximum(a_4[:2], b_4[:2])).clamp(min=0).prod()
    return overlap / ((a_4[2:] - a_4[:2]).prod() + (b_4[2:] - b_4[:2]).prod() - overlap)


@torch.no_grad()
def self_correction(
    semantic_GHW: Tensor,
    instance_GHW: Tensor,
    bitmasks_GHW: Tensor,
    *,
    alpha: float = 0.5,
    confident: float = 0.7,
    high_range: tuple[float, float] = (0.7, 0.8),
    low: float = 0.4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7: the mean of the two maps inside the box, what is foreground, and what is trusted. -> three times (G, H, W)

    As many pixels pass the high threshold as the teacher is sure of, within `high_range`.
    """
    corrected_GHW = ((1 - alpha) * semantic_GHW + alpha * instance_GHW) * bitmasks_GHW
    num_confident_G = ((instance_GHW > confident) * bitmasks_GHW).flatten(1).sum(1).long()
    sorted_GP = corrected_GHW.flatten(1).sort(1, descending=True).values
    rank_G = num_confident_G.clamp(max=sorted_GP.shape[1] - 1)
    high_G = sorted_GP.gather(1, rank_G[:, None])[:, 0].clamp(*high_range)
    foreground_GHW = corrected_GHW > high_G[:, None, None]
    return corrected_GHW, foreground_GHW, foreground_GHW | (corrected_GHW < low)

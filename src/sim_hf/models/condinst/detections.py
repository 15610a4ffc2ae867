"""From dense predictions to detections: decoding, suppression, and the locations that answer a given box.

Shape letters: B images, K classes, M locations of all levels, N detections of the batch, Q of the image that has most, P boxes
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

_NEVER = -30.0  # a logit of 1e-13, and finite
_SMALLEST = 1e-6  # probability that is left for "no object", and the least of a class that answers


@dataclass
class Detections:
    """Image by image, the best first: image_ids_N ascending, locations_N (the rows of the dense predictions), labels_N, scores_N
    and boxes_N4 in input pixels. ranks_N: 0 for the first of its image, ..."""

    image_ids_N: Tensor
    locations_N: Tensor
    labels_N: Tensor
    scores_N: Tensor
    boxes_N4: Tensor
    ranks_N: Tensor


def decoded_boxes(locations_M2: Tensor, distances_BM4: Tensor, input_size: tuple[int, int]) -> Tensor:
    """Distances to the four sides -> (B, M, 4) xyxy, inside the input."""
    boxes_BM4 = torch.cat([locations_M2 - distances_BM4[..., :2], locations_M2 + distances_BM4[..., 2:]], -1)
    height, width = input_size
    limits_4 = boxes_BM4.new_tensor([width, height, width, height])
    return torch.minimum(boxes_BM4.clamp(min=0), limits_4)


def detection_scores(class_logits_BMK: Tensor, centerness_logits_BM: Tensor) -> Tensor:
    """The geometric mean of class probability and centerness -> (B, M, K) float32"""
    return (class_logits_BMK.float().sigmoid() * centerness_logits_BM.float().sigmoid()[..., None]).sqrt()


def detect(
    class_logits_BMK: Tensor,
    centerness_logits_BM: Tensor,
    boxes_BM4: Tensor,
    valid_BM: Tensor,
    *,
    score_threshold: float,
    top_k: int,
    nms_threshold: float,
    max_detections: int,
) -> Detections:
    """The best boxes of each class of each image. One location may be found for several classes."""
    num_classes = class_logits_BMK.shape[-1]
    scores_BMK = detection_scores(class_logits_BMK, centerness_logits_BM)
    wanted_BMK = (class_logits_BMK.float().sigmoid() > score_threshold) & valid_BM[..., None]
    scores_BMK = scores_BMK.masked_fill(~wanted_BMK, -1.0)
    images, places, scores, ranks = [], [], [], []
    for image, scores_MK in enumerate(scores_BMK):
        scores_C, index_C = scores_MK.flatten().topk(min(top_k, scores_MK.numel()))
        kept = scores_C >= 0
        scores_C, index_C = scores_C[kept], index_C[kept]
        boxes_C4 = boxes_BM4[image, index_C // num_classes].float()
        kept = batched_nms(boxes_C4, scores_C, index_C % num_classes, nms_threshold)[:max_detections]
        images.append(torch.full_like(kept, image))
        places.append(index_C[kept])
        scores.append(scores_C[kept])
        ranks.append(torch.arange(len(kept), device=kept.device))
    image_ids_N, places_N = torch.cat(images), torch.cat(places)
    locations_N = places_N // num_classes
    return Detections(
        image_ids_N=image_ids_N,
        locations_N=locations_N,
        labels_N=places_N % num_classes,
        scores_N=torch.cat(scores),
        boxes_N4=boxes_BM4[image_ids_N, locations_N],
        ranks_N=torch.cat(ranks),
    )


def class_logits_of(labels_N: Tensor, scores_N: Tensor, num_classes: int) -> Tensor:
    """Logits over the classes and "no object" whose softmax is the score for the label and the rest for no object, so that
    everything that reads a query model reads detections. -> (N, K + 1)"""
    scores_N = scores_N.float().clamp(_SMALLEST, 1 - _SMALLEST)
    logits_NK = scores_N.new_full((len(scores_N), num_classes + 1), _NEVER)
    logits_NK[:, -1] = torch.log1p(-scores_N)
    return logits_NK.scatter(1, labels_N[:, None], scores_N.log()[:, None])


def answering_locations(
    prompt_boxes_BP4: Tensor, locations_M2: Tensor, scores_BMK: Tensor, boxes_BM4: Tensor, valid_BM: Tensor
) -> Tensor:
    """For every given box the location inside it with the best product of score and IoU of its predicted box with the given
    one; the location that is nearest to the box's middle where none lies inside. -> (B, P)"""
    scores_BM = scores_BMK.amax(-1)
    chosen = []
    for prompts_P4, scores_M, boxes_M4, valid_M in zip(
        prompt_boxes_BP4.float(), scores_BM, boxes_BM4.float(), valid_BM, strict=True
    ):
        offsets_PM4 = torch.cat([locations_M2 - prompts_P4[:, None, :2], prompts_P4[:, None, 2:] - locations_M2], -1)
        inside_PM = (offsets_PM4.amin(-1) > 0) & valid_M
        middle_P2 = (prompts_P4[:, :2] + prompts_P4[:, 2:]) / 2
        rank_PM = torch.where(inside_PM, scores_M * box_iou(prompts_P4, boxes_M4), -torch.cdist(middle_P2, locations_M2))
        chosen.append(rank_PM.argmax(1))
    return torch.stack(chosen)


def prompt_class_logits(scores_NK: Tensor) -> Tensor:
    """As `class_logits_of`, for locations with scores of all classes. -> (N, K + 1)"""
    scores_NK = scores_NK / scores_NK.sum(1, keepdim=True).clamp(min=1)
    rest_N1 = 1 - scores_NK.sum(1, keepdim=True)
    return torch.cat([scores_NK, rest_N1], 1).clamp(min=_SMALLEST).log()

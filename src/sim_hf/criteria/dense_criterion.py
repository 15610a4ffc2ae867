"""The detection side of a dense model (CondInst on FCOS): assign, price classes, boxes and centerness, and hand the positives to
the mask criterion.

Shape letters: B images, M locations of all levels, K classes, G instances, N positives, C channels, h w of the mask grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from sim_hf.criteria.base import MaskCriterion, zero_with_gradient
from sim_hf.criteria.dense_assignment import DenseAssignment, assign_locations, best_positives, positives_kept
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions


@dataclass(frozen=True)
class DenseNormalizers:
    """Counts of one optimiser step over all its micro-batches and ranks, none of them 0.

    num_positives: assigned locations. centerness: the sum of their targets. num_mask_positives: those that take mask losses.
    """

    num_positives: float
    centerness: float
    num_mask_positives: float

    @classmethod
    def from_counts(cls, num_positives: float, centerness: float, num_mask_positives: float) -> DenseNormalizers:
        return cls(max(num_positives, 1.0), max(centerness, 1e-6), max(num_mask_positives, 1.0))


class DenseCriterion(nn.Module):
    """Focal loss of the classes, GIoU of the boxes weighted by centerness, cross-entropy of the centerness, and the mask
    criterion's losses.

    The positives of an instance are all locations that are assigned to it, the same for student and teacher. The teacher's go to
    the mask criterion with the boxes that it predicts there: SIM's positive mask weighting as in the paper. Of the student's
    those with the best scores take mask losses, `mask_positives` of an image divided among its instances (as in CondInst): how
    many that are depends on the annotations only, so every loss is a sum divided by a count that is known before the forward
    pass. A mask loss is a mean over positives here, where `SetCriterion` has one over instances.

    sizes_of_interest: where the ranges of the levels end, input pixels, for all levels but the last.
    """

    def __init__(
        self,
        mask_criterion: MaskCriterion,
        *,
        sizes_of_interest: Sequence[float],
        class_weight: float = 1.0,
        box_weight: float = 1.0,
        centerness_weight: float = 1.0,
        mask_positives: int = 64,
    ) -> None:
        super().__init__()
        self.mask_criterion = mask_criterion
        self.sizes_of_interest = tuple(sizes_of_interest)
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.centerness_weight = centerness_weight
        self.mask_positives = mask_positives

    def needs_teacher(self, global_step: int) -> bool:
        return self.mask_criterion.needs_teacher(global_step)

    def counts(self, targets: InstanceTargets) -> tuple[float, float, float]:
        """This micro-batch's part of the step's `DenseNormalizers`."""
        assigned = self._assign(targets)
        kept_G = positives_kept(assigned.instance_ids_N, targets, self.mask_positives)
        return float(len(assigned)), float(assigned.centerness().sum()), float(kept_G.sum())

    def normalizers(self, counts: Sequence[float]) -> DenseNormalizers:
        """From the sums of `counts` over micro-batches and ranks."""
        return DenseNormalizers.from_counts(*counts)

    def forward(
        self,
        student_output,
        teacher_output,
        targets: InstanceTargets,
        images_BCHW: Tensor,
        pixel_mask_BHW: Tensor,
        *,
        normalizers: DenseNormalizers,
        global_step: int,
    ) -> CriterionOutput:
        """Price the student's output; `teacher_output` is None when the step does not need it."""
        with torch.autocast(images_BCHW.device.type, enabled=False):  # sums and exponentials stay float32
            assigned = self._assign(targets)
            students = [self._student_positives(student_output, assigned, targets)]
            teacher = None if teacher_output is None else _teacher_positives(teacher_output, assigned, targets)
            output = self.mask_criterion(
                students,
                teacher,
                targets,
                images_BCHW,
                pixel_mask_BHW,
                num_instances=normalizers.num_mask_positives,
                global_step=global_step,
            )
            losses = self._detection_losses(student_output, assigned, targets, normalizers)
            # Whatever the mask criterion reads: every output has a gradient on every rank and batch, also without instances.
            losses["loss_focal"] = losses["loss_focal"] + zero_with_gradient(students)
            output.losses = {**losses, **output.losses}
            output.positives = _best_of_each(students[0], len(targets))
        return output

    @torch.no_grad()
    def teacher_positives(self, output, targets: InstanceTargets, *, global_step: int) -> MaskPredictions:
        """The positives that positive mask weighting weighs, with the boxes that are predicted there."""
        return _teacher_positives(output, self._assign(targets), targets)

    def _assign(self, targets: InstanceTargets) -> DenseAssignment:
        return assign_locations(targets, sizes_of_interest=self.sizes_of_interest)

    def _detection_losses(
        self, output, assigned: DenseAssignment, targets: InstanceTargets, normalizers: DenseNormalizers
    ) -> dict[str, Tensor]:
        where = (assigned.image_ids_N, assigned.locations_N)
        classes_BMK = torch.zeros_like(output.class_logits, dtype=torch.float32)
        classes_BMK[(*where, targets.class_labels_G[assigned.instance_ids_N])] = 1.0
        valid_BM = output.valid_locations.bool()  # what stands in the padding is no background either
        focal = sigmoid_focal_loss(output.class_logits[valid_BM].float(), classes_BMK[valid_BM], reduction="sum")
        centerness_N = assigned.centerness()
        boxes_N4 = _boxes(assigned, output.box_distances[where])
        giou_N = generalized_box_iou_loss(boxes_N4, targets.boxes_G4[assigned.instance_ids_N])
        centerness = nn.functional.binary_cross_entropy_with_logits(
            output.centerness_logits[where].float(), centerness_N, reduction="sum"
        )
        return {
            "loss_focal": self.class_weight * focal / normalizers.num_positives,
            "loss_giou": self.box_weight * (giou_N * centerness_N).sum() / normalizers.centerness,
            "loss_centerness": self.centerness_weight * centerness / normalizers.num_positives,
        }

    def _student_positives(self, output, assigned: DenseAssignment, targets: InstanceTargets) -> MaskPredictions:
        kept_G = positives_kept(assigned.instance_ids_N, targets, self.mask_positives)
        scores_N = _scores(output, assigned, targets)
        return _positives(output, assigned.select(best_positives(assigned.instance_ids_N, scores_N, kept_G)), targets)


@torch.no_grad()
def _best_of_each(positives: MaskPredictions, num_instances: int) -> MaskPredictions:
    """One positive an instance: several of one object look alike, which diagnostics would take for a collapse."""
    one_G = torch.ones(num_instances, dtype=torch.int64, device=positives.scores_N.device)
    best = best_positives(positives.instance_ids_N, positives.scores_N, one_G)
    return MaskPredictions(
        positives.mask_logits_NHW[best],
        positives.instance_ids_N[best],
        positives.scores_N[best],
        positives.mask_features_BCHW,
    )


@torch.no_grad()
def _teacher_positives(output, assigned: DenseAssignment, targets: InstanceTargets) -> MaskPredictions:
    positives = _positives(output, assigned, targets)
    positives.boxes_N4 = _boxes(assigned, output.box_distances[assigned.image_ids_N, assigned.locations_N])
    return positives


def _positives(output, assigned: DenseAssignment, targets: InstanceTargets) -> MaskPredictions:
    mask_logits_Nhw = output.mask_logits(assigned.image_ids_N, assigned.locations_N)
    features_BChw = nn.functional.interpolate(
        output.mask_features.float(), size=mask_logits_Nhw.shape[-2:], mode="bilinear", align_corners=False
    )
    return MaskPredictions(
        mask_logits_NHW=mask_logits_Nhw,
        instance_ids_N=assigned.instance_ids_N,
        scores_N=_scores(output, assigned, targets),
        mask_features_BCHW=features_BChw,
    )


@torch.no_grad()
def _scores(output, assigned: DenseAssignment, targets: InstanceTargets) -> Tensor:
    """sqrt(P(class of the instance) * centerness), by which FCOS ranks its detections -> (N,)"""
    where = (assigned.image_ids_N, assigned.locations_N)
    class_logits_N = output.class_logits[(*where, targets.class_labels_G[assigned.instance_ids_N])]
    return (class_logits_N.float().sigmoid() * output.centerness_logits[where].float().sigmoid()).sqrt()


def _boxes(assigned: DenseAssignment, distances_N4: Tensor) -> Tensor:
    """The boxes that are predicted at the positives -> (N, 4) xyxy input pixels"""
    distances_N4 = distances_N4.float()
    return torch.cat([assigned.centers_N2 - distances_N4[:, :2], assigned.centers_N2 + distances_N4[:, 2:]], -1)

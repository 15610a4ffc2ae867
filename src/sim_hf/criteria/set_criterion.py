"""The detection side of a query model: match, price the classes, and hand the positives to the mask criterion.

Shape letters: B images, Q queries, K classes (the last logit is no-object), G instances, N positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sim_hf.criteria.matcher import HungarianMatcher
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions


@dataclass(frozen=True)
class StepNormalizers:
    """Counts of one optimiser step over all its micro-batches and ranks.

    num_instances: annotated (and pasted) instances, at least 1. class_weight: sum of the class weights of all queries.
    """

    num_instances: float
    class_weight: float

    @staticmethod
    def counts(targets: InstanceTargets, num_queries: int, no_object_weight: float) -> tuple[float, float]:
        """What one micro-batch adds to the two counts; they may be summed over micro-batches and ranks."""
        per_image_B = torch.bincount(targets.image_ids_G, minlength=targets.num_images)
        matched = float(per_image_B.clamp(max=num_queries).sum())
        return float(len(targets)), matched + no_object_weight * (targets.num_images * num_queries - matched)

    @classmethod
    def from_counts(cls, num_instances: float, class_weight: float) -> StepNormalizers:
        return cls(max(float(num_instances), 1.0), max(float(class_weight), 1e-6))


class SetCriterion(nn.Module):
    """Class loss (cross-entropy, no-object weighted) + the mask criterion's losses, deeply supervised on all layers.

    The teacher's positives (SIM on a query model) are its matched queries of every decoder layer: several predictions for an
    instance for free, which is what positive mask weighting needs.
    """

    def __init__(
        self,
        mask_criterion: nn.Module,
        *,
        num_queries: int,
        class_weight: float = 2.0,
        no_object_weight: float = 0.1,
        class_cost: float = 2.0,
        mask_cost: float = 5.0,
    ) -> None:
        super().__init__()
        self.mask_criterion = mask_criterion
        self.num_queries = num_queries
        self.class_weight = class_weight
        self.no_object_weight = no_object_weight
        self.matcher = HungarianMatcher(mask_criterion, class_cost=class_cost, mask_cost=mask_cost)

    def needs_teacher(self, global_step: int) -> bool:
        return self.mask_criterion.needs_teacher(global_step)

    def counts(self, targets: InstanceTargets) -> tuple[float, float]:
        """This micro-batch's part of the step's `StepNormalizers`."""
        return StepNormalizers.counts(targets, self.num_queries, self.no_object_weight)

    def forward(
        self,
        student_output,
        teacher_output,
        targets: InstanceTargets,
        images_BCHW: Tensor,
        pixel_mask_BHW: Tensor,
        *,
        normalizers: StepNormalizers,
        global_step: int,
    ) -> CriterionOutput:
        """Price the student's output; `teacher_output` is None when the step does not need it."""
        with torch.autocast(images_BCHW.device.type, enabled=False):  # sums and exponentials stay float32
            ids_of_image = [(targets.image_ids_G == i).nonzero(as_tuple=True)[0] for i in range(targets.num_images)]
            targets_of_image = [targets.select(ids) for ids in ids_of_image]
            layers = _layers(student_output)
            matched = self.matcher(layers, targets_of_image, global_step=global_step)
            students = [
                _positives(layer, match, ids_of_image, targets, student_output.mask_features)
                for layer, match in zip(layers, matched, strict=True)
            ]
            teacher = None
            if teacher_output is not None:
                teacher = self._teacher_positives(teacher_output, targets_of_image, ids_of_image, targets, global_step)
            output = self.mask_criterion(
                students,
                teacher,
                targets,
                images_BCHW,
                pixel_mask_BHW,
                num_instances=normalizers.num_instances,
                global_step=global_step,
            )
            loss_class = torch.stack(
                [self._class_loss(logits, match, targets_of_image) for (logits, _), match in zip(layers, matched, strict=True)]
            ).sum()
            output.losses = {
                "loss_cross_entropy": self.class_weight * loss_class / normalizers.class_weight,
                **output.losses,
            }
            output.positives = students[-1]
            # Every parameter has a gradient on every rank and batch, with and without instances.
            touch = sum(masks_BQHW[:, :, :1, :1].sum() for _, masks_BQHW in layers) * 0.0
            output.losses["loss_cross_entropy"] = output.losses["loss_cross_entropy"] + touch
        return output

    def _class_loss(self, class_logits_BQK: Tensor, match, targets_of_image: Sequence[InstanceTargets]) -> Tensor:
        """Weighted cross-entropy summed over the queries; the caller divides by the step's sum of weights."""
        no_object = class_logits_BQK.shape[-1] - 1
        classes_BQ = torch.full(class_logits_BQK.shape[:2], no_object, device=class_logits_BQK.device)
        for image, (queries, instances) in enumerate(match):
            classes_BQ[image, queries] = targets_of_image[image].class_labels_G[instances]
        weight_K = torch.ones(no_object + 1, device=class_logits_BQK.device)
        weight_K[no_object] = self.no_object_weight
        return nn.functional.cross_entropy(class_logits_BQK.flatten(0, 1), classes_BQ.flatten(), weight_K, reduction="sum")

    @torch.no_grad()
    def _teacher_positives(self, output, targets_of_image, ids_of_image, targets, global_step: int) -> MaskPredictions:
        layers = _layers(output)
        matched = self.matcher(layers, targets_of_image, global_step=global_step)
        positives = [
            _positives(layer, match, ids_of_image, targets, output.mask_features)
            for layer, match in zip(layers, matched, strict=True)
        ]
        return MaskPredictions(
            mask_logits_NHW=torch.cat([p.mask_logits_NHW for p in positives]),
            instance_ids_N=torch.cat([p.instance_ids_N for p in positives]),
            scores_N=torch.cat([p.scores_N for p in positives]),
            mask_features_BCHW=output.mask_features.float(),
        )


def _layers(output) -> list[tuple[Tensor, Tensor]]:
    """(class logits, mask logits) of every decoder prediction, the final one last, in float32."""
    pairs = [(a["class_queries_logits"], a["masks_queries_logits"]) for a in output.auxiliary_logits or ()]
    pairs.append((output.class_queries_logits, output.masks_queries_logits))
    return [(classes.float(), masks.float()) for classes, masks in pairs]


def _positives(
    layer: tuple[Tensor, Tensor],
    match,
    ids_of_image: Sequence[Tensor],
    targets: InstanceTargets,
    mask_features_BCHW: Tensor,
) -> MaskPredictions:
    """Gather the matched queries of one layer; instance ids count over the whole batch."""
    class_logits_BQK, mask_logits_BQHW = layer
    images_N = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(match)])
    queries_N = torch.cat([queries for queries, _ in match])
    ids_N = torch.cat([ids[instances] for ids, (_, instances) in zip(ids_of_image, match, strict=True)])
    probability_NK = class_logits_BQK[images_N, queries_N].detach().softmax(-1)
    return MaskPredictions(
        mask_logits_NHW=mask_logits_BQHW[images_N, queries_N],
        instance_ids_N=ids_N,
        scores_N=probability_NK.gather(1, targets.class_labels_G[ids_N][:, None])[:, 0],
        mask_features_BCHW=mask_features_BCHW,
    )

"""The detection side of a query model: match, price the classes, and hand the positives to the mask criterion.

Shape letters: B images, Q queries (or prompts), K classes (the last logit is no-object), G instances, N positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sim_hf.criteria.base import MaskCriterion, zero_with_gradient
from sim_hf.criteria.matcher import HungarianMatcher, Matches
from sim_hf.structures import CriterionOutput, InstanceTargets, MaskPredictions

# Which queries of the teacher are positives: those matched in every decoder layer, those matched in the final one, or for each
# instance the cheapest queries of the final layer, one-to-many.
POSITIVES = ("layers", "final", "many")
NUM_NEAREST = 5


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

    The teacher's positives (SIM on a query model) are by default its matched queries of every decoder layer: several
    predictions for an instance for free, which is what positive mask weighting needs. positives: one of `POSITIVES`, see there.

    Where the network was prompted with the boxes of the instances (`masks_prompts_logits`; prompt p of an image is its p-th
    instance), a prompt is one more positive of its instance, without matching: for the teacher, which then has positives that
    cannot belong to a neighbour, and for the student, whose prompts take the same losses and one for their class.
    """

    def __init__(
        self,
        mask_criterion: MaskCriterion,
        *,
        num_queries: int,
        class_weight: float = 2.0,
        no_object_weight: float = 0.1,
        class_cost: float = 2.0,
        mask_cost: float = 5.0,
        positives: str = "layers",
    ) -> None:
        super().__init__()
        self.mask_criterion = mask_criterion
        self.num_queries = num_queries
        self.class_weight = class_weight
        self.no_object_weight = no_object_weight
        self.positives = positives
        self.matcher = HungarianMatcher(mask_criterion, class_cost=class_cost, mask_cost=mask_cost)

    def needs_teacher(self, global_step: int) -> bool:
        return self.mask_criterion.needs_teacher(global_step)

    def counts(self, targets: InstanceTargets) -> tuple[float, float]:
        """This micro-batch's part of the step's `StepNormalizers`."""
        return StepNormalizers.counts(targets, self.num_queries, self.no_object_weight)

    def normalizers(self, counts: Sequence[float]) -> StepNormalizers:
        """From the sums of `counts` over micro-batches and ranks."""
        return StepNormalizers.from_counts(*counts)

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
            layers, prompts = _layers(student_output, "queries"), _layers(student_output, "prompts")
            matched = self.matcher(layers, targets, global_step=global_step)
            asked = _asked(prompts, targets)
            chosen = [zip(layers, matched, strict=True), *([zip(prompts, asked, strict=True)] if prompts else [])]
            students = [_positives(of_layer, targets, student_output.mask_features) for of_layer in zip(*chosen, strict=True)]
            teacher = None
            if teacher_output is not None:
                teacher = self.teacher_positives(teacher_output, targets, global_step=global_step)
            output = self.mask_criterion(
                students,
                teacher,
                targets,
                images_BCHW,
                pixel_mask_BHW,
                num_instances=normalizers.num_instances,
                global_step=global_step,
            )
            loss_class = self._class_loss([logits for logits, _ in layers], matched, targets) / normalizers.class_weight
            # Whatever the mask criterion reads: every output has a gradient on every rank and batch, also without instances.
            loss_class = loss_class + zero_with_gradient(students)
            output.losses = {"loss_cross_entropy": loss_class, **output.losses}
            if prompts:
                output.losses["loss_prompt_class"] = self._prompt_class_loss(prompts, asked, targets) / normalizers.num_instances
            output.positives = _first(students[-1], len(matched[-1].queries_N))
        return output

    def _class_loss(self, layers: Sequence[Tensor], matched: Sequence[Matches], targets: InstanceTargets) -> Tensor:
        """Weighted cross-entropy summed over the queries of all layers (class logits (B, Q, K) each); the caller divides by the
        step's sum of weights."""
        class_logits_LBQK = torch.stack(list(layers)).float()
        no_object = class_logits_LBQK.shape[-1] - 1
        device = class_logits_LBQK.device
        classes_LBQ = torch.full(class_logits_LBQK.shape[:3], no_object, device=device)
        for classes_BQ, matches in zip(classes_LBQ, matched, strict=True):
            classes_BQ[matches.images_N, matches.queries_N] = targets.class_labels_G[matches.instance_ids_N]
        weight_K = torch.ones(no_object + 1, device=device)
        weight_K[no_object] = self.no_object_weight
        losses = nn.functional.cross_entropy(class_logits_LBQK.flatten(0, 2), classes_LBQ.flatten(), weight_K, reduction="sum")
        return self.class_weight * losses

    def _prompt_class_loss(
        self, prompts: Sequence[tuple[Tensor, Tensor]], asked: Sequence[Matches], targets: InstanceTargets
    ) -> Tensor:
        """Cross-entropy summed over the prompts and layers: a prompt answers with the class of its instance."""
        logits_NK = torch.cat(
            [logits_BPK[rows.images_N, rows.queries_N] for (logits_BPK, _), rows in zip(prompts, asked, strict=True)]
        )
        labels_N = targets.class_labels_G[torch.cat([rows.instance_ids_N for rows in asked])]
        return self.class_weight * nn.functional.cross_entropy(logits_NK.float(), labels_N, reduction="sum")

    @torch.no_grad()
    def teacher_positives(self, output, targets: InstanceTargets, *, global_step: int) -> MaskPredictions:
        """The positives that positive mask weighting weighs; global_step: for the matching cost."""
        layers, prompts = _layers(output, "queries"), _layers(output, "prompts")
        if self.positives != "layers":
            layers, prompts = layers[-1:], prompts[-1:]
        if self.positives == "many":
            matched = [self.matcher.nearest(layers[0], targets, NUM_NEAREST, global_step=global_step)]
        else:
            matched = self.matcher(layers, targets, global_step=global_step)
        chosen = [*matched, *_asked(prompts, targets)]
        return _positives(list(zip([*layers, *prompts], chosen, strict=True)), targets, output.mask_features)


def _layers(output, kind: str) -> list[tuple[Tensor, Tensor]]:
    """(class logits, mask logits) of every decoder prediction, the final one last; kind: queries, or prompts (if any)."""
    names = (f"class_{kind}_logits", f"masks_{kind}_logits")
    layers = [*(output.auxiliary_logits or ()), {name: getattr(output, name, None) for name in names}]
    return [(layer[names[0]], layer[names[1]]) for layer in layers if layer.get(names[0]) is not None]


def _asked(prompts: Sequence[tuple[Tensor, Tensor]], targets: InstanceTargets) -> list[Matches]:
    """Prompts and their instances, the same in every layer: prompt p of an image is its p-th instance; further instances have no
    prompt."""
    if not prompts:
        return []
    rank_G = targets.rank_in_image()
    ids_N = (rank_G < prompts[0][0].shape[1]).nonzero()[:, 0]
    return [Matches(targets.image_ids_G[ids_N], rank_G[ids_N], ids_N)] * len(prompts)


def _positives(
    chosen: Sequence[tuple[tuple[Tensor, Tensor], Matches]], targets: InstanceTargets, mask_features_BCHW: Tensor
) -> MaskPredictions:
    """The chosen rows of some layers, one layer after the other, in float32; only they are cast, the maps of all queries would
    fill the memory."""
    rows = [(matches.images_N, matches.queries_N) for _, matches in chosen]
    instance_ids_N = torch.cat([matches.instance_ids_N for _, matches in chosen])
    class_logits_NK = torch.cat([logits_BQK.detach()[row] for ((logits_BQK, _), _), row in zip(chosen, rows, strict=True)])
    mask_logits_NHW = torch.cat([mask_logits_BQHW[row] for ((_, mask_logits_BQHW), _), row in zip(chosen, rows, strict=True)])
    probability_NK = class_logits_NK.float().softmax(-1)
    labels_N = targets.class_labels_G[instance_ids_N]
    return MaskPredictions(
        mask_logits_NHW=mask_logits_NHW.float(),
        instance_ids_N=instance_ids_N,
        scores_N=probability_NK.gather(1, labels_N[:, None])[:, 0],
        mask_features_BCHW=mask_features_BCHW,
    )


def _first(positives: MaskPredictions, count: int) -> MaskPredictions:
    return MaskPredictions(
        positives.mask_logits_NHW[:count],
        positives.instance_ids_N[:count],
        positives.scores_N[:count],
        positives.mask_features_BCHW,
    )

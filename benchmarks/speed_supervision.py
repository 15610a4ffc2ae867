"""The supervision of SIM, part by part and in all, beside the published form in plain torch (`plain_supervision.py`).

Both sides of a part get the same tensors. "In all" each runs the whole chain from pictures, boxes and predictions: ours is
the package's criterion and pseudo-mask generator as the training step calls them.

Equal means: floats (losses, gradients, maps, prototypes) agree entry by entry within 1e-4 of their value plus 1e-5 of the
largest one, and masks pixel by pixel, with at most one exception in 100,000: a value beside a threshold may fall on either
side, and where the two largest logits of a row round to one probability, the published projection loss pushes the first of
them, ours the larger. A float that is an exception still lies within 1e-2 of the largest one. In all, a pair of cells may
likewise fall on the other side of the colour threshold, which moves the gradient of a whole instance: so there a float
tensor's difference is at most 1e-3 of its length (L2), and every part must be equal too.

Shape letters: B images, G instances, N rows of predictions, K classes or offsets of half a ring, L prototypes, C channels,
H W mask grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import plain_supervision as plain
from measuring import Row, compare, seconds
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.losses import box_projections, color_similarity, pairwise_edges, pairwise_loss, projection_loss
from sim_hf.mask_generation import (
    PrototypeBank,
    PseudoMaskGenerator,
    instance_probability_map,
    positive_mask_weights,
    predicted_boxes,
    self_correction,
    semantic_probability_map,
)
from sim_hf.mask_generation.box_cells import box_cells
from supervision_inputs import STRIDE, Inputs, Picture, halved, make_inputs, read_pictures

BATCH_SIZE = 2
SIZE = (800, 1344)  # height and width of the input
GOAL, MEMORY_GOAL = 1 / 20, 1 / 8  # of the whole
RELATIVE, OF_LARGEST, OF_LENGTH = 1e-4, 1e-5, 1e-3
EXCEPTIONS, EXCEPTION_OF_LARGEST = 1e-5, 1e-2
COLOR_THRESHOLD = 0.3
CONFIDENT = 0.7
BOUNDED_SAMPLE = 4096  # pixels of a class in a training run
CHUNK_SIZE = 16
MAX_PIXELS = 256  # of an instance, for its class's prototypes
PROJECTION_WEIGHT, PAIRWISE_WEIGHT = 5.0, 2.0

PROTOTYPES = "Sinkhorn and prototype update"

Result = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """Two calls without arguments that give the same named tensors."""

    name: str
    peer: str
    ours: Callable[[], Result]
    plain: Callable[[], Result]


def supervision_rows(repeats: int, data: Path | None, *, device: str = "cpu") -> list[Row]:
    """A row for each part, one for all of them together, and those of growth."""
    return part_rows(repeats, data, device=device) + many_instances_rows(repeats, data, device=device)


def many_instances_rows(repeats: int, data: Path | None, *, device: str = "cpu") -> list[Row]:
    return growth_rows(repeats, *read_pictures(data, SIZE, BATCH_SIZE), device=device)


def part_rows(
    repeats: int,
    data: Path | None,
    *,
    size: tuple[int, int] = SIZE,
    num_instances: int = 40,
    num_layers: int = 4,
    device: str = "cpu",
) -> list[Row]:
    """A row for each part, and one for all of them together. size: (height, width) of the input."""
    pictures, num_classes = read_pictures(data, size, BATCH_SIZE)
    inputs = make_inputs(pictures, num_classes, num_instances=num_instances, num_layers=num_layers, device=device)
    sides = Sides(inputs)
    measured = {"repeats": repeats, "device": device}
    where = f"{size[0] // STRIDE}x{size[1] // STRIDE}, {num_instances} instances"
    rows = []
    for part in sides.parts():
        equal = agree(part.ours(), part.plain())
        rows.append(compare(f"{part.name}, {where}", part.peer, part.ours, part.plain, equal=equal, goal=None, **measured))
        if part.name == PROTOTYPES:
            every_pixel = seconds(lambda: sides.plain.prototypes(max_pixels=None), device)
            rows[-1].note = f"both on {MAX_PIXELS} pixels an instance; the peer on all confident ones: {every_pixel:.3f} s"
    equal = all(row.equal for row in rows) and agree(sides.ours.everything(), sides.plain.everything(), by_length=True)
    rows.append(
        compare(
            f"supervision in all, {where}, {num_layers} layers",
            "the published form in plain torch, all of the above",
            sides.ours.everything,
            sides.plain.everything,
            equal=equal,
            goal=GOAL,
            memory_goal=MEMORY_GOAL,
            **measured,
            note=f"a box covers {inputs.box_share():.1%} of its picture; {sides.similar_share():.0%} of all pairs are similar",
        )
    )
    return rows


def growth_rows(
    repeats: int,
    pictures: list[Picture],
    num_classes: int,
    *,
    counts: tuple[int, ...] = (20, 100, 300),
    num_layers: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Ours with more and more instances in a picture, beside ours with the fewest, on half of the pictures' size: the time
    should grow no faster than the instances. Then the pseudo masks of the most, in chunks and at once: what chunks save.

    Equal: both ways of chunking give the same masks. The prototypes take the bounded sample of a training run.
    """
    pictures = [halved(picture) for picture in pictures]
    few, *more = [
        Sides(
            make_inputs(pictures, num_classes, num_instances=BATCH_SIZE * count, num_layers=num_layers, device=device),
            bounded_sample=True,
        ).ours
        for count in counts
    ]
    rows = [
        compare(
            f"supervision in all, {count} instances a picture",
            f"the same with {counts[0]}",
            many.everything,
            few.everything,
            equal=agree(many.chunked_masks(CHUNK_SIZE), many.chunked_masks(BATCH_SIZE * count)),
            goal=count / counts[0],
            repeats=repeats,
            device=device,
            note="the goal is the ratio of the numbers",
        )
        for count, many in zip(counts[1:], more, strict=True)
    ]
    chunks = compare(
        f"pseudo masks of {counts[-1]} instances a picture, {CHUNK_SIZE} at a time",
        "all at once",
        lambda: more[-1].chunked_masks(CHUNK_SIZE),
        lambda: more[-1].chunked_masks(BATCH_SIZE * counts[-1]),
        equal=rows[-1].equal,
        goal=None,
        memory_goal=1.0,
        repeats=repeats,
        device=device,
    )
    return [*rows, chunks]


class Sides:
    """Ours and the plain form on the same inputs. What a part takes from an earlier one is made once, by the plain form."""

    def __init__(self, inputs: Inputs, *, bounded_sample: bool = False) -> None:
        self.plain = Plain(inputs)
        self.ours = Ours(inputs, self.plain, bounded_sample)

    def parts(self) -> list[Part]:
        layers = len(self.plain.inputs.students)
        ours, peer = self.ours, self.plain
        pairwise = f"pairwise loss, {layers} layers, forward + backward"
        return [
            Part(pairwise, "8 neighbours by unfold, dense for every instance", ours.pairwise, peer.pairwise),
            Part("projection loss, forward + backward", "boxes painted one by one", ours.projection, peer.projection),
            Part("Lab colour affinity", "8 neighbours by unfold", ours.color, peer.color),
            Part(PROTOTYPES, "instance by instance, class by class", ours.prototypes, peer.prototypes),
            Part("semantic map", "instance by instance", ours.semantic, peer.semantic),
            Part("pseudo masks", "instance by instance, full sort", ours.pseudo_masks, peer.pseudo_masks),
        ]

    def similar_share(self) -> float:
        return float((self.plain.similarity_B8HW >= COLOR_THRESHOLD).float().mean())


class Plain:
    """The published form. The box bitmasks are made in every part that needs them, and once in all."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.similarity_B8HW = self.color_similarity()
        self.instance_GHW = self.instance_map()
        self.semantic_GHW = self.semantic_map()

    def pairwise(self) -> Result:
        losses = self.pairwise_losses(self.similarity_B8HW, self.bitmasks())
        return losses_and_gradients(losses, self.inputs)

    def projection(self) -> Result:
        return losses_and_gradients(self.projection_losses(self.bitmasks()), self.inputs)

    def color(self) -> Result:
        return {"similarity": self.color_similarity()[:, 4:]}  # the other four are these, seen from the other end

    def prototypes(self, max_pixels: int | None = MAX_PIXELS) -> Result:
        return {"prototypes": self.moved_prototypes(self.instance_GHW, self.bitmasks(), max_pixels)}

    def semantic(self) -> Result:
        return {"semantic map": self.semantic_map()}

    def pseudo_masks(self) -> Result:
        return self.corrected(self.semantic_GHW, self.instance_map(), self.bitmasks())

    def everything(self) -> Result:
        inputs, bitmasks_GHW = self.inputs, self.bitmasks()
        projection = self.projection_losses(bitmasks_GHW)
        pairwise = self.pairwise_losses(self.color_similarity(), bitmasks_GHW)
        total = PROJECTION_WEIGHT * torch.cat(projection).sum() + PAIRWISE_WEIGHT * torch.cat(pairwise).sum()
        result = loss_and_gradients(total / inputs.num_instances, inputs)
        del projection, pairwise, total
        instance_GHW = self.instance_map()
        result |= self.corrected(self.semantic_map(), instance_GHW, bitmasks_GHW)
        return result | {"prototypes": self.moved_prototypes(instance_GHW, bitmasks_GHW, MAX_PIXELS)}

    def bitmasks(self) -> Tensor:
        return plain.box_bitmasks(self.inputs.targets.boxes_G4, self.inputs.targets.input_size, STRIDE)

    def color_similarity(self) -> Tensor:
        return plain.color_similarity(self.inputs.images_B3HW, self.inputs.valid_BHW, stride=STRIDE)

    def pairwise_losses(self, similarity_B8HW: Tensor, bitmasks_GHW: Tensor) -> list[Tensor]:
        weights_G8HW = plain.pairwise_weights(similarity_B8HW, bitmasks_GHW, self.inputs.targets.image_ids_G, COLOR_THRESHOLD)
        return [plain.pairwise_loss(s.mask_logits_NHW, weights_G8HW[s.instance_ids_N]) for s in self.inputs.students]

    def projection_losses(self, bitmasks_GHW: Tensor) -> list[Tensor]:
        return [plain.projection_loss(s.mask_logits_NHW, bitmasks_GHW[s.instance_ids_N]) for s in self.inputs.students]

    def instance_map(self) -> Tensor:
        teacher, boxes_G4 = self.inputs.teacher, self.inputs.targets.boxes_G4
        return plain.instance_map(teacher.mask_logits_NHW, teacher.instance_ids_N, boxes_G4, stride=STRIDE)

    def semantic_map(self) -> Tensor:
        inputs, targets = self.inputs, self.inputs.targets
        return plain.semantic_map(
            inputs.teacher.mask_features_BCHW, inputs.prototypes_KLC, targets.image_ids_G, targets.class_labels_G
        )

    def corrected(self, semantic_GHW: Tensor, instance_GHW: Tensor, bitmasks_GHW: Tensor) -> Result:
        names = ("probabilities", "target", "trusted")
        return dict(zip(names, plain.self_correction(semantic_GHW, instance_GHW, bitmasks_GHW), strict=True))

    def moved_prototypes(self, instance_GHW: Tensor, bitmasks_GHW: Tensor, max_pixels: int | None) -> Tensor:
        inputs, targets = self.inputs, self.inputs.targets
        pixels_MC, labels_M = plain.confident_pixels(
            instance_GHW,
            bitmasks_GHW,
            inputs.teacher.mask_features_BCHW,
            targets.image_ids_G,
            targets.class_labels_G,
            confident=CONFIDENT,
            max_pixels=max_pixels,
        )
        return plain.moved_prototypes(inputs.prototypes_KLC, inputs.counts_KL, pixels_MC, labels_M)


class Ours:
    """The package's functions, called as the criterion and the generator call them."""

    def __init__(self, inputs: Inputs, peer: Plain, bounded_sample: bool) -> None:
        self.inputs = inputs
        self.height, self.width = inputs.students[0].mask_logits_NHW.shape[-2:]
        self.similarity_BKHW = peer.similarity_B8HW[:, 4:].contiguous()
        self.instance_GHW, self.semantic_GHW = peer.instance_GHW, peer.semantic_GHW
        num_classes, num_prototypes, channels = inputs.prototypes_KLC.shape
        # Beside the peer, room for all: which pixels the bank would drop is its own choice.
        max_pixels = BOUNDED_SAMPLE if bounded_sample else MAX_PIXELS * inputs.num_instances
        self.bank = PrototypeBank(num_classes, num_prototypes, channels, max_pixels_per_class=max_pixels)
        self.bank.to(inputs.prototypes_KLC.device)
        self.criterion = BoxInstCriterion(
            projection_weight=PROJECTION_WEIGHT,
            pairwise_weight=PAIRWISE_WEIGHT,
            pairwise_warmup_steps=0,
            color_threshold=COLOR_THRESHOLD,
            exact_box_edges=False,  # as published
        )
        self.generator = PseudoMaskGenerator(self.bank, confident=CONFIDENT, max_pixels_per_instance=MAX_PIXELS)
        self.reset_bank()

    def reset_bank(self) -> None:
        """Every call starts from the same prototypes."""
        self.bank.prototypes_KLC.copy_(self.inputs.prototypes_KLC)
        self.bank.counts_KL.copy_(self.inputs.counts_KL)

    def pairwise(self) -> Result:
        targets = self.inputs.targets
        edges = pairwise_edges(
            self.similarity_BKHW, targets.boxes_G4, targets.image_ids_G, stride=STRIDE, threshold=COLOR_THRESHOLD
        )
        losses = [pairwise_loss(s.mask_logits_NHW, s.instance_ids_N, edges) for s in self.inputs.students]
        return losses_and_gradients(losses, self.inputs)

    def projection(self) -> Result:
        rows_GH, columns_GW = box_projections(self.inputs.targets.boxes_G4, self.height, self.width, STRIDE, whole_cells=True)
        losses = [
            projection_loss(s.mask_logits_NHW, rows_GH[s.instance_ids_N], columns_GW[s.instance_ids_N])
            for s in self.inputs.students
        ]
        return losses_and_gradients(losses, self.inputs)

    def color(self) -> Result:
        return {"similarity": color_similarity(self.inputs.images_B3HW, self.inputs.valid_BHW, stride=STRIDE)}

    def prototypes(self) -> Result:
        self.reset_bank()
        targets = self.inputs.targets
        cells = box_cells(targets.boxes_G4, self.height, self.width, STRIDE)
        instance_V, features_BCHW = cells.pick(self.instance_GHW), self.inputs.teacher.mask_features_BCHW
        self.generator.observe_pixels(instance_V > CONFIDENT, cells, features_BCHW, targets.image_ids_G, targets.class_labels_G)
        self.bank.commit()
        return {"prototypes": self.bank.prototypes_KLC.clone()}

    def semantic(self) -> Result:
        self.reset_bank()
        features_BCHW = self.inputs.teacher.mask_features_BCHW
        return {"semantic map": semantic_probability_map(features_BCHW, self.bank, self.inputs.targets)}

    def pseudo_masks(self) -> Result:
        teacher, boxes_G4 = self.inputs.teacher, self.inputs.targets.boxes_G4
        boxes_N4 = predicted_boxes(teacher.mask_logits_NHW, STRIDE)
        weights_N = positive_mask_weights(boxes_N4, boxes_G4, teacher.instance_ids_N)
        instance_GHW = instance_probability_map(teacher.mask_logits_NHW, weights_N, teacher.instance_ids_N, len(boxes_G4))
        masks = self_correction(self.semantic_GHW, instance_GHW, boxes_G4, stride=STRIDE, confident=CONFIDENT)
        return {"probabilities": masks.probabilities_GHW, "target": masks.target_GHW, "trusted": masks.trusted_GHW}

    def chunked_masks(self, chunk_size: int) -> Result:
        self.reset_bank()
        generator = PseudoMaskGenerator(self.bank, confident=CONFIDENT, chunk_size=chunk_size)
        masks = generator(self.inputs.teacher, self.inputs.targets, update_prototypes=False)
        return {"probabilities": masks.probabilities_GHW, "target": masks.target_GHW, "trusted": masks.trusted_GHW}

    def everything(self) -> Result:
        self.reset_bank()
        inputs = self.inputs
        output = self.criterion(
            inputs.students,
            None,
            inputs.targets,
            inputs.images_B3HW,
            inputs.valid_BHW,
            num_instances=inputs.num_instances,
            global_step=1,
        )
        result = loss_and_gradients(output.total, inputs)
        masks = self.generator(inputs.teacher, inputs.targets)
        self.bank.commit()
        result |= {"probabilities": masks.probabilities_GHW, "target": masks.target_GHW, "trusted": masks.trusted_GHW}
        return result | {"prototypes": self.bank.prototypes_KLC.clone()}


def losses_and_gradients(losses: list[Tensor], inputs: Inputs) -> Result:
    """Per-row losses of each layer, and the gradient of their sum / instances for each layer's logits."""
    losses_N = torch.cat(losses)
    return loss_and_gradients(losses_N.sum() / inputs.num_instances, inputs) | {"loss": losses_N.detach()}


def loss_and_gradients(loss: Tensor, inputs: Inputs) -> Result:
    gradients = torch.autograd.grad(loss, [student.mask_logits_NHW for student in inputs.students])
    named = {f"gradient of layer {layer}": gradient_NHW for layer, gradient_NHW in enumerate(gradients)}
    return {"loss": loss.detach(), **named}


def agree(ours: Result, theirs: Result, *, by_length: bool = False) -> bool:
    """The rule at the top of this file. by_length: the one for everything together."""
    if ours.keys() != theirs.keys():
        return False
    return all(same(ours[name], theirs[name], by_length) for name in ours)


def same(ours: Tensor, theirs: Tensor, by_length: bool) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    allowed = EXCEPTIONS * ours.numel()
    if ours.dtype == torch.bool:
        return int((ours != theirs).sum()) <= allowed
    difference = (ours - theirs).abs()
    if by_length:
        return bool(difference.norm() <= OF_LENGTH * theirs.norm())
    largest = theirs.abs().max()
    within = difference <= RELATIVE * theirs.abs() + OF_LARGEST * largest
    return int((~within).sum()) <= allowed and bool((difference <= EXCEPTION_OF_LARGEST * largest).all())

"""Outputs of a network that does not exist, and batches to go with them: what the tests of the criteria share."""

from types import SimpleNamespace

import torch

from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.set_criterion import SetCriterion, StepNormalizers
from sim_hf.criteria.sim import SIMCriterion
from sim_hf.mask_generation import PrototypeBank, PseudoMaskGenerator
from sim_hf.structures import InstanceTargets

NUM_CLASSES, NUM_QUERIES, CHANNELS, STRIDE = 3, 6, 5, 4
INPUT = (32, 40)
GRID = (INPUT[0] // STRIDE, INPUT[1] // STRIDE)

TWO_IN_THE_FIRST_ONE_IN_THE_SECOND = {
    "boxes": [[4, 4, 20, 24], [16, 8, 36, 28], [8, 0, 28, 16]],
    "labels": [0, 2, 1],
    "image_ids": [0, 0, 1],
}


def make_targets(boxes=None, labels=None, image_ids=None, *, num_images=2, masks=None, has_mask=None, is_pasted=None):
    """Three instances in two images unless told otherwise; `boxes=[]` gives none."""
    if boxes is None:
        boxes, labels, image_ids = TWO_IN_THE_FIRST_ONE_IN_THE_SECOND.values()
    return InstanceTargets(
        boxes_G4=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        class_labels_G=torch.tensor(labels or [], dtype=torch.int64),
        image_ids_G=torch.tensor(image_ids or [], dtype=torch.int64),
        input_size=INPUT,
        num_images=num_images,
        masks_GHW=masks,
        has_mask_G=None if has_mask is None else torch.tensor(has_mask),
        is_pasted_G=None if is_pasted is None else torch.tensor(is_pasted),
    )


def ellipses(targets):
    """A mask of half the box or so for every instance, at input size."""
    rows, columns = torch.arange(INPUT[0]) + 0.5, torch.arange(INPUT[1]) + 0.5
    x1, y1, x2, y2 = (side[:, None, None] for side in targets.boxes_G4.unbind(-1))
    dy = (rows[None, :, None] - (y1 + y2) / 2) / (y2 - y1)
    dx = (columns[None, None, :] - (x1 + x2) / 2) / (x2 - x1)
    return dx.square() + dy.square() < 0.25


def make_output(num_images=2, *, num_layers=3, seed=0, scale=2.0, dtype=torch.float32):
    """Random predictions of `num_layers` decoder layers, all of them leaves that take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(*shape):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    def layer():
        return {
            "class_queries_logits": leaf(num_images, NUM_QUERIES, NUM_CLASSES + 1),
            "masks_queries_logits": leaf(num_images, NUM_QUERIES, *GRID),
        }

    *auxiliary, final = (layer() for _ in range(num_layers))
    return SimpleNamespace(**final, auxiliary_logits=auxiliary or None, mask_features=leaf(num_images, CHANNELS, *GRID))


def layers_of(output):
    final = {"class_queries_logits": output.class_queries_logits, "masks_queries_logits": output.masks_queries_logits}
    return [*(output.auxiliary_logits or ()), final]


def leaves_of(output):
    return [logits for layer in layers_of(output) for logits in layer.values()]


def image_part(output, image):
    """The output for one image of the batch, as leaves of their own."""

    def part(tensor):
        return tensor.detach()[image : image + 1].clone().requires_grad_()

    *auxiliary, final = [{name: part(logits) for name, logits in layer.items()} for layer in layers_of(output)]
    return SimpleNamespace(**final, auxiliary_logits=auxiliary or None, mask_features=part(output.mask_features))


def make_images(num_images=2, *, seed=5):
    """Patches of a few colours: many similar neighbours, and edges."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(num_images, 3, INPUT[0] // 8, INPUT[1] // 8, generator=generator)
    images = torch.nn.functional.interpolate(colours, scale_factor=8)
    return images, torch.ones(num_images, *INPUT, dtype=torch.int64)


def normalizers_of(criterion, *targets):
    """Of a step that consists of these micro-batches."""
    return StepNormalizers.from_counts(*(sum(column) for column in zip(*map(criterion.counts, targets), strict=True)))


def make_set_criterion(mask_criterion, **options):
    return SetCriterion(mask_criterion, num_queries=NUM_QUERIES, **options)


def make_sim(*, boxinst=None, momentum=0.0, small_ellipses=False, **options):
    bank = PrototypeBank(NUM_CLASSES, 2, CHANNELS, momentum=momentum)
    defaults = {"pseudo_start_step": 0}
    generator = PseudoMaskGenerator(bank, small_ellipses=small_ellipses)
    return SIMCriterion(BoxInstCriterion(**(boxinst or {})), generator, **{**defaults, **options})


def price(criterion, output, targets, *, teacher=None, step=20_000, normalizers=None, images=None):
    """Losses of one micro-batch; it is the whole step unless `normalizers` say otherwise."""
    images, pixel_mask = make_images(targets.num_images) if images is None else images
    normalizers = normalizers or normalizers_of(criterion, targets)
    return criterion(output, teacher, targets, images, pixel_mask, normalizers=normalizers, global_step=step)


def gradients(output, total):
    return torch.autograd.grad(total, leaves_of(output), allow_unused=True, retain_graph=True)

"""SIM on one page: what happens to a batch, from pixels to losses, and what ticks after the update.

Every driver (the Accelerate loop, `SIMTrainer`, a stock `transformers.Trainer`) calls this object, so the method exists once:

    prepare        copy-paste from the memory bank; colours, targets and box prompts of the batch   (Eq. 9)
    forward        student; teacher when the criterion needs it this step                          (Sec. 3.1)
    loss           match, class loss, projection + pairwise, pseudo masks, pasted masks            (Eq. 1-9)
    after_update   teacher EMA, prototype commit, memory bank commit, step + 1 - once an optimiser step

Shape letters: B images, C channels, G instances, P box prompts an image, H W input rows and columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sim_hf.criteria.build import DetectionCriterion
from sim_hf.data.collator import denormalize, normalize
from sim_hf.mask_generation.copy_paste import copy_paste
from sim_hf.mask_generation.memory_bank import MemoryBank
from sim_hf.mask_generation.prototype_bank import PrototypeBank
from sim_hf.structures import CriterionOutput, InstanceTargets
from sim_hf.training.box_prompts import jittered_boxes, prompt_boxes
from sim_hf.training.strong_augmentation import strongly_augmented
from sim_hf.training.teacher import EMATeacher

PROMPT_JITTER = 0.1  # of the box's extent, at each side


@dataclass
class StepInputs:
    """A prepared batch. images_BCHW: RGB in 0..1; image_keys: the data set's image ids, for messages and seeds.
    student_prompts_BP4: the jittered boxes that the student is prompted with, None for a network without prompts.
    student_values_BCHW: the pixel values of the student where it does not see those of the teacher."""

    pixel_values_BCHW: Tensor
    pixel_mask_BHW: Tensor
    images_BCHW: Tensor
    targets: InstanceTargets
    image_keys: list[int]
    student_prompts_BP4: Tensor | None = None
    student_values_BCHW: Tensor | None = None

    def network_inputs(self, prompts_BP4: Tensor | None) -> dict[str, Any]:
        """What a network is called with, all its predictions wanted."""
        return {
            "pixel_values": self.pixel_values_BCHW,
            "pixel_mask": self.pixel_mask_BHW,
            "output_auxiliary_logits": True,
            **({} if prompts_BP4 is None else {"prompt_boxes": prompts_BP4}),
        }

    def student_inputs(self) -> dict[str, Any]:
        """What the student is called with."""
        inputs = self.network_inputs(self.student_prompts_BP4)
        return inputs if self.student_values_BCHW is None else {**inputs, "pixel_values": self.student_values_BCHW}


class TrainingStep(nn.Module):
    """The method and its state: criterion (with the prototypes), teacher, memory bank and the step number.

    teacher: None trains without one (then `criterion` must not need it). memory_bank: None switches copy-paste off.
    paste_probability: share of the images of a batch that receive instances; paste_start_step: optimiser steps before the
    first paste. second_phase (set by the driver that starts it, see `training.second_phase`): the images bring masks of the
    teacher, so it is only averaged, not asked, and nothing is pasted. box_prompts: the networks are also asked for the masks of
    the annotated boxes. strong_augmentation: share of the images that the student sees in strongly changed colours.
    state_dict() of this module is the training state that lives beside the weights.
    """

    teacher: EMATeacher | None

    def __init__(
        self,
        criterion: DetectionCriterion,
        *,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        teacher: EMATeacher | None = None,
        memory_bank: MemoryBank | None = None,
        paste_probability: float = 0.5,
        paste_start_step: int = 0,
        box_prompts: bool = False,
        strong_augmentation: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.image_mean = tuple(image_mean)
        self.image_std = tuple(image_std)
        self.paste_probability = paste_probability
        self.paste_start_step = paste_start_step
        self.box_prompts = box_prompts
        self.strong_augmentation = strong_augmentation
        self.seed = seed
        self.global_step = 0
        self.second_phase = False
        # Not submodules: the teacher is a whole network and has its own place in a checkpoint.
        object.__setattr__(self, "teacher", teacher)
        self.memory_bank = memory_bank

    def prepare(self, batch: Mapping) -> StepInputs:
        """Targets and colours of the collated batch, after copy-paste (which also changes the pixels the student sees)."""
        pixel_values, pixel_mask, labels = batch["pixel_values"], batch["pixel_mask"], batch["labels"]
        targets = InstanceTargets.from_labels(labels, tuple(pixel_values.shape[-2:]))
        image_keys = torch.cat([label["image_id"].reshape(1) for label in labels]).tolist()  # a GPU is waited for once
        images = denormalize(pixel_values, self.image_mean, self.image_std)
        pastes = self.training and not self.second_phase and self.global_step >= self.paste_start_step
        if pastes and self.memory_bank is not None:
            pasted, targets = copy_paste(
                images,
                pixel_mask,
                targets,
                self.memory_bank,
                seed=self.seed,
                step=self.global_step,
                image_keys=image_keys,
                probability=self.paste_probability,
            )
            if pasted is not images:
                # Other pixels keep their very bits: what happens to an image must not depend on its neighbours.
                changed_B1HW = (pasted != images).any(1, keepdim=True)
                repainted = normalize(pasted * 255, self.image_mean, self.image_std)
                images, pixel_values = pasted, torch.where(changed_B1HW, repainted, pixel_values)
        prompts = None
        if self.box_prompts:
            amount = PROMPT_JITTER if self.training else 0.0
            jittered = jittered_boxes(targets, amount=amount, seed=self.seed, step=self.global_step, image_keys=image_keys)
            prompts = prompt_boxes(jittered, targets)
        return StepInputs(
            pixel_values,
            pixel_mask,
            images,
            targets,
            image_keys,
            prompts,
            self._student_values(pixel_values, pixel_mask, images, image_keys),
        )

    def _student_values(
        self, pixel_values: Tensor, pixel_mask: Tensor, images: Tensor, image_keys: Sequence[int]
    ) -> Tensor | None:
        """Pixel values of which some images have strong colours; None where there is no such thing."""
        if not (self.training and self.strong_augmentation > 0):
            return None
        strong, changed_B1HW = strongly_augmented(
            images,
            pixel_mask,
            probability=self.strong_augmentation,
            seed=self.seed,
            step=self.global_step,
            image_keys=image_keys,
        )
        return torch.where(changed_B1HW, normalize(strong * 255, self.image_mean, self.image_std), pixel_values)

    def normalizers(self, inputs: Sequence[StepInputs]) -> Any:
        """The criterion's counts of all micro-batches of this optimiser step on all ranks (one collective, on every rank, every
        step)."""
        counts = torch.tensor([self.criterion.counts(x.targets) for x in inputs], dtype=torch.float64).sum(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            counts = counts.to(inputs[0].pixel_values_BCHW.device)
            torch.distributed.all_reduce(counts)
        return self.criterion.normalizers(counts.tolist())

    def forward(self, student: nn.Module, inputs: StepInputs, normalizers: Any) -> CriterionOutput:
        """One micro-batch through the student and the criterion. `student` may be wrapped (DDP, compiled)."""
        outputs = student(**inputs.student_inputs())
        return self.loss(outputs, inputs, normalizers)

    def loss(self, student_outputs, inputs: StepInputs, normalizers: Any) -> CriterionOutput:
        """The criterion on a student's outputs; the teacher looks at the same pixels and exact boxes, without gradient."""
        teacher_outputs = None
        if self.teacher is not None and not self.second_phase and self.criterion.needs_teacher(self.global_step):
            prompts = prompt_boxes(inputs.targets.boxes_G4, inputs.targets) if self.box_prompts else None
            teacher_outputs = self.teacher(**inputs.network_inputs(prompts))
        output = self.criterion(
            student_outputs,
            teacher_outputs,
            inputs.targets,
            inputs.images_BCHW,
            inputs.pixel_mask_BHW,
            normalizers=normalizers,
            global_step=self.global_step,
        )
        if self.memory_bank is not None and self.training and output.pseudo_masks is not None:
            self.memory_bank.remember(
                inputs.images_BCHW,
                inputs.targets,
                output.pseudo_masks,
                image_keys=inputs.image_keys,
                pixel_mask_BHW=inputs.pixel_mask_BHW,
            )
        return output

    def after_update(self, student: nn.Module) -> None:
        """Once per optimiser step, on every rank, with the unwrapped student."""
        self.global_step += 1
        average_batch_statistics(student)
        if self.teacher is not None:
            self.teacher.tick(student)
        bank = self.prototype_bank
        if bank is not None:
            bank.commit()
        if self.memory_bank is not None:
            self.memory_bank.commit()

    def after_skipped_update(self) -> None:
        """The optimiser skipped (fp16 overflow): nothing of this step may leave a trace."""
        bank = self.prototype_bank
        if bank is not None:
            bank.reset_observations()
        if self.memory_bank is not None:
            self.memory_bank.discard()

    @property
    def prototype_bank(self) -> PrototypeBank | None:
        """The criterion's `PrototypeBank`, or None for a supervision without prototypes."""
        mask_criterion = self.criterion.mask_criterion
        return cast(PrototypeBank, mask_criterion.bank) if isinstance(mask_criterion, nn.Module) else None

    def training_state(self) -> dict:
        """Everything that a resumed run needs beside weights, optimiser and sampler: tensors, numbers, lists, dicts."""
        return {
            "global_step": self.global_step,
            "criterion": dict(self.criterion.state_dict()),
            "teacher": None if self.teacher is None else self.teacher.state_dict(),
            "memory_bank": None if self.memory_bank is None else self.memory_bank.state_dict(),
        }

    def load_training_state(self, state: Mapping) -> None:
        """The inverse of `training_state`, strictly: what is missing or extra raises."""
        self.global_step = int(state["global_step"])
        self.criterion.load_state_dict(state["criterion"], strict=True)
        for name, owner in (("teacher", self.teacher), ("memory_bank", self.memory_bank)):
            if (owner is None) != (state[name] is None):
                raise ValueError(f"checkpoint and run disagree about the {name}: one has it, the other has not")
            if owner is not None:
                owner.load_state_dict(state[name])


@torch.no_grad()
def average_batch_statistics(model: nn.Module) -> None:
    """The mean over ranks of the running statistics that each rank has moved by its own images: or teachers would drift
    apart, and a checkpoint, which the first rank writes, would not be the state of the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    moving = [
        buffer
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training  # frozen ones are in evaluation mode
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not moving:
        return
    joined = torch.cat([buffer.flatten() for buffer in moving])
    torch.distributed.all_reduce(joined)
    joined /= torch.distributed.get_world_size()
    for buffer, mean in zip(moving, joined.split([buffer.numel() for buffer in moving]), strict=True):
        buffer.copy_(mean.view_as(buffer))

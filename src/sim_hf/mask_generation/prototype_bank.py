"""The prototypes of every class: collected from pixels, moved once per optimiser step (SIM, Sec. 3.2).

Shape letters: K classes (or the classes of one step), L prototypes per class, C channels, M pixels, X a part of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sim_hf.mask_generation.optimal_transport import sinkhorn_assignment

_Observation = tuple[Tensor, Tensor, Tensor]  # pixels (M, C), class labels (M,), keys (M,)
_SHORTEST_VECTOR = 1e-6  # the mean of opposite pixels has no direction
_PIXELS_AT_A_TIME = 1024
_PADDED_AT_A_TIME = 4096  # pixels, with the padding
_MIX = -7046029254386353131  # 2**64 / golden ratio as int64: the multiplier of Fibonacci hashing


class PrototypeBank(nn.Module):
    """L unit vectors per class that stand for its pixels: P_c of the paper.

    `observe` collects pixels of a micro-batch, `commit` moves the prototypes once per optimiser step: the pixels of all
    micro-batches and ranks are joined, assigned to the prototypes by optimal transport, and every prototype moves to the
    mean of its pixels by an exponential moving average. Joining comes first, so the split into micro-batches and ranks does
    not change the result. The state is float32 and stays so when the module around it is cast.

    prototypes_KLC: unit vectors, zeros for a class not seen yet. counts_KL: updates a prototype has had. usage_KL: moving
    average of the share of its class' pixels that a prototype gets.
    balanced: the transport gives a prototype mass by the share of pixels that are nearest to it, instead of equal mass (see
    `nearest_shares`).
    """

    prototypes_KLC: Tensor
    counts_KL: Tensor
    usage_KL: Tensor

    def __init__(
        self,
        num_classes: int,
        num_prototypes: int = 10,
        feature_dim: int = 256,
        *,
        momentum: float = 0.999,
        epsilon: float = 0.05,
        num_iterations: int = 3,
        hard_assignment: bool = True,
        balanced: bool = False,
        max_pixels_per_class: int = 4096,
    ) -> None:
        super().__init__()
        if min(num_classes, num_prototypes, feature_dim, max_pixels_per_class) < 1:
            raise ValueError(
                "num_classes, num_prototypes, feature_dim and max_pixels_per_class must be at least 1, got "
                f"{(num_classes, num_prototypes, feature_dim, max_pixels_per_class)}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum
        self.epsilon = epsilon
        self.num_iterations = num_iterations
        self.hard_assignment = hard_assignment
        self.balanced = balanced
        self.max_pixels_per_class = max_pixels_per_class
        shape = (num_classes, num_prototypes)
        self.register_buffer("prototypes_KLC", torch.zeros(*shape, feature_dim, dtype=torch.float32))
        self.register_buffer("counts_KL", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("usage_KL", torch.zeros(shape, dtype=torch.float32))
        self.reset_observations()

    @property
    def num_classes(self) -> int:
        return self.prototypes_KLC.shape[0]

    @property
    def num_prototypes(self) -> int:
        return self.prototypes_KLC.shape[1]

    @property
    def feature_dim(self) -> int:
        return self.prototypes_KLC.shape[2]

    @property
    def is_ready_K(self) -> Tensor:  # noqa: N802 - the shape letter of tensor names
        """Classes that have prototypes. -> (K,) bool"""
        return (self.counts_KL > 0).any(-1)

    def reset_observations(self) -> None:
        """Forget the pixels collected since the last commit: an optimiser step that was skipped leaves no trace."""
        self._observed: list[_Observation] = []

    @torch.no_grad()
    def observe(self, features_MC: Tensor, class_labels_M: Tensor) -> None:
        """Collect pixels of known class, at most `max_pixels_per_class` of each; pixels with no direction are left out."""
        if features_MC.dim() != 2 or features_MC.shape[1] != self.feature_dim:
            raise ValueError(f"features must be (M, {self.feature_dim}), got {tuple(features_MC.shape)}")
        if class_labels_M.shape != features_MC.shape[:1]:
            raise ValueError(f"expected {features_MC.shape[0]} class labels, got {tuple(class_labels_M.shape)}")
        device = self.prototypes_KLC.device
        pixels_MC, labels_M = features_MC.to(device, torch.float32), class_labels_M.to(device, torch.int64)
        largest_M = _largest_entry(pixels_MC)
        usable_M = largest_M.isfinite() & (largest_M > 0)
        pixels_MC, labels_M = pixels_MC[usable_M], labels_M[usable_M]
        if len(labels_M) == 0:
            return
        if labels_M.min() < 0 or labels_M.max() >= self.num_classes:
            raise ValueError(f"class labels must be in 0..{self.num_classes - 1}, got {labels_M.unique().tolist()}")
        self._observed.append((pixels_MC, labels_M, _pixel_keys(pixels_MC)))
        if sum(len(labels_M) for _, labels_M, _ in self._observed) > self.max_pixels_per_class:
            pixels_MC, labels_M, keys_M = self._observed_pixels()
            kept = _canonical_selection(labels_M, keys_M, self.max_pixels_per_class)
            self._observed = [(pixels_MC[kept], labels_M[kept], keys_M[kept])]

    @torch.no_grad()
    def commit(self) -> None:
        """Move the prototypes by the collected pixels. Once per optimiser step, on every rank, also on one without pixels."""
        pixels_MC, labels_M, keys_M = _gather_from_all_ranks(*self._observed_pixels())
        self.reset_observations()
        if len(labels_M) == 0:
            return
        kept = _canonical_selection(labels_M, keys_M, self.max_pixels_per_class)
        # Unit length only now, on the joint pixels in their canonical order: bit-equal however they were split.
        pixels_MC, labels_M = _to_unit_length(pixels_MC[kept]), labels_M[kept]
        with torch.autocast(device_type=pixels_MC.device.type, enabled=False):
            for part in _parts_of_whole_classes(labels_M):
                classes_K, pixels_KMC, valid_KM = _group_by_class(pixels_MC[part], labels_M[part])
                self._seed_new_classes(classes_K, pixels_KMC, valid_KM)
                self._move_prototypes(classes_K, pixels_KMC, self._assign(classes_K, pixels_KMC, valid_KM))

    def _observed_pixels(self) -> _Observation:
        """What this rank has collected, on the bank's device. -> pixels (M, C), class labels (M,), keys (M,)"""
        device = self.prototypes_KLC.device
        none = torch.zeros(0, dtype=torch.int64, device=device)
        if len(self._observed) == 1:
            pixels_MC, labels_M, keys_M = self._observed[0]  # nothing to join, and no copy
            return pixels_MC.to(device), labels_M.to(device), keys_M.to(device)
        parts = [(torch.zeros(0, self.feature_dim, device=device), none, none), *self._observed]
        pixels_MC, labels_M, keys_M = (torch.cat([part.to(device) for part in column]) for column in zip(*parts, strict=True))
        return pixels_MC, labels_M, keys_M

    def _seed_new_classes(self, classes_K: Tensor, pixels_KMC: Tensor, valid_KM: Tensor) -> None:
        new_K = ~self.is_ready_K[classes_K]
        if new_K.any():
            seeds_KLC = _spread_pixels(pixels_KMC[new_K], valid_KM[new_K], self.num_prototypes)
            self.prototypes_KLC[classes_K[new_K]] = seeds_KLC

    def _assign(self, classes_K: Tensor, pixels_KMC: Tensor, valid_KM: Tensor) -> Tensor:
        """Optimal-transport assignment of the pixels to the prototypes of their class. -> (K, M, L), 0 for padding"""
        similarity_KML = torch.einsum("kmc,klc->kml", pixels_KMC, self.prototypes_KLC[classes_K])
        assignment_KML = sinkhorn_assignment(
            similarity_KML,
            valid_KM,
            epsilon=self.epsilon,
            num_iterations=self.num_iterations,
            prototype_marginal_KL=nearest_shares(similarity_KML, valid_KM) if self.balanced else None,
        )
        if not self.hard_assignment:
            return assignment_KML
        # The authors' code draws the hard assignment at random (Gumbel); the arg-max is the paper's, and repeatable.
        return nn.functional.one_hot(assignment_KML.argmax(-1), self.num_prototypes) * valid_KM[..., None].float()

    def _move_prototypes(self, classes_K: Tensor, pixels_KMC: Tensor, assignment_KML: Tensor) -> None:
        """EMA of the centroids; a prototype without pixels keeps its value."""
        prototypes_KLC, counts_KL = self.prototypes_KLC[classes_K], self.counts_KL[classes_K]
        mass_KL = assignment_KML.sum(1)
        # A product of matrices, not a scatter: the order of the sum is the same on every rank.
        sums_KLC = torch.einsum("kml,kmc->klc", assignment_KML, pixels_KMC)
        centroids_KLC = sums_KLC / mass_KL.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        moved_KLC = torch.lerp(centroids_KLC, prototypes_KLC, self._warm_momentum(counts_KL)[..., None])
        length_KL = torch.linalg.vector_norm(moved_KLC, dim=-1)
        used_KL = (mass_KL > 0) & (length_KL > _SHORTEST_VECTOR)
        moved_KLC = moved_KLC / length_KL.clamp(min=_SHORTEST_VECTOR)[..., None]
        self.prototypes_KLC[classes_K] = torch.where(used_KL[..., None], moved_KLC, prototypes_KLC)
        share_KL = mass_KL / mass_KL.sum(-1, keepdim=True)
        class_momentum_K1 = self._warm_momentum(counts_KL.amax(-1, keepdim=True))
        self.usage_KL[classes_K] = torch.lerp(share_KL, self.usage_KL[classes_K], class_momentum_K1)
        self.counts_KL[classes_K] = counts_KL + used_KL

    def _warm_momentum(self, counts: Tensor) -> Tensor:
        """min(gamma, 1 - 1/(t + 1)) after t updates: the running mean at first, so that the seed carries no weight."""
        return (counts / (counts + 1)).float().clamp(max=self.momentum)

    @torch.no_grad()
    def diversity(self) -> Tensor:
        """Mean pairwise cosine between the prototypes of a class, over the classes that have some; 1 means collapsed.
        -> scalar"""
        ready_KLC = self.prototypes_KLC[self.is_ready_K]
        num_pairs = self.num_prototypes * (self.num_prototypes - 1)
        if len(ready_KLC) == 0 or num_pairs == 0:
            return self.prototypes_KLC.new_zeros(())
        # |sum of unit vectors|^2 holds every ordered pair, and each vector with itself.
        sum_of_all_K = ready_KLC.sum(1).square().sum(-1)
        with_itself_K = ready_KLC.square().sum((1, 2))
        return ((sum_of_all_K - with_itself_K) / num_pairs).mean()

    @torch.no_grad()
    def usage_entropy(self) -> Tensor:
        """Entropy of the prototypes' shares over its largest value, mean over classes; 1 means all are used alike.
        -> scalar"""
        usage_KL = self.usage_KL[self.is_ready_K]
        if len(usage_KL) == 0:
            return self.usage_KL.new_zeros(())
        if self.num_prototypes == 1:
            return self.usage_KL.new_ones(())
        entropy_K = torch.special.entr(usage_KL).sum(-1)
        return entropy_K.mean() / math.log(self.num_prototypes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PrototypeBank:
        """Follow the module's device but not its dtype: an average with momentum 0.999 does not move in bfloat16."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, moved in list(self.named_buffers(recurse=False)):
            if moved.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(moved.device)
        return self


def nearest_shares(similarity_KML: Tensor, valid_KM: Tensor) -> Tensor:
    """Class-balanced masses of the prototypes (after CPSL's class-balanced marginals, arXiv 2203.09744): half by the share of
    the class' pixels that are nearest to a prototype, half equal, so that none dies out. -> (K, L), rows sum to 1"""
    num_prototypes = similarity_KML.shape[-1]
    nearest_KML = nn.functional.one_hot(similarity_KML.argmax(-1), num_prototypes) * valid_KM[..., None]
    shares_KL = nearest_KML.sum(1) / valid_KM.sum(-1, keepdim=True).clamp(min=1)
    return (shares_KL + 1.0 / num_prototypes) / 2


def _largest_entry(pixels_MC: Tensor) -> Tensor:
    """Of the absolute values, without making them -> (M,); NaN where there is one."""
    return torch.maximum(pixels_MC.amax(-1), -pixels_MC.amin(-1))


def _to_unit_length(pixels_MC: Tensor) -> Tensor:
    """Pixels made unit vectors in place; divided by the largest entry first, so that no square leaves the range of float32."""
    pixels_MC.div_(_largest_entry(pixels_MC)[:, None])
    return pixels_MC.div_(torch.linalg.vector_norm(pixels_MC, dim=-1, keepdim=True))


def _pixel_keys(pixels_MC: Tensor) -> Tensor:
    """A number per pixel that depends on its values alone, as good as random. -> (M,) int64

    Sorting by it gives the joint pixels one order; keeping the smallest draws a sample. Both are the same for every split of
    the pixels. Made from the upper 16 bits of each value: rounding noise between batch sizes rarely reaches them.
    """
    factors_C = torch.arange(1, 2 * pixels_MC.shape[1], 2, device=pixels_MC.device) * _MIX
    factors_C = (factors_C ^ (factors_C >> 29)) * _MIX
    bits_MC = pixels_MC.contiguous().view(torch.int32)
    # Integers: exact in any order. A part at a time: the products take twice the memory of the pixels.
    keys_M = torch.cat([((bits_XC >> 16) * factors_C).sum(-1) for bits_XC in bits_MC.split(_PIXELS_AT_A_TIME)])
    keys_M = (keys_M ^ (keys_M >> 32)) * _MIX
    return keys_M ^ (keys_M >> 29)


def _canonical_selection(labels_M: Tensor, keys_M: Tensor, max_per_class: int) -> Tensor:
    """Index of the pixels with the smallest keys of each class, sorted by class, then key."""
    order = keys_M.argsort(stable=True)
    order = order[labels_M[order].argsort(stable=True)]
    labels_M = labels_M[order]
    sizes_K = labels_M.bincount()
    rank_M = torch.arange(len(order), device=order.device) - (sizes_K.cumsum(0) - sizes_K)[labels_M]
    return order[rank_M < max_per_class]


def _parts_of_whole_classes(labels_M: Tensor) -> list[slice]:
    """Pixels sorted by class, cut between classes: those of a part are padded to its largest class, so small classes share a
    part and a large one has its own."""
    parts: list[slice] = []
    num_classes = largest = stop = 0
    for size in labels_M.unique_consecutive(return_counts=True)[1].tolist():
        num_classes, largest = num_classes + 1, max(largest, size)
        if parts and num_classes * largest <= _PADDED_AT_A_TIME:
            parts[-1] = slice(parts[-1].start, stop + size)
        else:
            parts.append(slice(stop, stop + size))
            num_classes, largest = 1, size
        stop += size
    return parts


def _group_by_class(pixels_MC: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels sorted by class -> classes present (K,), their pixels padded with zeros (K, M, C), which are real (K, M)."""
    classes_K, group_M, sizes_K = labels_M.unique_consecutive(return_inverse=True, return_counts=True)
    if len(classes_K) == 1:  # nothing to pad, so no copy
        return classes_K, pixels_MC[None], torch.ones(1, len(labels_M), dtype=torch.bool, device=labels_M.device)
    rank_M = torch.arange(len(labels_M), device=labels_M.device) - (sizes_K.cumsum(0) - sizes_K)[group_M]
    largest = int(sizes_K.max())
    pixels_KMC = pixels_MC.new_zeros(len(classes_K), largest, pixels_MC.shape[1])
    pixels_KMC[group_M, rank_M] = pixels_MC
    valid_KM = torch.arange(largest, device=labels_M.device) < sizes_K[:, None]
    return classes_K, pixels_KMC, valid_KM


def _spread_pixels(pixels_KMC: Tensor, valid_KM: Tensor, num_prototypes: int) -> Tensor:
    """Farthest-point choice: the pixel nearest to the mean, then always the one least like all chosen. -> (K, L, C)

    With fewer pixels than prototypes some are chosen twice; the first moves tell them apart.
    """
    rows_K = torch.arange(len(pixels_KMC), device=pixels_KMC.device)
    to_mean_KM = torch.einsum("kmc,kc->km", pixels_KMC, pixels_KMC.sum(1))
    chosen_K = to_mean_KM.masked_fill(~valid_KM, -torch.inf).argmax(-1)
    seeds = [pixels_KMC[rows_K, chosen_K]]
    nearest_KM = torch.full_like(to_mean_KM, -torch.inf).masked_fill(~valid_KM, torch.inf)
    for _ in range(num_prototypes - 1):
        nearest_KM = torch.maximum(nearest_KM, torch.einsum("kmc,kc->km", pixels_KMC, seeds[-1]))
        seeds.append(pixels_KMC[rows_K, nearest_KM.argmin(-1)])
    return torch.stack(seeds, 1)


def _gather_from_all_ranks(pixels_MC: Tensor, labels_M: Tensor, keys_M: Tensor) -> _Observation:
    """The pixels of all ranks; every rank takes part in the same collectives, whether it has pixels or not."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return pixels_MC, labels_M, keys_M
    length = torch.tensor([len(labels_M)], device=labels_M.device)
    lengths = torch.cat(_all_gather(length)).tolist()
    longest = max(lengths)  # the same number on every rank, so all ranks go on or none does
    if longest == 0:
        return pixels_MC, labels_M, keys_M

    def gather(rows: Tensor) -> Tensor:
        padding = rows.new_zeros(longest - len(rows), *rows.shape[1:])
        parts = _all_gather(torch.cat([rows, padding]))
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])

    labels_and_keys_M2 = gather(torch.stack([labels_M, keys_M], 1))
    return gather(pixels_MC), labels_and_keys_M2[:, 0], labels_and_keys_M2[:, 1]


def _all_gather(rows: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return parts

"""Slow losses, pixel by pixel, written from the equations in plain Python floats: the truth of the tests beside this file."""

import math

import torch


def sigmoid(logit):
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def dice(probabilities, target, epsilon=1e-5):
    """BoxInst: squares below, epsilon in the denominator."""
    overlap = sum(p * t for p, t in zip(probabilities, target, strict=True))
    sizes = sum(p * p for p in probabilities) + sum(t * t for t in target)
    return 1 - 2 * overlap / (sizes + epsilon)


def projection_loss(mask_logits, rows, columns):
    """One mask (H, W) against one box: probabilities first, maxima after."""
    probabilities = [[sigmoid(logit) for logit in line] for line in mask_logits.tolist()]
    row_maxima = [max(line) for line in probabilities]
    column_maxima = [max(line) for line in zip(*probabilities, strict=True)]
    return dice(row_maxima, rows.tolist()) + dice(column_maxima, columns.tolist())


def lab_of_pixel(red, green, blue):
    """sRGB in 0..1 -> CIE Lab under D65, the formulas of scikit-image's `rgb2lab`."""
    r, g, b = (((c + 0.055) / 1.055) ** 2.4 if c > 0.04045 else c / 12.92 for c in (red, green, blue))
    x = (0.412453 * r + 0.357580 * g + 0.180423 * b) / 0.95047
    y = 0.212671 * r + 0.715160 * g + 0.072169 * b
    z = (0.019334 * r + 0.119193 * g + 0.950227 * b) / 1.08883
    x, y, z = (c ** (1 / 3) if c > 0.008856 else 7.787 * c + 16 / 116 for c in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def ring(dilation):
    return [(i * dilation, j * dilation) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def cell_similarity(image, valid, cell, other, stride):
    """Similarity of two grid cells of one image (3, H, W); 0 where one leaves the grid or touches an invalid pixel."""
    labs = []
    for row, column in (cell, other):
        if not (0 <= row < image.shape[1] // stride and 0 <= column < image.shape[2] // stride):
            return 0.0
        where = (slice(row * stride, (row + 1) * stride), slice(column * stride, (column + 1) * stride))
        if not bool(valid[where].bool().all()):
            return 0.0
        labs.append(lab_of_pixel(*image[(slice(None), *where)].double().mean((1, 2)).tolist()))
    return math.exp(-0.5 * math.dist(*labs))


def pairwise_loss(mask_logits, inside, similar, *, dilation, both_ends=False):
    """All 8 neighbours of every pixel of one mask (H, W), mean over the pairs that count.

    inside: the box, bool (H, W). similar(pixel, neighbour): do their colours count as one? A pair counts when its anchor is
    in the box; `both_ends` is the wrong rule, for contrast.
    """
    height, width = mask_logits.shape
    total, count = 0.0, 0
    for row in range(height):
        for column in range(width):
            for down, right in ring(dilation):
                other = (row + down, column + right)
                if not (0 <= other[0] < height and 0 <= other[1] < width) or not similar((row, column), other):
                    continue
                if not inside[row, column] or (both_ends and not inside[other]):
                    continue
                p, q = sigmoid(mask_logits[row, column].item()), sigmoid(mask_logits[other].item())
                total -= math.log(p * q + (1 - p) * (1 - q))
                count += 1
    return total / count if count else 0.0


def pairwise_loss_unfold(mask_logits_GHW, weights_G8HW, dilation):
    """The usual dense form: 8 shifted copies by unfold, weights of all (anchor, neighbour) pairs, mean per instance."""

    def neighbours(maps_GHW):
        columns = torch.nn.functional.unfold(maps_GHW[:, None], 3, dilation=dilation, padding=dilation)
        ring_G9HW = columns.reshape(maps_GHW.shape[0], 9, *maps_GHW.shape[1:])
        return torch.cat([ring_G9HW[:, :4], ring_G9HW[:, 5:]], 1)

    log_object, log_background = map(torch.nn.functional.logsigmoid, (mask_logits_GHW, -mask_logits_GHW))
    both_object = log_object[:, None] + neighbours(log_object)
    both_background = log_background[:, None] + neighbours(log_background)
    losses_G8HW = -torch.logaddexp(both_object, both_background)
    return (losses_G8HW * weights_G8HW).sum((1, 2, 3)) / weights_G8HW.sum((1, 2, 3)).clamp(min=1)


def bce(mask_logits, target, trusted=None):
    """Flat sequences of one mask."""
    trusted = [1.0] * len(mask_logits) if trusted is None else trusted
    total = sum(
        -w * (t * math.log(sigmoid(x)) + (1 - t) * math.log(sigmoid(-x)))
        for x, t, w in zip(mask_logits, target, trusted, strict=True)
    )
    return total / sum(trusted) if sum(trusted) else 0.0


def smooth_dice(mask_logits, target, trusted=None):
    """Mask2Former: plain sums, 1 above and below."""
    trusted = [1.0] * len(mask_logits) if trusted is None else trusted
    probabilities = [sigmoid(x) for x in mask_logits]
    overlap = sum(w * p * t for w, p, t in zip(trusted, probabilities, target, strict=True))
    sizes = sum(w * (p + t) for w, p, t in zip(trusted, probabilities, target, strict=True))
    return 1 - (2 * overlap + 1) / (sizes + 1)

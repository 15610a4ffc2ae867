"""The paper's equations as slow float64 loops, written without the package: what the tests compare with."""

from __future__ import annotations

import math

import numpy as np


def sinkhorn(similarity, epsilon=0.05, num_iterations=3, marginal=None):
    """One class, all pixels valid, plain log-domain Sinkhorn with marginals 1/M and 1/L. -> (M, L), rows sum to 1"""
    similarity = np.asarray(similarity, dtype=np.float64)
    num_pixels, num_prototypes = similarity.shape
    marginal = np.full(num_prototypes, 1 / num_prototypes) if marginal is None else np.asarray(marginal, np.float64)
    log_q = similarity / epsilon
    for _ in range(num_iterations):
        log_q = log_q - np.logaddexp.reduce(log_q, axis=0) + np.log(marginal)
        log_q = log_q - np.logaddexp.reduce(log_q, axis=1)[:, None] - math.log(num_pixels)
    return np.exp(log_q - np.logaddexp.reduce(log_q, axis=1)[:, None])


def semantic_map(features, prototypes, image_ids, labels, temperature=0.1):
    """Eq. 1, pixel by pixel. features (B, C, H, W), prototypes (K, L, C) -> (G, H, W)"""
    _, _, height, width = features.shape
    result = np.zeros((len(labels), height, width))
    for g, (image, label) in enumerate(zip(image_ids, labels, strict=True)):
        for y in range(height):
            for x in range(width):
                z = features[image, :, y, x].astype(np.float64)
                z = z / math.sqrt(sum(z * z))
                best = max(float(sum(z * p)) for p in prototypes[label].astype(np.float64))
                result[g, y, x] = 1 / (1 + math.exp(-best / temperature))
    return result


def box_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    intersection = max(width, 0) * max(height, 0)
    return intersection / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection)


def positive_weights(predicted, boxes, instance_ids, mu=5.0):
    """Eq. 6, the weights."""
    raw = [math.exp(mu * box_iou(p, boxes[g])) for p, g in zip(predicted, instance_ids, strict=True)]
    return [
        r / sum(other for other, owner in zip(raw, instance_ids, strict=True) if owner == g)
        for r, g in zip(raw, instance_ids, strict=True)
    ]


def instance_map(mask_logits, weights, instance_ids, num_instances):
    """Eq. 6, the map."""
    result = np.zeros((num_instances, *mask_logits.shape[1:]))
    for logits, weight, g in zip(mask_logits.astype(np.float64), weights, instance_ids, strict=True):
        result[g] += weight / (1 + np.exp(-logits))
    return result


def self_correction(semantic, instance, inside, alpha=0.5, confident=0.7, high_range=(0.7, 0.8), low=0.4):
    """Eq. 7 for one instance, with a full sort. -> corrected, foreground, trusted, threshold"""
    corrected = np.where(inside, (1 - alpha) * semantic + alpha * instance, 0.0)
    wanted = int(((instance > confident) & inside).sum())
    descending = sorted(corrected.ravel(), reverse=True)
    value = descending[wanted] if wanted < len(descending) else 0.0
    high = min(max(value, high_range[0]), high_range[1])
    foreground = corrected > high
    return corrected, foreground, foreground | (corrected < low), high


def moving_direction(start, targets, momentum):
    """Warm-started EMA of unit vectors, normalised after every step: what one prototype with one pixel a step does."""
    value = np.asarray(start, np.float64)
    for updates, target in enumerate(np.asarray(targets, np.float64)):
        keep = min(momentum, 1 - 1 / (updates + 1))
        value = keep * value + (1 - keep) * target
        value = value / np.linalg.norm(value)
    return value


def pixel_shares(instance_maps, boxes, image_ids, stride, radius=1.25):
    """What every instance keeps of every cell: 1 without a rival, else 2 s / (s + r) up to 1. Maps (G, H, W), 0 outside of the
    boxes -> (G, H, W)"""
    count, height, width = instance_maps.shape
    scores, shares = np.zeros((count, height, width)), np.ones((count, height, width))
    for g, (x1, y1, x2, y2) in enumerate(boxes):
        for row in range(height):
            for column in range(width):
                dx = ((column + 0.5) * stride - (x1 + x2) / 2) / ((x2 - x1) / 2)
                dy = ((row + 0.5) * stride - (y1 + y2) / 2) / ((y2 - y1) / 2)
                scores[g, row, column] = instance_maps[g, row, column] * min(max(radius - math.hypot(dx, dy), 0), 1)
    for g in range(count):
        rivals = [h for h in range(count) if h != g and image_ids[h] == image_ids[g]]
        for row in range(height):
            for column in range(width):
                rival = max((scores[h, row, column] for h in rivals), default=0.0)
                if rival > 0:
                    shares[g, row, column] = min(1, 2 * scores[g, row, column] / (scores[g, row, column] + rival))
    return shares

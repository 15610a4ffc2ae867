"""Slow level-set and multiple-instance losses, pixel by pixel, from their equations: the truth of two test files beside."""

import math
import statistics

from references_losses import ring, sigmoid


def region_energy(mask_logits, inside, maps):
    """One mask (H, W) on one map (C, H, W): plain Chan-Vese, two means, two sums."""
    cells = [(row, column) for row in range(len(inside)) for column in range(len(inside[0])) if inside[row][column]]
    if not cells:
        return 0.0
    energy = 0.0
    for sign in (1, -1):
        weights = [sigmoid(sign * mask_logits[row][column]) for row, column in cells]
        for channel in maps:
            values = [channel[row][column] for row, column in cells]
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            energy += sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    return energy / len(cells)


def affinity(colors, valid, dilation, alpha):
    """(H, W) lists of {neighbour: share}; colors (C, H, W), valid (H, W)."""
    height, width = len(valid), len(valid[0])
    table = {}
    for row in range(height):
        for column in range(width):
            others = [(row + down, column + right) for down, right in ring(dilation)]
            others = [(r, c) for r, c in others if 0 <= r < height and 0 <= c < width and valid[r][c] and valid[row][column]]
            if not others:
                table[row, column] = {(row, column): 1.0}
                continue
            scores = []
            for r, c in others:
                total = 0.0
                for channel in colors:
                    ring_values = [channel[a][b] for a, b in others]
                    spread = statistics.stdev(ring_values) if len(others) > 1 else 0.0
                    total += ((channel[r][c] - channel[row][column]) / (spread + 1e-8) / alpha) ** 2
                scores.append(-total / len(colors))
            best = max(scores)
            shares = [math.exp(score - best) for score in scores]
            table[row, column] = {other: share / sum(shares) for other, share in zip(others, shares, strict=True)}
    return table


def local_consistency(mask_logits, inside, table, num_iterations):
    """L1 between the mask and itself after `num_iterations` replacements of each cell by the mean of its neighbours."""
    mask = {cell: sigmoid(mask_logits[cell[0]][cell[1]]) for cell in table}
    refined = dict(mask)
    for _ in range(num_iterations):
        refined = {cell: sum(share * refined[other] for other, share in shares.items()) for cell, shares in table.items()}
    cells = [(row, column) for row, column in table if inside[row][column]]
    return sum(abs(mask[cell] - refined[cell]) for cell in cells) / len(cells) if cells else 0.0


def tightness(mask_logits, rows, columns):
    """One mask (H, W); rows and columns say which lines go through the box."""
    height, width = len(rows), len(columns)
    mask = [[sigmoid(x) for x in line] for line in mask_logits]
    held, empty = [], []
    for row in range(height):
        inside = [mask[row][c] for c in range(width) if columns[c]]
        (held if rows[row] else empty).append(-math.log(max(inside)) if rows[row] else -math.log(1 - max(mask[row])))
    for column in range(width):
        line = [mask[r][column] for r in range(height)]
        inside = [mask[r][column] for r in range(height) if rows[r]]
        (held if columns[column] else empty).append(-math.log(max(inside)) if columns[column] else -math.log(1 - max(line)))
    return sum(held) / len(held) + (sum(empty) / len(empty) if empty else 0.0)


def smoothness(mask_logits, rows, columns):
    """Every pair of touching cells with an end in the box."""
    height, width = len(rows), len(columns)
    total = 0.0
    for row in range(height):
        for column in range(width):
            for r, c in ((row + 1, column), (row, column + 1)):
                if r < height and c < width and ((rows[row] and columns[column]) or (rows[r] and columns[c])):
                    total += (sigmoid(mask_logits[row][column]) - sigmoid(mask_logits[r][c])) ** 2
    return total / (sum(map(bool, rows)) + sum(map(bool, columns)))

"""COCO's average precision and recall once more, in plain Python and without pycocotools: a second opinion for the tests.

Regions are boxes (x, y, width, height) or masks as Python integers, one bit per pixel. An object is
{"image", "category", "region", "area", "crowd"}, a detection {"image", "category", "region", "area", "score"}.
"""

AREA_RANGES = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
# written as numpy.linspace computes them, for an IoU may lie exactly on a threshold
IOU_THRESHOLDS = [index * ((0.95 - 0.5) / 9) + 0.5 for index in range(9)] + [0.95]
RECALL_LEVELS = [index * 0.01 for index in range(100)] + [1.0]


def iou(detection: dict, thing: dict) -> float:
    """Overlap over union; over the detection alone where the object is a crowd."""
    one, other = detection["region"], thing["region"]
    if isinstance(one, int):
        common, size_one, size_other = (one & other).bit_count(), one.bit_count(), other.bit_count()
    else:
        width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
        height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
        common = max(width, 0) * max(height, 0)
        size_one, size_other = one[2] * one[3], other[2] * other[3]
    union = size_one if thing["crowd"] else size_one + size_other - common
    return common / union if common else 0.0


def match_image(things: list, detections: list, threshold: float, area_range: tuple) -> tuple[list, int]:
    """Detections of one image and category, best first -> (score, outcome) with outcome "hit", "miss" or "ignored", and how
    many objects there were to find."""
    low, high = area_range
    ignored = [thing["crowd"] or not low <= thing["area"] <= high for thing in things]
    order = [i for i in range(len(things)) if not ignored[i]] + [i for i in range(len(things)) if ignored[i]]
    taken, outcomes = set(), []
    for detection in detections:
        best, chosen = min(threshold, 1 - 1e-10), None
        for i in order:
            if i in taken and not things[i]["crowd"]:
                continue
            if chosen is not None and not ignored[chosen] and ignored[i]:
                break  # a real object was found, ignored ones are no competition
            overlap = iou(detection, things[i])
            if overlap >= best:
                best, chosen = overlap, i
        if chosen is not None:
            taken.add(chosen)
            outcome = "ignored" if ignored[chosen] else "hit"
        else:
            outcome = "miss" if low <= detection["area"] <= high else "ignored"
        outcomes.append((detection["score"], outcome))
    return outcomes, ignored.count(False)


def category_numbers(
    images: list, things: list, detections: list, threshold: float, area_range: tuple, limit: int
) -> tuple[float, float] | None:
    """(average precision, recall) of one category at one threshold, or None when there is nothing to find."""
    outcomes, total = [], 0
    for image in images:
        mine = sorted((d for d in detections if d["image"] == image), key=lambda d: -d["score"])[:limit]
        found, count = match_image([t for t in things if t["image"] == image], mine, threshold, area_range)
        outcomes += found
        total += count
    if total == 0:
        return None
    hits, misses, recalls, precisions = 0, 0, [], []
    for _, outcome in sorted(outcomes, key=lambda pair: -pair[0]):
        hits += outcome == "hit"
        misses += outcome == "miss"
        recalls.append(hits / total)
        precisions.append(hits / (hits + misses) if hits else 0.0)
    area = 0.0
    for level in RECALL_LEVELS:
        area += max((p for p, r in zip(precisions, recalls, strict=True) if r >= level), default=0.0)
    return area / len(RECALL_LEVELS), recalls[-1] if recalls else 0.0


def summary(images: list, categories: list, things: list, detections: list, limits: tuple = (1, 10, 100)) -> dict:
    """The twelve COCO numbers (None where there is nothing to find)."""

    def mean(which: int, area: str, limit: int, thresholds: list = IOU_THRESHOLDS) -> float | None:
        values = []
        for category in categories:
            mine = [t for t in things if t["category"] == category]
            found = [d for d in detections if d["category"] == category]
            for threshold in thresholds:
                numbers = category_numbers(sorted(images), mine, found, threshold, AREA_RANGES[area], limit)
                values += [] if numbers is None else [numbers[which]]
        return sum(values) / len(values) if values else None

    last = limits[-1]
    result = {"AP": mean(0, "all", last)}
    result["AP50"] = mean(0, "all", last, IOU_THRESHOLDS[:1])
    result["AP75"] = mean(0, "all", last, IOU_THRESHOLDS[5:6])
    result |= {f"AP_{area}": mean(0, area, last) for area in ("small", "medium", "large")}
    result |= {f"AR{limit}": mean(1, "all", limit) for limit in limits}
    result |= {f"AR_{area}": mean(1, area, last) for area in ("small", "medium", "large")}
    return result

"""How long `load_coco` takes, and how much memory, on a file of the size of COCO train2017.

    python benchmarks/load_coco.py                # 118287 images, 860001 boxes with polygons, made in a temporary folder
    python benchmarks/load_coco.py --scale 0.1    # a tenth of it

Each measurement is a fresh process: the first load, the load from the cache, and the first load with masks. The goals are
60 s and 3 GiB for the first and 2 s for the second, the time of the imports not counted (it is printed apart).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

NUM_IMAGES = 118_287
NUM_BOXES = 860_001
NUM_CATEGORIES = 80
MEAN_POLYGON_POINTS = 26  # so that the file has train2017's 450 MB

MEASUREMENT = """
import json, pathlib, re, sys, time

def peak_kib():  # of this program alone: ru_maxrss also remembers the process that started it
    return int(re.search(r"VmHWM:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

start = time.perf_counter()
from sim_hf.data.coco import load_coco
imported, cpu = time.perf_counter(), time.process_time()
base = peak_kib()
images, annotations, cache, with_masks = sys.argv[1:]
rows = load_coco(images, annotations, cache_dir=cache, with_masks=with_masks == "True")
loaded, cpu = time.perf_counter(), time.process_time() - cpu
peak = peak_kib()
print(json.dumps({"import_s": imported - start, "load_s": loaded - imported, "cpu_s": cpu, "peak_kib": peak, "import_kib": base,
                  "rows": rows.num_rows}))
"""


def write_annotations(path: Path, num_images: int, num_boxes: int) -> list[str]:
    """A valid file -> the names of its images. Polygons are drawn from a pool: neither their length nor the work of parsing
    them changes by that."""
    generator = np.random.default_rng(0)
    pool = []
    for _ in range(2000):
        numbers = generator.uniform(0, 480, 2 * max(3, int(generator.gamma(2.0, MEAN_POLYGON_POINTS / 2)))).round(2)
        pool.append(json.dumps([numbers.tolist()]))
    names = [f"{i:012d}.jpg" for i in range(num_images)]
    image_ids = generator.choice(np.arange(1, 10 * num_images), num_images, replace=False).tolist()
    corners = (generator.uniform(0, 0.6, (num_boxes, 2)) * (640, 480)).round(2).tolist()
    sides = (generator.uniform(0.01, 0.4, (num_boxes, 2)) * (640, 480)).round(2).tolist()
    owners = generator.integers(0, num_images, num_boxes).tolist()
    picked = generator.integers(0, len(pool), num_boxes).tolist()
    with path.open("w", encoding="utf-8") as file:
        images = (
            {"id": image_id, "file_name": name, "width": 640, "height": 480, "license": 3}
            for image_id, name in zip(image_ids, names, strict=True)
        )
        file.write('{"info": {}, "images": [' + ", ".join(map(json.dumps, images)) + '], "annotations": [')
        for row in range(num_boxes):
            (x, y), (width, height) = corners[row], sides[row]
            file.write(
                f'{", " if row else ""}{{"segmentation": {pool[picked[row]]}, "area": {width * height / 2:.4f}, "iscrowd": 0, '
                f'"image_id": {image_ids[owners[row]]}, "bbox": [{x}, {y}, {width}, {height}], '
                f'"category_id": {row % NUM_CATEGORIES + 1}, "id": {row + 1}}}'
            )
        categories = [{"id": number + 1, "name": f"class {number}"} for number in range(NUM_CATEGORIES)]
        file.write('], "categories": ' + json.dumps(categories) + "}")
    return names


def touch_images(folder: Path, names: list[str]) -> None:
    """Empty files: loading only looks whether they are there."""
    folder.mkdir()
    for name in names:
        (folder / name).touch()


def measure(folder: Path, *, with_masks: bool) -> dict[str, float]:
    """One load in a fresh process."""
    arguments = [str(folder / "images"), str(folder / "instances.json"), str(folder / "cache"), str(with_masks)]
    command = [sys.executable, "-c", MEASUREMENT, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def describe_machine() -> str:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    packages = ", ".join(f"{name} {version(name)}" for name in ("datasets", "pyarrow", "orjson", "numpy"))
    return f"{model}, {os.cpu_count()} CPUs; Python {platform.python_version()}, {packages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="part of train2017's number of images and boxes")
    parser.add_argument("--skip-masks", action="store_true", help="leave out the load with masks")
    args = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        names = write_annotations(folder / "instances.json", int(NUM_IMAGES * args.scale), int(NUM_BOXES * args.scale))
        touch_images(folder / "images", names)
        size = (folder / "instances.json").stat().st_size / 1e6
        print(f"annotation file of {size:.0f} MB made in {time.perf_counter() - start:.0f} s")
        runs = [("first load", False), ("from the cache", False)]
        if not args.skip_masks:
            runs.append(("first load with masks", True))
        for title, with_masks in runs:
            result = measure(folder, with_masks=with_masks)
            peak, imports = result["peak_kib"] / 2**20, result["import_kib"] / 2**20
            print(
                f"{title:<22} {result['load_s']:6.2f} s ({result['cpu_s']:.2f} s of CPU), {result['rows']} rows; "
                f"peak {peak:.2f} GiB, of which {imports:.2f} GiB and another {result['import_s']:.1f} s are imports",
                flush=True,
            )


if __name__ == "__main__":
    main()

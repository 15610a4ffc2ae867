"""`sim-hf predict`: instances of pictures -> overlays and one COCO results file.

Shards over processes (`accelerate launch -m sim_hf predict ...`) with the same output as one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from sim_hf.data import ImageError, read_image
from sim_hf.data.images import PICTURE_ENDINGS
from sim_hf.evaluation import to_coco_results
from sim_hf.evaluation.prediction import evaluating, names_of, predict_images
from sim_hf.models.architectures import load_model
from sim_hf.models.sim import SIMImageProcessor
from sim_hf.processes import process_state
from sim_hf.visualization import draw_instances


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="sim-hf predict", description=__doc__)
    parser.add_argument("model", help="folder or Hub id of a trained model")
    parser.add_argument("images", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument("--output", required=True, type=Path, help="folder for the overlays and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.3, help="least score of an instance")
    parser.add_argument("--max-instances", type=int, help="at most this many per picture (default: 100, or all queries)")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures per forward pass")
    parser.add_argument("--no-overlays", action="store_true", help="write predictions.json only")
    options = parser.parse_args(argv)
    pictures = list(_pictures(options.images))
    state = process_state()
    model = load_model(options.model, dtype=torch.float32)
    model.to(state.device)
    processor = SIMImageProcessor.from_pretrained(options.model)
    names = names_of(model)
    category_ids = model.config.category_ids or list(range(len(names)))
    overlays = _overlay_names(pictures)
    found: list[tuple[int, list[dict]]] = []
    failed: list[str] = []
    mine = list(range(len(pictures)))[state.process_index :: state.num_processes]
    if not options.no_overlays:
        options.output.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(mine), desc="predict", unit="image", disable=not state.is_local_main_process)
    with evaluating(model):
        for start in range(0, len(mine), options.batch_size):
            batch = []
            for index in mine[start : start + options.batch_size]:
                try:
                    batch.append((index, read_image(pictures[index])))
                except (ImageError, OSError) as error:
                    failed.append(str(error))
                bar.update()
            if not batch:
                continue
            results = predict_images(
                model,
                processor,
                [picture for _, picture in batch],
                threshold=options.threshold,
                max_instances=options.max_instances,
            )
            for (index, picture), result in zip(batch, results, strict=True):
                found.append((index, to_coco_results(index + 1, result, category_ids)))
                if not options.no_overlays:
                    draw_instances(picture, result, names).save(options.output / overlays[index], quality=92)
    bar.close()
    found, failed = gather_object(found), gather_object(failed)
    if state.is_main_process:
        _write(options.output, pictures, sorted(found), names, category_ids)
        instances = sum(len(results) for _, results in found)
        print(f"{instances} instances in {len(found)} pictures -> {options.output}")
        for message in failed:
            print(f"not read: {message}")
    return 1 if failed else 0


def _pictures(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURE_ENDINGS)
            if not inside:
                raise ValueError(f"{path}: no pictures in this folder (endings: {', '.join(sorted(PICTURE_ENDINGS))})")
            yield from inside
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"{path}: no such picture or folder")


def _overlay_names(pictures: Sequence[Path]) -> list[str]:
    """A file name per picture; pictures of the same name in different folders are told apart by a number."""
    seen: dict[str, int] = {}
    names = []
    for path in pictures:
        count = seen[path.stem] = seen.get(path.stem, 0) + 1
        names.append(f"{path.stem}.jpg" if count == 1 else f"{path.stem}-{count}.jpg")
    return names


def _write(folder: Path, pictures: Sequence[Path], found: list, names: dict[int, str], category_ids: Sequence[int]) -> None:
    """COCO results, with the table that says which image id is which file."""
    folder.mkdir(parents=True, exist_ok=True)
    results = [result for _, results in found for result in results]
    images = [{"id": index + 1, "file_name": str(pictures[index])} for index, _ in found]
    categories = [{"id": int(category_ids[label]), "name": name} for label, name in sorted(names.items())]
    (folder / "predictions.json").write_text(json.dumps(results), encoding="utf-8")
    (folder / "images.json").write_text(json.dumps({"images": images, "categories": categories}, indent=1), encoding="utf-8")

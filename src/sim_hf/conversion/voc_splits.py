"""Which XML files of a Pascal VOC data set are trained on, and which are measured on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sim_hf.conversion.source import SourceError, pictures_in

# The 10582 images of the segmentation benchmark with SBD's, under the names that people give the list.
_AUGMENTED = ("Segmentation/trainaug", "Segmentation/train_aug", "SegmentationAug/train_aug", "Main/trainaug")
_VAL_FOLDERS = ("val", "valid", "validation")


@dataclass(frozen=True)
class VocSplits:
    """XML files of each split, and what has to be said about the choice."""

    splits: dict[str, list[Path]]
    notes: Counter[str] = field(default_factory=Counter)


def find_splits(root: Path, *, train: str | None = None, val: str | None = None) -> VocSplits:
    """The splits of a devkit's ImageSets/, of folders train/ and val/ (valid/), or everything as "train".

    With instance masks and without `train` and `val`, the paper's: measured on Segmentation/val; trained on trainaug where
    its list is there, else on every annotated image of Main and Segmentation that is not measured on.
    """
    if not root.is_dir():
        raise SourceError(f"{root}: no such folder")
    sets = root / "ImageSets"
    if sets.is_dir():
        return _listed(root, sets, train, val)
    if train or val:
        raise SourceError(f"{root}: lists of images are looked for in ImageSets/, which is not there")
    if (root / "train").is_dir():
        held_out = next((root / name for name in _VAL_FOLDERS if (root / name).is_dir()), None)
        folders = {"train": root / "train", **({"val": held_out} if held_out else {})}
    else:
        folders = {"train": root}
    notes: Counter[str] = Counter()
    splits = {}
    for split, folder in folders.items():
        annotations = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
        splits[split] = sorted(annotations.glob("*.xml"))
        if not splits[split]:
            raise SourceError(f"{annotations}: no XML files")
        stems = {path.stem for path in splits[split]}
        pictures = [path for place in (folder, *picture_folders(folder)) for path in pictures_in(place)]
        notes["images have no XML file and were left out"] += sum(path.stem not in stems for path in pictures)
    return VocSplits(splits, notes)


def picture_folders(folder: Path) -> tuple[Path, ...]:
    """Where the pictures of `folder`/Annotations lie."""
    return folder / "JPEGImages", folder / "images"


def _listed(root: Path, sets: Path, train: str | None, val: str | None) -> VocSplits:
    notes: Counter[str] = Counter()
    if train is None and val is None and (root / "SegmentationObject").is_dir() and _list(sets, "Segmentation/val").is_file():
        val_names = _names(_list(sets, "Segmentation/val"))
        augmented = next((name for name in _AUGMENTED if _list(sets, name).is_file()), None)
        if augmented is not None:
            train_names = _names(_list(sets, augmented))
        else:
            lists = [_list(sets, name) for name in ("Main/trainval", "Main/train", "Main/val", "Segmentation/train")]
            train_names = [name for path in lists if path.is_file() for name in _names(path)]
            notes[f"images to train on: all of Main and Segmentation that are not measured on (no {_AUGMENTED[0]}.txt)"] = len(
                set(train_names) - set(val_names)
            )
    else:
        if val is None and _list(sets, "Main/train").is_file() and _list(sets, "Main/val").is_file():
            val = "Main/val"
        usual = next((name for name in ("Main/train", "Main/trainval") if _list(sets, name).is_file()), "Main/train")
        train_names = _names(_list(sets, train or usual))
        val_names = _names(_list(sets, val)) if val else []
    measured = set(val_names)
    notes["images of the training list are measured on, and not trained on"] += len(measured & set(train_names)) if train else 0
    train_names = [name for name in dict.fromkeys(train_names) if name not in measured]
    annotations = root / "Annotations"
    splits = {"train": [annotations / f"{name}.xml" for name in train_names]}
    if val_names:
        splits["val"] = [annotations / f"{name}.xml" for name in dict.fromkeys(val_names)]
    return VocSplits(splits, notes)


def _list(sets: Path, name: str) -> Path:
    return sets / f"{name.removesuffix('.txt')}.txt"


def _names(path: Path) -> list[str]:
    """The images of a list; in the lists of a class a flag follows the name, and -1 says that the class is not in the image."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error.reason
        raise SourceError(f"{path}: the list of images cannot be read ({reason})") from error
    rows = [line.split() for line in lines if line.strip()]
    return [row[0] for row in rows if row[1:2] != ["-1"]]

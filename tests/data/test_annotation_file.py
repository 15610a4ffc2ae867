"""Text of COCO files: segmentations are cut out unread, and files are written whole or not at all."""

import json
import os
import time

import numpy as np
import orjson
import pytest

from coco_faults import GARBAGE_SEGMENTATIONS, encode, sound_document
from sim_hf.data import annotation_file
from sim_hf.data.annotation_file import (
    AnnotationError,
    UnreadableAnnotationError,
    parse_annotations,
    read_annotation_bytes,
    write_coco,
)
from sim_hf.data.segmentation_text import separate_segmentations


def test_segmentations_are_replaced_by_their_number():
    text, pieces = separate_segmentations(b'[{"segmentation": [[1, 2]], "a": 1}, {"segmentation" :\n{"size": [1]}}]')
    assert text == b'[{"segmentation": 0, "a": 1}, {"segmentation" :\n1}]'
    assert [pieces[0], pieces[1]] == [b"[[1, 2]]", b'{"size": [1]}']


@pytest.mark.parametrize("garbage", GARBAGE_SEGMENTATIONS.values(), ids=GARBAGE_SEGMENTATIONS)
def test_garbage_is_cut_out_whole(garbage):
    text, pieces = separate_segmentations(b'{"segmentation": ' + garbage + b', "id": 7}')
    assert orjson.loads(text) == {"segmentation": 0, "id": 7}
    assert len(pieces) == 1 and pieces[0] == garbage


def test_the_word_in_a_value_or_inside_another_text_is_left_alone():
    document = {"name": "segmentation", "info": '"segmentation": [1, 2]', "my segmentation": [1], "list": ["segmentation"]}
    text, pieces = separate_segmentations(json.dumps(document).encode())
    assert json.loads(text) == document and len(pieces) == 0


@pytest.mark.parametrize("end", [b"", b" ", b"[", b"[[1, 2", b"[[1, 2]", b'"abc', b'{"a": "]', b'{"a": "\\'])
def test_a_segmentation_that_does_not_end_is_left_for_the_parser_to_refuse(end):
    content = b'{"images": [], "segmentation": ' + end
    with pytest.raises(UnreadableAnnotationError, match="not JSON"):
        parse_annotations("a.json", content)


def test_random_documents_parse_to_themselves_without_their_segmentations():
    generator = np.random.default_rng(0)

    def random_value(depth):
        kind = generator.integers(0, 7 if depth else 4)
        if kind < 4:
            return [None, int(generator.integers(-9, 9)), float(generator.normal()), 'a"]}\\[{é'][kind]
        if kind == 4:
            return [random_value(depth - 1) for _ in range(generator.integers(0, 4))]
        keys = ["id", "segmentation", 'q"', "bbox"]
        return {keys[generator.integers(0, 4)]: random_value(depth - 1) for _ in range(generator.integers(0, 4))}

    def restored(value, pieces):
        if isinstance(value, list):
            return [restored(item, pieces) for item in value]
        if isinstance(value, dict):
            return {k: json.loads(pieces[v]) if k == "segmentation" else restored(v, pieces) for k, v in value.items()}
        return value

    for _ in range(500):
        document = random_value(4)
        text, pieces = separate_segmentations(json.dumps(document, ensure_ascii=bool(generator.integers(2))).encode())
        assert restored(json.loads(text), pieces) == document


def test_a_long_file_of_open_brackets_takes_no_quadratic_time():
    content = b'{"segmentation": ' * 20_000
    start = time.perf_counter()
    with pytest.raises(UnreadableAnnotationError):
        parse_annotations("a.json", content)
    assert time.perf_counter() - start < 5


def test_messages_are_one_line_with_the_file_name():
    for content in (b"", b"{", b"[1]", b'{"images": 1}', b"[" * 10_000):
        with pytest.raises(AnnotationError) as error:
            parse_annotations("folder/a.json", content)
        assert str(error.value).startswith("folder/a.json: ") and "\n" not in str(error.value)


def test_missing_keys_are_named_with_what_is_there():
    with pytest.raises(AnnotationError, match="no \"images\"; it has 'info', 'boxes'"):
        parse_annotations("a.json", b'{"info": {}, "boxes": []}')


def test_a_file_above_the_size_limit_is_not_read(tmp_path):
    (tmp_path / "a.json").write_bytes(b" " * 100)
    with pytest.raises(UnreadableAnnotationError, match="100 bytes, expected at most 99"):
        read_annotation_bytes(tmp_path / "a.json", max_bytes=99)


def test_a_folder_and_a_nul_in_the_name_are_unreadable(tmp_path):
    for path in (tmp_path, f"{tmp_path}/a\0b"):
        with pytest.raises(UnreadableAnnotationError, match="cannot be read"):
            read_annotation_bytes(path)


def test_repeated_keys_of_other_objects_do_not_count():
    document = {**sound_document(), "info": {"images": 3, "bbox": "none"}, "licenses": [{"id": 1, "file_name": "x"}]}
    assert parse_annotations("a.json", encode(document)).repeated_keys == []


# writing


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_coco(path, {"b": np.arange(3), "c": ["é", 1.5, None]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"b": [0, 1, 2], "c": ["é", 1.5, None]}


def test_a_written_file_is_readable_for_others(tmp_path):
    umask = os.umask(0o022)
    try:
        write_coco(tmp_path / "a.json", {})
    finally:
        os.umask(umask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float32("nan"), np.array([1.0, np.nan])])
def test_numbers_that_json_does_not_have_are_refused_by_place(tmp_path, number):
    with pytest.raises(ValueError, match=r"annotations\[0\].bbox is not finite"):
        write_coco(tmp_path / "a.json", {"annotations": [{"bbox": number}]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    write_coco(tmp_path / "a.json", {"old": True})

    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(annotation_file.os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        write_coco(tmp_path / "a.json", {"new": True})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": True}

"""The benchmarks of inference, evaluation and loading compare like with like: both sides of each row give the same result.

Small sizes, no clock: how fast the two are is not tested.
"""

import importlib
import math
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


PICTURE_SIZE = (96, 130)  # 130 is no multiple of 32: padding takes part


@pytest.fixture(scope="module")
def benchmark():
    """name -> module of the folder, whose files import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module


@pytest.fixture(scope="module")
def whole(benchmark):
    picture = benchmark("speed_loading").pictures(None, 1, PICTURE_SIZE)[0]
    return benchmark("speed_inference").EndToEnd(picture, "tiny")


def test_both_networks_get_the_same_pixels_and_give_the_same_logits(whole):
    assert whole.is_equal()
    with torch.no_grad():
        whole.stock.class_predictor.bias += 1
    assert not whole.is_equal()
    with torch.no_grad():
        whole.stock.class_predictor.bias -= 1


def test_both_ways_from_a_picture_give_run_lengths_of_its_size(whole):
    for results in (whole.ours(), whole.peer()):
        assert results
        assert len(results) <= whole.num_queries
        assert all(result["segmentation"]["size"] == list(PICTURE_SIZE) for result in results)


def test_post_processing_equals_full_size_masks_bit_for_bit(benchmark):
    step = benchmark("speed_inference").PostProcessing((192, 333), (192, 333), num_queries=20)
    assert len(step.ours()) == 20
    assert step.agreement().is_equal
    assert step.agreement().note == "20 of 20 run lengths identical"


def test_post_processing_of_an_enlarged_picture_equals_two_resizings_bit_for_bit(benchmark):
    agreement = benchmark("speed_inference").PostProcessing((240, 400), (400, 667), num_queries=20).agreement()
    assert agreement.is_equal
    assert agreement.note == "20 of 20 run lengths identical"


def test_post_processing_with_other_masks_is_not_equal(benchmark):
    step = benchmark("speed_inference").PostProcessing((64, 96), (64, 96), num_queries=5)
    theirs = step.peer()
    step.peer = lambda: theirs
    step.outputs.masks_queries_logits = step.outputs.masks_queries_logits.roll(1, -1)
    assert not step.agreement().is_equal


def test_blobs_have_the_sizes_of_objects_in_coco(benchmark):
    inference = benchmark("speed_inference")
    sides = [inference.object_side((place + 0.5) / 1000, 0.5) for place in range(1000)]
    assert sum(side < 32 for side in sides) == 410
    assert sum(side > 96 for side in sides) == 250
    assert inference.object_side(0.1, 0.5) == pytest.approx(math.sqrt(8 * 32))


def test_all_24_numbers_equal_those_of_pycocotools_and_say_something(benchmark, tmp_path):
    evaluation = benchmark("speed_evaluation")
    problem = evaluation.generate(tmp_path, num_images=12, num_objects=60, detections=20)
    assert [len(result["scores"]) for result in problem.by_image.values()] == [20] * 12
    ours, theirs = evaluation.Ours(problem).numbers(), evaluation.pycocotools_numbers(problem)
    assert evaluation.same_numbers(ours, theirs)
    assert 0.1 < ours[0] < 0.9
    assert not evaluation.same_numbers([*ours[:-1], ours[-1] + 1e-6], theirs)


def test_a_problem_depends_on_its_seed_alone(benchmark, tmp_path):
    evaluation = benchmark("speed_evaluation")
    first, second = (evaluation.generate(tmp_path / name, 3, 12, 5) for name in ("a", "b"))
    assert first.annotation_file.read_bytes() == second.annotation_file.read_bytes()
    assert first.coco_results == second.coco_results


def test_both_ways_of_loading_give_the_same_batch(benchmark, tmp_path):
    loading = benchmark("speed_loading").Loading(tmp_path, None, 3, 2, (96, 128), 160)
    assert loading.is_equal()
    assert loading.is_equal_as_bytes()
    assert loading.our_batch(0)["pixel_values"].shape == (2, 3, 128, 160)  # 120 rows, padded to a multiple of 32
    assert loading.our_batch(2)["pixel_values"].shape == loading.peer_batch(2)["pixel_values"].shape == (1, 3, 128, 160)
    loading.processor.image_mean = [0.5, 0.5, 0.5]
    assert not loading.is_equal() and not loading.is_equal_as_bytes()


def test_pictures_of_a_folder_are_cut_to_size_and_come_again(benchmark, tmp_path):
    data = benchmark("sim_hf.data").write_scenes(tmp_path, num_train=0, num_val=2, size=64, progress=False)
    pictures = benchmark("speed_loading").pictures(data, 3, (48, 80))
    assert [picture.size for picture in pictures] == [(80, 48)] * 3
    assert pictures[2].tobytes() == pictures[0].tobytes() != pictures[1].tobytes()


def test_one_thread_is_given_back(benchmark):
    before = torch.get_num_threads()
    with benchmark("speed_loading").one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

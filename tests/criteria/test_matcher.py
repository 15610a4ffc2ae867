"""Bipartite matching: hand-made costs, and what must not stop a run."""

import itertools

import pytest
import torch
from synthetic_outputs import GRID, NUM_CLASSES, make_targets

from sim_hf.criteria import matcher as matcher_file
from sim_hf.criteria.boxinst import BoxInstCriterion
from sim_hf.criteria.fully_supervised import FullySupervisedCriterion
from sim_hf.criteria.matcher import HungarianMatcher

BOX = [0.0, 0.0, 8.0, 8.0]


class CostsFromPixels:
    """The cost of query q for instance g of its image is pixel g of the query's mask."""

    def matching_cost(self, mask_logits_QHW, targets, *, global_step):
        return mask_logits_QHW[:, 0, targets.rank_in_image()]


def matched_pairs(matches):
    """{(image, query, instance)}"""
    return set(zip(matches.images_N.tolist(), matches.queries_N.tolist(), matches.instance_ids_N.tolist(), strict=True))


def layer_with_costs(costs, class_logits=None):
    """One layer of one image whose mask costs are `costs` (Q, G)."""
    costs = torch.tensor(costs, dtype=torch.float32)
    class_logits = torch.zeros(len(costs), NUM_CLASSES + 1) if class_logits is None else torch.tensor(class_logits)
    return class_logits[None], costs[None, :, None, :]


def instances(num, labels=None, image_ids=None, num_images=1):
    return make_targets([BOX] * num, labels or [0] * num, image_ids or [0] * num, num_images=num_images)


def test_matching_minimises_the_sum_and_not_each_pair():
    # Greedy would give query 0 to instance 0 (0.1) and be left with 0.9; the optimum is 0.2 + 0.2.
    layer = layer_with_costs([[0.1, 0.2], [0.2, 0.9]])
    (matches,) = HungarianMatcher(CostsFromPixels())([layer], instances(2), global_step=0)
    assert matched_pairs(matches) == {(0, 0, 1), (0, 1, 0)}


def test_cost_is_two_times_class_plus_five_times_mask():
    # P(class 0): query 0 has 0.9, query 1 has 0.1. Class part 2 * 0.1 = 0.2 and 2 * 0.9 = 1.8, so 1.6 apart;
    # a mask part 5 * 0.33 = 1.65 apart turns the choice, 5 * 0.31 = 1.55 does not.
    logits = torch.tensor([[0.9, 0.1, 1e-9, 1e-9], [0.1, 0.9, 1e-9, 1e-9]]).log().tolist()
    for mask_cost, winner in ((0.31, 0), (0.33, 1)):
        layer = layer_with_costs([[mask_cost], [0.0]], logits)
        (matches,) = HungarianMatcher(CostsFromPixels())([layer], instances(1), global_step=0)
        assert matches.queries_N.tolist() == [winner]


def test_matching_equals_the_best_of_all_assignments():
    costs = torch.rand(5, 3)
    (matches,) = HungarianMatcher(CostsFromPixels())([layer_with_costs(costs.tolist())], instances(3), global_step=0)
    best = min(sum(float(costs[q, g]) for g, q in enumerate(queries)) for queries in itertools.permutations(range(5), 3))
    assert sum(float(costs[q, g]) for _, q, g in matched_pairs(matches)) == pytest.approx(best)


def test_each_image_is_matched_with_its_own_instances_even_when_they_are_not_sorted():
    class_logits = torch.zeros(2, 2, NUM_CLASSES + 1)
    masks = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]], [[[5.0, 9.0]], [[1.0, 9.0]]]])
    targets = instances(3, image_ids=[0, 1, 0], num_images=2)
    (matches,) = HungarianMatcher(CostsFromPixels())([(class_logits, masks)], targets, global_step=0)
    assert matched_pairs(matches) == {(0, 0, 0), (0, 1, 2), (1, 1, 1)}


def test_every_layer_is_matched_for_itself():
    layers = [layer_with_costs([[0.0], [1.0]]), layer_with_costs([[1.0], [0.0]])]
    matches = HungarianMatcher(CostsFromPixels())(layers, instances(1), global_step=0)
    assert [m.queries_N.tolist() for m in matches] == [[0], [1]]


def test_layers_matched_together_take_the_pairs_that_they_take_alone():
    criterion = BoxInstCriterion()
    targets = make_targets([[0, 0, 8, 8], [4, 4, 16, 12], [2, 0, 9, 16]], [0, 1, 1], [0, 0, 1], num_images=2)
    layers = [(torch.randn(2, 6, NUM_CLASSES + 1), 4 * torch.randn(2, 6, *GRID)) for _ in range(4)]
    together = HungarianMatcher(criterion)(layers, targets, global_step=0)
    for layer, matches in zip(layers, together, strict=True):
        (alone,) = HungarianMatcher(criterion)([layer], targets, global_step=0)
        assert matched_pairs(matches) == matched_pairs(alone)


@pytest.mark.parametrize("criterion", [BoxInstCriterion(), FullySupervisedCriterion()])
@pytest.mark.parametrize("images_at_a_time", [1, 2, 5])
def test_images_priced_in_one_call_take_the_pairs_that_they_take_alone(criterion, images_at_a_time, monkeypatch):
    boxes = [[0, 0, 8, 8], [4, 4, 16, 12], [2, 0, 9, 16], [0, 0, 16, 16], [5, 5, 9, 9]]
    targets = make_targets(boxes, [0, 1, 1, 0, 2], [3, 0, 3, 0, 1], num_images=5)  # the third and the last have none
    height, width = targets.input_size
    targets.masks_GHW = torch.rand(5, height, width) > 0.5
    targets.has_mask_G = torch.ones(5, dtype=torch.bool)
    layers = [(torch.randn(5, 6, NUM_CLASSES + 1), 4 * torch.randn(5, 6, *GRID)) for _ in range(2)]
    monkeypatch.setattr(matcher_file, "_CELLS_AT_A_TIME", images_at_a_time * layers[0][1][0].numel() * len(layers))
    together = HungarianMatcher(criterion)(layers, targets, global_step=0)
    for image in (0, 1, 3):
        rows = (targets.image_ids_G == image).nonzero()[:, 0]
        own = targets.select(rows)
        own.image_ids_G, own.num_images = torch.zeros_like(own.image_ids_G), 1
        alone = HungarianMatcher(criterion)([(c[image : image + 1], m[image : image + 1]) for c, m in layers], own, global_step=0)
        for all_of_layer, one in zip(together, alone, strict=True):
            expected = {(image, query, int(rows[instance])) for _, query, instance in matched_pairs(one)}
            assert {pair for pair in matched_pairs(all_of_layer) if pair[0] == image} == expected
    assert all(set(matches.images_N.tolist()) == {0, 1, 3} for matches in together)


def test_an_image_without_instances_matches_nothing():
    class_logits, masks = torch.zeros(2, 4, NUM_CLASSES + 1), torch.rand(2, 4, 1, 3)
    (matches,) = HungarianMatcher(CostsFromPixels())(
        [(class_logits, masks)], instances(1, image_ids=[1], num_images=2), global_step=0
    )
    assert matches.images_N.tolist() == [1]


def test_a_batch_without_instances_matches_nothing_in_any_layer():
    matches = HungarianMatcher(CostsFromPixels())([layer_with_costs([[0.0]])] * 2, instances(0), global_step=0)
    assert [len(m.queries_N) for m in matches] == [0, 0]
    assert all(m.queries_N.dtype == torch.int64 for m in matches)


def test_more_instances_than_queries_keep_the_cheapest_pairs():
    layer = layer_with_costs([[0.9, 0.1, 0.5], [0.8, 0.3, 0.2]])
    (matches,) = HungarianMatcher(CostsFromPixels())([layer], instances(3), global_step=0)
    assert matched_pairs(matches) == {(0, 0, 1), (0, 1, 2)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_still_give_a_matching(bad):
    class_logits = [[bad] * (NUM_CLASSES + 1), [0.0] * (NUM_CLASSES + 1)]
    layer = layer_with_costs([[bad, bad], [0.1, 0.2]], class_logits)
    (matches,) = HungarianMatcher(CostsFromPixels())([layer], instances(2), global_step=0)
    assert sorted(matches.queries_N.tolist()) == [0, 1]
    assert sorted(matches.instance_ids_N.tolist()) == [0, 1]


def test_a_query_that_is_not_a_number_is_matched_last():
    nan = float("nan")
    (matches,) = HungarianMatcher(CostsFromPixels())([layer_with_costs([[nan], [0.9], [0.8]])], instances(1), global_step=0)
    assert matches.queries_N.tolist() == [2]


def test_the_nearest_queries_are_the_cheapest_of_each_instance_cheapest_first():
    layer = layer_with_costs([[0.5, 0.1], [0.2, 0.2], [0.9, 0.3]])
    matches = HungarianMatcher(CostsFromPixels()).nearest(layer, instances(2), 2, global_step=0)
    assert sorted(matched_pairs(matches)) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    first = matches.instance_ids_N.tolist().index(0)
    assert matches.queries_N[first] == 1


def test_the_nearest_of_fewer_queries_are_all_of_them_and_nothing_without_instances():
    layer = layer_with_costs([[0.5], [0.2]])
    matches = HungarianMatcher(CostsFromPixels()).nearest(layer, instances(1), 5, global_step=0)
    assert len(matches.queries_N) == 2
    nothing = HungarianMatcher(CostsFromPixels()).nearest(
        layer_with_costs([[0.1], [0.2]]), instances(1).select([]), 5, global_step=0
    )
    assert len(nothing.queries_N) == 0

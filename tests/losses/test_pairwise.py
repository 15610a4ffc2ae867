import math

import pytest
import references_losses as reference
import torch

from sim_hf.losses import color_similarity, half_ring_offsets, pairwise_edges, pairwise_loss
from sim_hf.structures import box_masks

STRIDE = 4
SURE = 20.0


def _all_valid(images_B3HW):
    return torch.ones(images_B3HW.shape[0], *images_B3HW.shape[2:], dtype=torch.int64)


def _edges(images_B3HW, boxes, image_ids=None, valid_BHW=None, **options):
    valid_BHW = _all_valid(images_B3HW) if valid_BHW is None else valid_BHW
    boxes_G4 = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    image_ids_G = torch.zeros(len(boxes_G4), dtype=torch.long) if image_ids is None else torch.tensor(image_ids)
    similarity = color_similarity(images_B3HW, valid_BHW, stride=STRIDE)
    return pairwise_edges(similarity, boxes_G4, image_ids_G, stride=STRIDE, **options)


def _grey(height=10, width=10, batch_size=1):
    return torch.full((batch_size, 3, height * STRIDE, width * STRIDE), 0.5)


def _as_logits(mask):
    return (mask.float() * 2 - 1) * SURE


def _two_tone_photograph():
    """Two 12 x 14 images: a bright disc on a dark ground, with noise that lets some pairs fail; the second is padded."""
    rows, columns = torch.meshgrid(torch.arange(48.0), torch.arange(56.0), indexing="ij")
    disc = ((rows - 20) ** 2 + (columns - 24) ** 2 < 14**2).float()
    images = (0.2 + 0.5 * disc + 0.03 * torch.randn(2, 3, 48, 56)).clamp(0, 1)
    valid = torch.ones(2, 48, 56, dtype=torch.int64)
    valid[1, 40:], valid[1, :, 50:] = 0, 0
    return images * valid[:, None], valid


# --- similarity


def test_similarity_equals_the_slow_reference():
    images, valid = _two_tone_photograph()
    similarity_BKHW = color_similarity(images, valid, stride=STRIDE)
    assert similarity_BKHW.shape == (2, 4, 12, 14) and similarity_BKHW.dtype == torch.float32
    expected = torch.zeros_like(similarity_BKHW)
    for b in range(2):
        for k, (down, right) in enumerate(half_ring_offsets(3, 2)):
            for y in range(12):
                for x in range(14):
                    expected[b, k, y, x] = reference.cell_similarity(images[b], valid[b], (y, x), (y + down, x + right), STRIDE)
    torch.testing.assert_close(similarity_BKHW, expected, atol=1e-4, rtol=0)


def test_similarity_of_equal_colours_is_one_and_of_black_and_white_is_exp_minus_50():
    images = _grey()
    images[:, :, :, :20], images[:, :, :, 20:] = 0, 1
    similarity_BKHW = color_similarity(images, _all_valid(images), stride=STRIDE)
    assert half_ring_offsets(3, 2)[0] == (0, 2)
    assert similarity_BKHW[0, 0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    assert similarity_BKHW[0, 0, 0, 3].item() == pytest.approx(math.exp(-50), rel=1e-3)


def test_neighbour_in_the_padding_has_no_similarity():
    images, valid = _grey(), _all_valid(_grey())
    valid[:, :, 5 * STRIDE :] = 0
    right = color_similarity(images, valid, stride=STRIDE)[0, 0, 0]
    assert right.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_cell_that_is_padding_in_part_counts_as_padding():
    images, valid = _grey(), _all_valid(_grey())
    valid[:, :, 5 * STRIDE - 1 :] = 0
    assert color_similarity(images, valid, stride=STRIDE)[0, 0, 0].sum() == 2


def test_pixel_mask_may_be_bool_or_integer():
    images, valid = _two_tone_photograph()
    assert torch.equal(color_similarity(images, valid), color_similarity(images, valid.bool()))


def test_grid_smaller_than_the_dilation_has_no_edges():
    images = _grey(1, 1)
    assert color_similarity(images, _all_valid(images)).shape == (1, 4, 1, 1)
    assert len(_edges(images, [[0, 0, 4, 4]])) == 0


def test_half_ring_and_its_mirror_image_are_the_ring():
    half = half_ring_offsets(3, 2)
    assert sorted(half + [(-down, -right) for down, right in half]) == sorted(reference.ring(2))
    assert len(half_ring_offsets(5, 1)) == 12


# --- edges


def test_box_in_the_middle_of_a_flat_image_has_the_counted_edges():
    # 4 x 4 cells far from the border: 16 anchors * 8 neighbours = 128 pairs. Both ends inside: along a row 4 * 2 pairs, along
    # a column the same, 2 * 2 along each diagonal: 24 edges of weight 2, so 128 - 48 = 80 of weight 1.
    edges = _edges(_grey(12, 12), [[16, 16, 32, 32]])
    assert (edges.weights_E == 2).sum() == 24 and (edges.weights_E == 1).sum() == 80
    assert edges.counts_G.tolist() == [104] and len(edges) == 104
    assert edges.grid_size == (12, 12)
    assert edges.shares_E.sum().item() == pytest.approx(1.0, abs=1e-5)


def test_one_pixel_box_has_one_edge_to_each_of_its_neighbours():
    edges = _edges(_grey(), [[21, 21, 22, 22]])
    assert edges.weights_E.tolist() == [1.0] * 8
    centre = 5 * 10 + 5
    others = torch.where(edges.anchors_E == centre, edges.neighbours_E, edges.anchors_E)
    assert sorted(others.tolist()) == sorted(centre + down * 10 + right for down, right in reference.ring(2))


def test_one_pixel_box_in_the_corner_has_three_edges():
    assert len(_edges(_grey(), [[0, 0, 1, 1]])) == 3


def test_box_in_the_padding_has_no_edges_and_no_loss():
    valid = _all_valid(_grey())
    valid[:, :, 20:] = 0
    edges = _edges(_grey(), [[24, 24, 36, 36], [0, 0, 16, 16]], valid_BHW=valid)
    logits = torch.randn(2, 10, 10, requires_grad=True)
    loss_N = pairwise_loss(logits, torch.arange(2), edges)
    loss_N.sum().backward()
    assert edges.counts_G[0] == 0 and loss_N[0] == 0 and loss_N[1] > 0
    assert (logits.grad[0] == 0).all() and (logits.grad[1] != 0).any()


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 2), (5, 1)])
def test_edges_are_those_of_the_dense_maps(kernel_size, dilation):
    images, valid = _two_tone_photograph()
    corner_G2 = torch.rand(12, 2) * 52 - 4
    boxes_G4 = torch.cat([corner_G2, corner_G2 + 0.5 + torch.rand(12, 2) * 30], 1)
    image_ids_G = torch.arange(12) % 2
    similarity = color_similarity(images, valid, stride=STRIDE, kernel_size=kernel_size, dilation=dilation)
    edges = pairwise_edges(similarity, boxes_G4, image_ids_G, stride=STRIDE, dilation=dilation)
    inside_GHW = box_masks(boxes_G4, 12, 14, STRIDE)
    expected = {}
    for k, (down, right) in enumerate(half_ring_offsets(kernel_size, dilation)):
        for g, y, x in (similarity[image_ids_G, k] >= 0.3).nonzero().tolist():
            if weight := int(inside_GHW[g, y, x]) + int(inside_GHW[g, y + down, x + right]):
                expected[g, y * 14 + x, (y + down) * 14 + x + right] = weight
    listed = zip(edges.instance_ids_E.tolist(), edges.anchors_E.tolist(), edges.neighbours_E.tolist(), strict=True)
    assert dict(zip(listed, edges.weights_E.tolist(), strict=True)) == expected
    assert (edges.instance_ids_E.diff() >= 0).all() and edges.counts_G.tolist() == edges.instance_ids_E.bincount().tolist()


def test_every_instance_reads_its_own_image():
    images = torch.cat([_grey(), torch.rand(1, 3, 40, 40)])
    edges = _edges(images, [[8, 8, 24, 24], [8, 8, 24, 24]], image_ids=[1, 0], threshold=0.9)
    assert edges.counts_G[0] < 20 < edges.counts_G[1]


# --- loss


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.0, 0.0, math.log(2)),
        (math.log(3), math.log(3), -math.log(0.75**2 + 0.25**2)),  # p = q = 3/4: P = 10/16
        (math.log(3), -math.log(3), -math.log(2 * 0.75 * 0.25)),
        (0.0, 7.0, math.log(2)),  # one end undecided: P = 1/2 whatever the other end says
        (SURE, SURE, 0.0),
        (10_000.0, -10_000.0, 10_000.0 - math.log(2)),  # P is about 2 * exp(-10000)
        (10_000.0, -4_000.0, 4_000.0),
    ],
)
def test_loss_of_one_edge(x, y, expected):
    edges = _edges(_grey(1, 3), [[0, 0, 4, 4]])
    assert len(edges) == 1
    loss_N = pairwise_loss(torch.tensor([[[x, 3.0, y]]]), torch.tensor([0]), edges)
    assert loss_N.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_loss_equals_the_slow_reference():
    images, valid = _two_tone_photograph()
    boxes = [[8, 4, 40, 36], [30, 20, 56, 48], [0, 0, 56, 48], [17, 17, 18, 18]]
    image_ids = [0, 1, 1, 0]
    edges = _edges(images, boxes, image_ids, valid)
    inside_GHW = box_masks(torch.tensor(boxes).float(), 12, 14, STRIDE)
    logits = torch.randn(4, 12, 14) * 3

    def similar_in(b):
        return lambda pixel, other: reference.cell_similarity(images[b], valid[b], pixel, other, STRIDE) >= 0.3

    expected = [reference.pairwise_loss(logits[g], inside_GHW[g], similar_in(image_ids[g]), dilation=2) for g in range(4)]
    assert min(expected) > 0
    torch.testing.assert_close(pairwise_loss(logits, torch.arange(4), edges), torch.tensor(expected), rtol=1e-5, atol=0)


def test_half_ring_of_weighted_edges_equals_the_dense_unfold_formulation_and_its_gradient():
    num_instances, height, width, dilation = 6, 16, 18, 2
    similarity_BKHW = torch.rand(2, 4, height, width)
    symmetric_B8HW = torch.zeros(2, 8, height, width)  # the full ring, in the order of unfold
    for k, (down, right) in enumerate(half_ring_offsets(3, dilation)):
        forth, back = reference.ring(dilation).index((down, right)), reference.ring(dilation).index((-down, -right))
        for y in range(height):
            for x in range(width):
                if 0 <= y + down < height and 0 <= x + right < width:
                    symmetric_B8HW[:, forth, y, x] = similarity_BKHW[:, k, y, x]
                    symmetric_B8HW[:, back, y + down, x + right] = similarity_BKHW[:, k, y, x]
                else:
                    similarity_BKHW[:, k, y, x] = 0
    low = torch.rand(num_instances, 2) * 30
    boxes_G4 = torch.cat([low, low + torch.rand(num_instances, 2) * 40], 1)
    image_ids_G = torch.arange(num_instances) % 2
    edges = pairwise_edges(similarity_BKHW, boxes_G4, image_ids_G, stride=STRIDE)
    inside_GHW = box_masks(boxes_G4, height, width, STRIDE)
    weights_G8HW = ((symmetric_B8HW >= 0.3)[image_ids_G] & inside_GHW[:, None]).double()

    logits = (torch.randn(num_instances, height, width, dtype=torch.float64) * 3).requires_grad_()
    dense_G = reference.pairwise_loss_unfold(logits, weights_G8HW, dilation)
    sparse_G = pairwise_loss(logits, torch.arange(num_instances), edges)
    torch.testing.assert_close(sparse_G, dense_G, rtol=1e-6, atol=1e-9)
    factors = torch.rand(num_instances, dtype=torch.float64)
    (dense_grad,) = torch.autograd.grad((dense_G * factors).sum(), logits)
    (sparse_grad,) = torch.autograd.grad((sparse_G * factors).sum(), logits)
    torch.testing.assert_close(sparse_grad, dense_grad, rtol=1e-6, atol=1e-9)


def test_gradient_is_right_also_at_logits_of_zero_and_of_equal_size():
    edges = _edges(_grey(5, 5), [[4, 4, 16, 16], [0, 0, 8, 8]])
    logits = torch.randn(2, 5, 5, dtype=torch.float64)
    logits[0, 1], logits[0, 3], logits[1, ::2] = 0.0, -logits[0, 1], 1.5
    assert torch.autograd.gradcheck(lambda x: pairwise_loss(x, torch.tensor([1, 0]), edges), logits.requires_grad_())


def test_gradient_made_in_advance_follows_what_comes_back_and_serves_twice():
    edges = _edges(_grey(), [[8, 8, 32, 32], [4, 4, 20, 20]])
    logits_NHW = torch.randn(2, 10, 10, requires_grad=True)
    loss_N = pairwise_loss(logits_NHW, torch.arange(2), edges)
    (each_NHW,) = torch.autograd.grad(loss_N.sum(), logits_NHW, retain_graph=True)
    (weighted_NHW,) = torch.autograd.grad(loss_N, logits_NHW, torch.tensor([3.0, -0.5]))
    torch.testing.assert_close(weighted_NHW, each_NHW * torch.tensor([3.0, -0.5])[:, None, None])


def test_rows_may_come_in_any_order_repeat_or_be_left_out():
    images, valid = _two_tone_photograph()
    edges = _edges(images, [[8, 4, 40, 36], [30, 20, 56, 48], [0, 0, 56, 48]], [0, 1, 1], valid)
    logits = torch.randn(5, 12, 14)
    instance_ids = torch.tensor([2, 0, 2, 2, 0])
    single = [pairwise_loss(logits[n : n + 1], instance_ids[n : n + 1], edges) for n in range(5)]
    torch.testing.assert_close(pairwise_loss(logits, instance_ids, edges), torch.cat(single))


def test_two_instances_that_share_pixels_do_not_touch_each_other():
    boxes = [[4, 4, 28, 28], [12, 12, 36, 36]]
    edges = _edges(_grey(), boxes)
    logits = torch.randn(2, 10, 10)
    for g in range(2):
        alone = pairwise_loss(logits[g : g + 1], torch.tensor([0]), _edges(_grey(), [boxes[g]]))
        torch.testing.assert_close(pairwise_loss(logits, torch.arange(2), edges)[g : g + 1], alone)


def test_filling_the_box_is_not_free():
    """On a flat image only the edges that leave the box disagree: 80 of 128 pairs. Gating both ends would see none."""
    box = [16, 16, 32, 32]
    inside = box_masks(torch.tensor([box]).float(), 12, 12, STRIDE)
    filled = _as_logits(inside)
    edges = _edges(_grey(12, 12), [box])
    one_disagreement = SURE - math.log(2)
    loss = pairwise_loss(filled, torch.tensor([0]), edges).item()
    assert loss == pytest.approx(80 / 128 * one_disagreement, rel=1e-5)
    assert pairwise_loss(-torch.full_like(filled, SURE), torch.tensor([0]), edges).item() < 1e-6

    def always(pixel, other):
        return True

    assert reference.pairwise_loss(filled[0], inside[0], always, dilation=2) == pytest.approx(loss, rel=1e-5)
    assert reference.pairwise_loss(filled[0], inside[0], always, dilation=2, both_ends=True) < 1e-6


def test_object_of_its_own_colour_costs_less_than_its_filled_box():
    images = _grey(12, 12)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    disc = (rows - 6) ** 2 + (columns - 6) ** 2 <= 9
    images[0, 0][disc.repeat_interleave(STRIDE, 0).repeat_interleave(STRIDE, 1)] = 1.0
    box = [12, 12, 40, 40]
    edges = _edges(images, [box])
    filled = _as_logits(box_masks(torch.tensor([box]).float(), 12, 12, STRIDE))
    assert pairwise_loss(_as_logits(disc)[None], torch.tensor([0]), edges).item() < 1e-6
    assert pairwise_loss(filled, torch.tensor([0]), edges).item() > 1


def test_no_instance_gives_an_empty_loss_with_a_gradient_path():
    edges = _edges(_grey(), [])
    logits = torch.zeros(0, 10, 10, requires_grad=True)
    loss_N = pairwise_loss(logits, torch.zeros(0, dtype=torch.long), edges)
    assert loss_N.shape == (0,) and len(edges) == 0 and edges.counts_G.shape == (0,)
    loss_N.sum().backward()
    assert logits.grad.shape == (0, 10, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_logits_give_finite_float32_losses_and_gradients(dtype):
    largest = 1e4 if dtype == torch.float32 else torch.finfo(dtype).max
    edges = _edges(_grey(), [[4, 4, 28, 28], [0, 0, 40, 40]])
    signs = torch.rand(2, 10, 10).round() * 2 - 1
    for logits in (signs, torch.ones_like(signs), -torch.ones_like(signs), signs * torch.rand_like(signs).round()):
        logits = (logits * largest).to(dtype).requires_grad_()
        loss_N = pairwise_loss(logits, torch.arange(2), edges)
        loss_N.sum().backward()
        assert loss_N.dtype == torch.float32 and loss_N.isfinite().all() and (loss_N >= 0).all()
        assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


def test_half_precision_logits_lose_nothing_but_their_own_rounding():
    edges = _edges(_grey(), [[4, 4, 28, 28]])
    logits = (torch.randn(1, 10, 10) * 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        half = pairwise_loss(logits, torch.tensor([0]), edges)
    assert torch.equal(half, pairwise_loss(logits.float(), torch.tensor([0]), edges))


# --- what is refused


def test_mistakes_are_named():
    images, edges = _grey(), _edges(_grey(), [[0, 0, 8, 8]])
    similarity = color_similarity(images, _all_valid(images))
    with pytest.raises(ValueError, match="multiple of the stride 4, got 41 x 40"):
        color_similarity(torch.zeros(1, 3, 41, 40), torch.ones(1, 41, 40))
    with pytest.raises(ValueError, match=r"valid must be \(1, 40, 40\)"):
        color_similarity(images, torch.ones(1, 10, 10))
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        color_similarity(images, _all_valid(images), kernel_size=4)
    with pytest.raises(ValueError, match="threshold must be above 0"):
        pairwise_edges(similarity, torch.zeros(1, 4), torch.tensor([0]), stride=4, threshold=0.0)
    with pytest.raises(ValueError, match="one image id per box"):
        pairwise_edges(similarity, torch.zeros(2, 4), torch.tensor([0]), stride=4)
    with pytest.raises(ValueError, match="half a ring of offsets"):
        pairwise_edges(similarity.repeat(1, 2, 1, 1), torch.zeros(1, 4), torch.tensor([0]), stride=4)
    with pytest.raises(ValueError, match="on the grid of the edges"):
        pairwise_loss(torch.zeros(1, 9, 10), torch.tensor([0]), edges)
    with pytest.raises(ValueError, match="one instance id per mask"):
        pairwise_loss(torch.zeros(2, 10, 10), torch.tensor([0]), edges)

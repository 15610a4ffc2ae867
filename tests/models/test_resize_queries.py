"""More queries for crowded pictures: what was learned stays, and the copies are not the same."""

import pytest
import torch

from factories import tiny_model


def embeddings(model):
    module = model.model.transformer_module
    return module.queries_features.weight.detach(), module.queries_embedder.weight.detach()


def test_learned_queries_stay_and_copies_are_near_but_not_equal():
    model = tiny_model(num_queries=3)
    before = [weight.clone() for weight in embeddings(model)]
    torch.manual_seed(0)
    model.resize_queries(8)
    assert model.config.num_queries == 8
    for old, new in zip(before, embeddings(model), strict=True):
        assert new.shape == (8, 32) and torch.equal(new[:3], old)
        source = old[[0, 1, 2, 0, 1]]  # rows 3 to 7 are copies in turn
        assert (new[3:] - source).std() < old.std() and not torch.equal(new[3:], source)
        assert len(new.unique(dim=0)) == 8
    assert all(weight.requires_grad for name, weight in model.named_parameters() if "queries" in name)


def test_the_larger_network_predicts_takes_prompts_and_is_saved(tmp_path):
    model = tiny_model(num_queries=3).eval()
    model.resize_queries(5)
    images, boxes = torch.randn(2, 3, 64, 64), torch.tensor([[[4.0, 8.0, 40.0, 60.0]]] * 2)
    with torch.no_grad():
        found = model(images, prompt_boxes=boxes)
        assert found.masks_queries_logits.shape == (2, 5, 16, 16) and found.masks_prompts_logits.shape == (2, 1, 16, 16)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()(images, prompt_boxes=boxes)
    torch.testing.assert_close(again.masks_queries_logits, found.masks_queries_logits)


def test_trained_queries_are_not_thrown_away():
    with pytest.raises(ValueError, match="has 3 queries; 2 would"):
        tiny_model(num_queries=3).resize_queries(2)

"""Box prompts: nobody reads them, nothing of one depends on another, and they look inside their box."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from sim_hf.models.sim import load_pretrained_for_classes
from sim_hf.models.sim.box_prompts import SIMBoxPromptEncoder, cells_inside

BOXES = torch.tensor([[[4.0, 8.0, 40.0, 60.0], [20.0, 0.0, 64.0, 33.0]], [[0.0, 0.0, 64.0, 64.0], [50.0, 50.0, 51.0, 51.0]]])


def ask(model, boxes, images=None, **options):
    torch.manual_seed(3)
    images = torch.randn(2, 3, 64, 64) if images is None else images
    with torch.no_grad():
        return model(images, prompt_boxes=boxes, output_auxiliary_logits=True, **options)


def test_learned_queries_do_not_notice_prompts(small_model):
    model = small_model(box_prompts=True)
    without, with_prompts = ask(model, None), ask(model, BOXES)
    assert without.masks_prompts_logits is None and "class_prompts_logits" not in without.auxiliary_logits[0]
    for name in ("class_queries_logits", "masks_queries_logits"):
        torch.testing.assert_close(with_prompts[name], without[name], rtol=1e-4, atol=1e-7)
        for layer, expected in zip(with_prompts.auxiliary_logits, without.auxiliary_logits, strict=True):
            torch.testing.assert_close(layer[name], expected[name], rtol=1e-4, atol=1e-7)


def test_an_answer_does_not_depend_on_other_prompts(small_model):
    model = small_model(box_prompts=True)
    both, second = ask(model, BOXES), ask(model, BOXES[:, 1:])
    assert both.masks_prompts_logits.shape == (2, 2, 16, 16) and both.class_prompts_logits.shape == (2, 2, 4)
    torch.testing.assert_close(both.masks_prompts_logits[:, 1:], second.masks_prompts_logits, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(both.class_prompts_logits[:, 1:], second.class_prompts_logits, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(both.masks_prompts_logits[0, 0], both.masks_prompts_logits[0, 1], rtol=1e-2, atol=0)


def test_a_box_touches_these_cells():
    boxes = torch.tensor([[[4.0, 8.0, 12.0, 16.0], [5.0, 5.0, 5.0, 5.0], [15.0, 0.0, 33.0, 4.0], [40.0, 40.0, 50.0, 50.0]]])
    square, point, wide, outside = cells_inside(boxes, (32, 32), (4, 4))[0].unflatten(-1, (4, 4))
    assert square.nonzero().tolist() == [[1, 0], [1, 1]]
    assert point.nonzero().tolist() == [[0, 0]]
    assert wide.nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]
    assert not outside.any()


def test_a_prompt_looks_inside_its_box_and_where_that_is_empty_at_the_image(small_model):
    decoder = small_model(box_prompts=True).model.transformer_module.decoder
    states, features = torch.randn(9, 1, 32), torch.randn(1, 32, 16, 16)
    valid = torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, :32] = True
    cells = cells_inside(torch.tensor([[[0.0, 0.0, 32.0, 32.0], [0.0, 40.0, 64.0, 64.0]]]), (64, 64), (8, 8))
    region = decoder._region(features, valid, (8, 8))
    allowed = decoder._where_to_look(states, *region, cells)[0, 0].unflatten(-1, (8, 8))
    assert torch.equal(allowed[:7], decoder._where_to_look(states[:7], *region)[0, 0].unflatten(-1, (8, 8)))
    assert allowed[7, :4, :4].any() and not allowed[7, 4:].any() and not allowed[7, :, 4:].any()
    assert allowed[8, :4].all() and not allowed[8, 4:].any()  # its box lies in the padding


def test_a_box_is_encoded_by_its_place_in_the_image_without_the_padding():
    encoder = SIMBoxPromptEncoder(8)
    valid = torch.zeros(1, 64, 64, dtype=torch.bool)
    valid[:, :48, :32] = True
    box = torch.tensor([[[8.0, 12.0, 16.0, 48.0]]])
    torch.testing.assert_close(encoder(box, (64, 64), valid), encoder(box, (48, 32), None))
    content, position = encoder(box, (48, 32), None)
    assert content.shape == position.shape == (1, 1, 8)


def test_the_encoding_is_sines_and_cosines_of_the_sides():
    encoder = SIMBoxPromptEncoder(8)
    torch.nn.init.eye_(encoder.hidden.weight[:, :8])
    with torch.no_grad():
        encoder.hidden.weight.zero_()[0, 1], encoder.hidden.weight[1, 12] = 1.0, 1.0
        encoder.hidden.bias.zero_(), encoder.out.bias.zero_(), encoder.out.weight.zero_()
        encoder.out.weight[0, 0] = encoder.out.weight[1, 1] = 1.0
    content, _ = encoder(torch.tensor([[[8.0, 0.0, 0.0, 16.0]]]), (64, 64), None)
    # Channel 1 is the cosine of the first side, channel 12 (four a side) the sine of the last.
    assert content[0, 0, :2].tolist() == pytest.approx([math.cos(2 * math.pi * 8 / 64), math.sin(2 * math.pi * 16 / 64)])


def test_every_weight_of_the_encoder_learns(small_model):
    model = small_model(box_prompts=True).train()
    output = model(torch.randn(2, 3, 64, 64), prompt_boxes=BOXES, output_auxiliary_logits=True)
    (output.masks_prompts_logits.square().mean() + output.class_prompts_logits.square().mean()).backward()
    encoder = model.model.transformer_module.box_prompt_encoder
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_answers_are_finite(small_model, dtype):
    output = ask(small_model(box_prompts=True).to(dtype), BOXES, torch.randn(2, 3, 64, 64).to(dtype))
    assert output.masks_prompts_logits.isfinite().all() and output.class_prompts_logits.isfinite().all()


def test_a_network_without_prompts_says_so(small_model):
    with pytest.raises(ValueError, match="box_prompts=False"):
        ask(small_model(), BOXES)


def test_prompts_are_saved_loaded_and_added(small_model, tmp_path):
    model = small_model(box_prompts=True)
    model.save_pretrained(tmp_path / "with")
    again, _ = load_pretrained_for_classes(tmp_path / "with", model.config.id2label)
    assert torch.equal(ask(again.eval(), BOXES).masks_prompts_logits, ask(model, BOXES).masks_prompts_logits)
    small_model().save_pretrained(tmp_path / "without")
    added, _ = load_pretrained_for_classes(tmp_path / "without", model.config.id2label, box_prompts=True)
    assert ask(added.eval(), BOXES).masks_prompts_logits.isfinite().all()


def test_a_checkpoint_that_lost_its_prompts_is_refused(small_model, tmp_path):
    model = small_model(box_prompts=True)
    model.save_pretrained(tmp_path)
    weights = {name: tensor for name, tensor in load_file(tmp_path / "model.safetensors").items() if "box_prompt" not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing.*box_prompt_encoder"):
        load_pretrained_for_classes(tmp_path, model.config.id2label)


def test_prompts_can_be_taken_from_a_checkpoint_that_has_them(small_model, tmp_path):
    """As scripts/configs/quality-sim-paper.yaml does with the shipped one; without being asked, nothing may be left over."""
    model = small_model(box_prompts=True)
    model.save_pretrained(tmp_path)
    plain, _ = load_pretrained_for_classes(tmp_path, model.config.id2label, box_prompts=False)
    assert not plain.config.box_prompts and not any("box_prompt_encoder" in name for name in plain.state_dict())
    kept = model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain.state_dict().items())

"""SAM and SAM 2 of transformers, in small and untrained: boxes in, masks out, through the real classes and files."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2Processor,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from factories import make_arguments, save_tiny_model, write_shapes
from sim_hf.cli import main
from sim_hf.data import decode_segmentation, read_image
from sim_hf.promptable_segmenter import PromptableSegmenter, UnavailableError, is_promptable
from sim_hf.training.arguments import parse_arguments
from sim_hf.training.second_phase import NO_MASK, read_masks
from sim_hf.training.trainer import Trainer

SIDE = 64
DECODER = {
    "hidden_size": 32,
    "mlp_dim": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "iou_head_hidden_dim": 32,
    "attention_downsample_rate": 1,
}
BOXES = torch.tensor([[10.0, 10, 40, 40], [5, 5, 20.4, 30], [70, 40, 79, 49]])


def _save_sam(folder):
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIDE,
            patch_size=16,
            output_channels=32,
            global_attn_indexes=[0],
            window_size=2,
            mlp_dim=32,
            num_pos_feats=16,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=32, image_size=SIDE, patch_size=16),
        mask_decoder_config=SamMaskDecoderConfig(**DECODER),
    )
    SamModel(config).save_pretrained(folder)
    SamProcessor(SamImageProcessor(size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE})).save_pretrained(folder)


def _save_sam2(folder):
    backbone = Sam2HieraDetConfig(
        hidden_size=16,
        image_size=[SIDE, SIDE],
        blocks_per_stage=[1, 2, 1, 1],
        embed_dim_per_stage=[16, 32, 64, 128],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 2, 2, 2],
        global_attention_blocks=[2],
        window_positional_embedding_background_size=[4, 4],
        mlp_ratio=2.0,
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    config = Sam2Config(
        vision_config=vision,
        prompt_encoder_config=Sam2PromptEncoderConfig(hidden_size=32, image_size=SIDE, patch_size=16),
        mask_decoder_config=Sam2MaskDecoderConfig(**DECODER),
    )
    Sam2Model(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    Sam2Processor(Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})).save_pretrained(folder)


@pytest.fixture(scope="module", params=[_save_sam, _save_sam2], ids=["sam", "sam2"])
def segmenter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("promptable")
    request.param(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"), empty=(2,))


@pytest.fixture(scope="module")
def picture():
    return Image.effect_noise((80, 50), 90).convert("RGB")


def test_every_box_gets_a_mask_cut_to_it(segmenter, picture):
    found = PromptableSegmenter.from_pretrained(str(segmenter)).masks_for_boxes(picture, BOXES)
    assert found.masks().shape == (3, 50, 80) and found.masks().dtype == torch.bool
    assert [tuple(crop.shape) for crop in found.crops] == [(30, 30), (25, 16), (9, 9)]
    assert found.corners == [(10, 10), (5, 5), (70, 40)]
    assert ((found.confidence_n >= 0) & (found.confidence_n <= 1)).all()


def test_masks_do_not_depend_on_how_many_boxes_are_asked_at_a_time(segmenter, picture):
    together = PromptableSegmenter.from_pretrained(str(segmenter)).masks_for_boxes(picture, BOXES)
    alone = PromptableSegmenter.from_pretrained(str(segmenter))
    alone.boxes_at_a_time = 1
    assert torch.equal(alone.masks_for_boxes(picture, BOXES).masks(), together.masks())


def test_no_box_no_mask(segmenter, picture):
    found = PromptableSegmenter.from_pretrained(str(segmenter)).masks_for_boxes(picture, torch.zeros(0, 4))
    assert len(found) == 0 and found.masks().shape == (0, 50, 80) and len(found.confidence_n) == 0


def test_label_takes_it_as_a_model(segmenter, data, tmp_path, capsys):
    arguments = ["--annotations", str(data / "instances_val.json"), "--images", str(data / "images")]
    assert main(["label", str(segmenter), *arguments, "--output", str(tmp_path / "masks.json")]) == 0
    document = json.loads((tmp_path / "masks.json").read_text())
    assert all(annotation["segmentation"]["counts"] for annotation in document["annotations"] if not annotation["iscrowd"])


def test_it_labels_the_training_images_in_the_teachers_place(segmenter, data, tmp_path):
    start = save_tiny_model(tmp_path / "start")
    options = {"supervision": "sim", "max_steps": 2, "second_phase": 0, "label_model": str(segmenter)}
    trainer = Trainer(make_arguments(data, start, tmp_path / "run", **options))
    trainer.train()
    assert trainer.step.second_phase
    masks = read_masks(tmp_path / "run" / "second_phase", min_confidence=0.0)
    row = trainer.data.train[0]
    assert len(masks[0]) == len(row["objects"]["bbox"])
    (x, y, w, h), mask = row["objects"]["bbox"][0], masks[0][0]
    found = trainer.labeller()(read_image(row["image"]), torch.tensor([[x, y, x + w, y + h]]), [0]).mask(0)
    made = NO_MASK if mask == NO_MASK else decode_segmentation(mask, row["height"], row["width"], annotation_id=0)
    assert (mask == NO_MASK and not found.any()) or torch.equal(torch.from_numpy(made), found)


@pytest.mark.parametrize("options", [[], ["--second_phase", "0", "--supervision", "boxinst"]])
def test_a_label_model_that_would_never_be_asked_is_refused(options, tmp_path):
    with pytest.raises(ValueError, match="--label_model labels for the second phase"):
        parse_arguments(["--data", str(tmp_path), "--label_model", "somebody/sam", *options])


def test_other_models_take_no_boxes(tmp_path):
    folder = save_tiny_model(tmp_path)
    assert not is_promptable(str(folder))
    with pytest.raises(ValueError, match="no promptable segmenter"):
        PromptableSegmenter.from_pretrained(str(folder))


def test_pickled_weights_are_not_read(tmp_path):
    _save_sam(tmp_path)
    model = SamModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnavailableError, match="safetensors"):
        PromptableSegmenter.from_pretrained(str(tmp_path))


def test_weights_that_cannot_be_had_are_said_by_name():
    with pytest.raises(UnavailableError, match="somebody/sam-of-the-future"):
        PromptableSegmenter.from_pretrained("somebody/sam-of-the-future")

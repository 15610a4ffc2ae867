"""transformers' ModelTesterMixin on our models: what every model of the library has to be able to do."""

import unittest
from unittest import mock

import suite
import torch
from transformers import SwinConfig

from sim_hf.models.sim import SIMConfig, SIMForInstanceSegmentation, SIMModel, strict_loading

common = suite.load("test_modeling_common")

STAGES = ["stage1", "stage2", "stage3", "stage4"]


class SIMModelTester:
    """A Swin backbone: it has all that the tests ask for, attention weights and names that differ on disk."""

    batch_size = 2
    is_training = False  # the loss lives in the training step: these tests would call the model with labels
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 32
    image_size = 64
    seq_length = 7

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        backbone = SwinConfig(
            image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, out_features=STAGES
        )
        return SIMConfig(
            backbone_config=backbone,
            feature_size=32,
            mask_feature_size=32,
            hidden_dim=32,
            encoder_layers=2,
            decoder_layers=3,
            num_attention_heads=2,
            encoder_feedforward_dim=48,
            dim_feedforward=48,
            num_queries=7,
            num_labels=3,
            box_prompts=True,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_mask = torch.ones(self.batch_size, 64, 96, dtype=torch.long)
        pixel_mask[1, 50:] = 0
        return self.get_config(), {"pixel_values": suite.floats(self.batch_size, 3, 64, 96), "pixel_mask": pixel_mask}


class SIMModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SIMModel, SIMForInstanceSegmentation)
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False  # no vocabulary
    # The mixin reads `outputs.attentions` as one stack of encoder layers; ours are the decoder's, tested in tests/models.
    has_attentions = False

    def setUp(self):
        self.model_tester = SIMModelTester(self)

    @unittest.skip("pixels have no embeddings")
    def test_model_get_set_embeddings(self):
        pass

    # These load checkpoints that lack weights, which ours refuse (tests/models/test_strict_loading.py). What transformers then
    # makes of the rest must be right all the same.

    def test_correct_missing_keys(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_correct_missing_keys()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_can_init_all_missing_weights()

    # The next two ask for `hidden_states`; Mask2Former has three kinds of them, under three names.

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for where in ("argument", "config"):
                config.output_hidden_states = where == "config"
                options = {"output_hidden_states": True} if where == "argument" else {}
                with torch.no_grad():
                    outputs = model_class(config).eval()(**inputs, **options)
                strides = [64 // states.shape[-2] for states in outputs.encoder_hidden_states]
                self.assertEqual(strides, [4, 8, 16, 32])
                self.assertEqual([64 // states.shape[-2] for states in outputs.pixel_decoder_hidden_states], [32, 16, 8])
                self.assertEqual(len(outputs.transformer_decoder_hidden_states), config.decoder_layers)

    def test_retain_grad_hidden_states_attentions(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            outputs = model_class(config)(**inputs, output_hidden_states=True)
            kept = [
                outputs.encoder_hidden_states[0],
                outputs.pixel_decoder_hidden_states[0],
                outputs.transformer_decoder_hidden_states[1],
            ]
            for states in kept:
                states.retain_grad()
            masks = outputs.masks_queries_logits
            (masks if isinstance(masks, torch.Tensor) else masks[-1]).flatten()[0].backward()
            self.assertTrue(all(states.grad is not None for states in kept))

"""transformers' ModelTesterMixin and ConfigTester on CondInst."""

import unittest
from unittest import mock

import pytest
import suite
import torch
from transformers import ResNetConfig

from sim_hf.models.condinst import CondInstConfig, CondInstForInstanceSegmentation, CondInstModel
from sim_hf.models.sim import strict_loading

common = suite.load("test_modeling_common")
configurations = suite.load("test_configuration_common")

STRIDES = [8, 16, 32, 64]


class CondInstConfigTest(unittest.TestCase):
    def test_config(self):
        configurations.ConfigTester(
            self, config_class=CondInstConfig, has_text_modality=False, feature_size=32, mask_channels=4
        ).run_common_tests()


class CondInstModelTester:
    batch_size = 2
    is_training = False  # the loss lives in the training step: these tests would call the model with labels
    num_hidden_layers = 1
    hidden_size = 32
    image_size = 128
    seq_length = 7

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        backbone = ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 12, 16, 24],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        )
        return CondInstConfig(
            backbone_config=backbone,
            feature_size=32,
            num_tower_layers=1,
            mask_feature_size=16,
            num_mask_layers=1,
            num_labels=3,
            score_threshold=0.0,  # an untrained network is sure of nothing
            max_detections=5,
        )

    def prepare_config_and_inputs_for_common(self):
        pixel_mask = torch.ones(self.batch_size, 128, 96, dtype=torch.long)
        pixel_mask[1, 100:] = 0
        return self.get_config(), {"pixel_values": suite.floats(self.batch_size, 3, 128, 96), "pixel_mask": pixel_mask}


@pytest.mark.e2e  # half a minute
class CondInstModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CondInstModel, CondInstForInstanceSegmentation)
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False  # no vocabulary
    has_attentions = False

    def setUp(self):
        self.model_tester = CondInstModelTester(self)

    @unittest.skip("pixels have no embeddings")
    def test_model_get_set_embeddings(self):
        pass

    # As for SIM: what transformers makes of checkpoints that lack weights, which ours refuse.

    def test_correct_missing_keys(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_correct_missing_keys()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_model_weights_reload_no_missing_tied_weights()

    def test_can_init_all_missing_weights(self):
        with mock.patch.object(strict_loading, "require_complete"):
            super().test_can_init_all_missing_weights()

    # The next two take hidden states for those of a stack of layers; here they are the levels of the pyramid.

    def test_hidden_states_output(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for where in ("argument", "config"):
                config.output_hidden_states = where == "config"
                options = {"output_hidden_states": True} if where == "argument" else {}
                with torch.no_grad():
                    outputs = model_class(config).eval()(**inputs, **options)
                self.assertEqual([128 // states.shape[-2] for states in outputs.hidden_states[:4]], STRIDES)

    def test_retain_grad_hidden_states_attentions(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = CondInstForInstanceSegmentation(config)(**inputs, output_hidden_states=True)
        for states in outputs.hidden_states:
            states.retain_grad()
        (outputs.masks_queries_logits.sum() + outputs.class_logits.sum()).backward()
        self.assertTrue(all(states.grad is not None for states in outputs.hidden_states))

"""transformers' ConfigTester on our configuration."""

import unittest

import suite

from sim_hf.models.sim import SIMConfig

common = suite.load("test_configuration_common")


class SIMConfigTest(unittest.TestCase):
    def test_config(self):
        common.ConfigTester(
            self, config_class=SIMConfig, has_text_modality=False, hidden_dim=32, num_queries=7
        ).run_common_tests()

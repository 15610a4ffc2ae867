"""What the fuzzers found, each as a test of its own; and that they run."""

import pytest
from hypothesis import HealthCheck, given, settings
from mutation import mutated
from targets import SEEDS, SPACE_TARGETS, TARGETS, ready

FOUND = {
    # Errors of other types than a command turns into one line.
    "config that is no mapping where one belongs": ("config", b'{"model_type": "sim", "backbone_config": true}'),
    "config with a truth value for names": ("config", b'{"model_type": "sim", "id2label": true}'),
    "config that is a list": ("config", b"[1]"),
    "config that is a number": ("config", b"2"),
    "config with a number for the type of the weights": ("config", b'{"model_type": "sim", "dtype": 1e308}'),
    "config with a number for its pipelines": ("config", b'{"model_type": "sim", "custom_pipelines": 3}'),
    "preprocessing that is a text": ("processor", b'"a"'),
    "preprocessing without a size": ("processor", b'{"size": null}'),
    "preprocessing with a truth value for a size": ("processor", b'{"size": [true, 2]}'),
    "preprocessing with an unknown filter": ("processor", b'{"size": {"longest_edge": 64}, "resample": -1}'),
    "preprocessing with a text for a number": ("processor", b'{"size": {"longest_edge": 64}, "size_divisor": "x"}'),
    "preprocessing with half a pixel to round to": ("processor", b'{"size": {"longest_edge": 64}, "size_divisor": 0.5}'),
    "preprocessing with a truth value for a stride": ("processor", b'{"size": {"longest_edge": 64}, "mask_stride": true}'),
    "preprocessing with a text for a sigma": ("processor", b'{"size": {"longest_edge": 64}, "soft_nms_sigma": "x"}'),
    "preprocessing with a text for a gap": ("processor", b'{"size": {"longest_edge": 64}, "max_part_gap": "x"}'),
    "preprocessing that is a text of brackets": ("processor", b'"}}{{:"'),
    "preprocessing with no number for a mean": ("processor", b'{"size": {"longest_edge": 64}, "image_mean": {}}'),
    "manifest that is written another way": ("checkpoint", b"{ }"),
    "options by a truth value": ("options", b"no: 1\nlearning_rates: 2"),
    "options in a list": ("options", b"[max_steps]"),
    "options in a text": ("options", b"max_steps"),
    "options that are nested without end": ("options", b"[" * 2000),
    "weights without a header": ("weights", b""),
    "weights whose places leave a hole": (
        "weights",
        SEEDS["weights"][0].replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
    ),
}


@pytest.mark.parametrize(("target", "data"), FOUND.values(), ids=FOUND)
def test_what_was_found_is_mended(target, data):
    TARGETS[target](data)


@pytest.mark.parametrize("name", [*TARGETS, *(pytest.param(name, marks=pytest.mark.e2e) for name in SPACE_TARGETS)])
def test_a_few_mutations(name):
    with ready(name) as target:

        @settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(mutated(SEEDS[name]))
        def attack(data):
            target(data)

        attack()

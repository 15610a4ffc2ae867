"""What the fuzzers found, each as a test of its own; and that they run."""

import pytest
from hypothesis import HealthCheck, given, settings
from mutation import mutated
from targets import SEEDS, TARGETS

FOUND = {
    # Errors of other types than a command turns into one line.
    "config that is no mapping where one belongs": ("config", b'{"model_type": "sim", "backbone_config": true}'),
    "config with a truth value for names": ("config", b'{"model_type": "sim", "id2label": true}'),
    "config that is a list": ("config", b"[1]"),
    "manifest that is written another way": ("checkpoint", b"{ }"),
}


@pytest.mark.parametrize(("target", "data"), FOUND.values(), ids=FOUND)
def test_what_was_found_is_mended(target, data):
    TARGETS[target](data)


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_mutations(name):
    @settings(max_examples=8, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(mutated(SEEDS[name]))
    def target(data):
        TARGETS[name](data)

    target()

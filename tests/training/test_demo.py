"""What the demo chooses for a start; its runs are in tests/e2e."""

from factories import NAMES, save_tiny_model, write_shapes
from sim_hf.demo import _learning_rate
from sim_hf.training.arguments import DataArguments, ModelArguments


def test_a_start_that_knows_all_classes_is_only_refined(tmp_path):
    data = DataArguments(data=[str(write_shapes(tmp_path / "shapes"))])
    names = dict(enumerate([*NAMES[:-1], "comet"]))
    starts = {
        "all": save_tiny_model(tmp_path / "all"),
        "upper": save_tiny_model(tmp_path / "upper", id2label={label: name.upper() for label, name in enumerate(NAMES)}),
        "some": save_tiny_model(tmp_path / "some", id2label=names),
    }
    rates = {name: _learning_rate(ModelArguments(model=str(start)), data) for name, start in starts.items()}
    assert rates == {"all": 5e-5, "upper": 5e-5, "some": 1.5e-4}
    assert _learning_rate(ModelArguments(), data) == 5e-4

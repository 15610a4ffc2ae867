"""The inference network compiled, exported and as an ONNX file: the same numbers."""

import numpy as np
import pytest
import torch

from factories import save_tiny_condinst, save_tiny_model, tiny_model
from sim_hf.cli import main
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.onnx_export import OUTPUTS, export_program


@pytest.fixture(scope="module")
def batches():
    """Of one and of several images, of several sizes, with and without padding."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for count, height, width, rows, columns in ((1, 64, 96, 64, 96), (3, 64, 96, 40, 70), (2, 128, 64, 100, 64)):
        pixel_mask = torch.ones(count, height, width, dtype=torch.int64)
        pixel_mask[-1, rows:], pixel_mask[-1, :, columns:] = 0, 0
        made.append((torch.randn(count, 3, height, width, generator=generator), pixel_mask))
    return made


def expected_outputs(model, inputs):
    with torch.no_grad():
        outputs = model(*inputs)
    return [outputs[name] for name in OUTPUTS]


def test_the_network_compiles_into_one_graph(batches):
    model, inputs = tiny_model().eval(), batches[1]
    expected = expected_outputs(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for found, number in zip(expected_outputs(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-4)


@pytest.mark.e2e
def test_the_exported_program_gives_the_same_for_any_number_and_size_of_images(batches):
    model = tiny_model().eval()
    program = export_program(model).module()
    for batch in batches:
        for found, number in zip(program(*batch), expected_outputs(model, batch), strict=True):
            torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-4)


@pytest.mark.e2e
def test_a_network_of_windows_is_exported_for_one_size(batches):
    model = tiny_model("swin").eval()
    program = export_program(model, (64, 96)).module()
    for batch in batches[:2]:
        for found, number in zip(program(*batch), expected_outputs(model, batch), strict=True):
            torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-4)


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 50"):
        export_program(tiny_model(), (64, 50))


def test_a_network_of_windows_needs_a_size():
    with pytest.raises(ValueError, match="give the size"):
        export_program(tiny_model("swin"))


def test_a_network_whose_outputs_have_no_known_size_is_refused_with_the_reason(tmp_path, capsys):
    model = save_tiny_condinst(tmp_path / "model")
    assert main(["export", str(model), "--output", str(tmp_path / "model.onnx")]) == 2
    message = capsys.readouterr().err
    assert "CondInstForInstanceSegmentation cannot be exported: how many instances it finds depends on the picture" in message
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.e2e
@pytest.mark.parametrize("size", [["--size", "64", "96"], pytest.param([], marks=pytest.mark.e2e)], ids=["one size", "any size"])
def test_the_onnx_file_gives_the_masks_of_the_network(tmp_path, batches, size):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    save_tiny_model(tmp_path / "model", decoder_layers=2)
    path = tmp_path / "exported" / "model.onnx"
    assert main(["export", str(tmp_path / "model"), "--output", str(path), *size]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]  # the weights are in it
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixel_values", "pixel_mask"]
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)

    model = SIMForInstanceSegmentation.from_pretrained(tmp_path / "model")
    for batch in batches[:2] if size else batches:
        found = session.run(None, {"pixel_values": batch[0].numpy(), "pixel_mask": batch[1].numpy()})
        for array, number in zip(found, expected_outputs(model, batch), strict=True):
            np.testing.assert_allclose(array, number.numpy(), rtol=1e-4, atol=1e-4)

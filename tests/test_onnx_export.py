"""The inference network compiled, exported and as an ONNX file: the same numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from factories import save_tiny_model, tiny_model, tiny_processor
from sim_hf.cli import main
from sim_hf.models.sim import SIMForInstanceSegmentation, SIMImageProcessor
from sim_hf.onnx_export import OUTPUTS, export_program, input_size

SIZE = (64, 96)


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    pixel_mask = torch.ones(3, *SIZE, dtype=torch.int64)
    pixel_mask[0, 40:], pixel_mask[2, :, 50:] = 0, 0
    return torch.randn(3, 3, *SIZE, generator=generator), pixel_mask


def expected_outputs(model, inputs):
    with torch.no_grad():
        outputs = model(*inputs)
    return [outputs[name] for name in OUTPUTS]


def test_the_network_compiles_into_one_graph(inputs):
    model = tiny_model().eval()
    expected = expected_outputs(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for found, number in zip(expected_outputs(compiled, inputs), expected, strict=True):
        torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["resnet", "swin"])
def test_the_exported_program_gives_the_same_for_any_number_of_images(inputs, backbone):
    model = tiny_model(backbone).eval()
    program = export_program(model, SIZE).module()
    for count in (1, 3):
        batch = [x[:count] for x in inputs]
        for found, number in zip(program(*batch), expected_outputs(model, batch), strict=True):
            torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-4)


def test_the_onnx_file_gives_the_masks_of_the_network(tmp_path, inputs):
    runtime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    save_tiny_model(tmp_path / "model")
    path = tmp_path / "exported" / "model.onnx"
    assert main(["export", str(tmp_path / "model"), "--output", str(path), "--width", "96"]) == 0
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]  # the weights are in it
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["pixel_values", "pixel_mask"]
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS)

    model = SIMForInstanceSegmentation.from_pretrained(tmp_path / "model")
    for count in (1, 3):
        batch = [x[:count] for x in inputs]
        found = session.run(None, {"pixel_values": batch[0].numpy(), "pixel_mask": batch[1].numpy()})
        for array, number in zip(found, expected_outputs(model, batch), strict=True):
            np.testing.assert_allclose(array, number.numpy(), rtol=1e-4, atol=1e-4)


def test_every_resized_image_fits_into_the_default_size():
    assert input_size(tiny_processor()) == (64, 64)
    assert input_size(SIMImageProcessor(size={"shortest_edge": 800, "longest_edge": 1333})) == (1344, 1344)
    assert input_size(SIMImageProcessor(size={"height": 100, "width": 65})) == (128, 96)
    processor = SIMImageProcessor(size={"longest_edge": 250})
    height, width = input_size(processor)
    padded = processor([Image.new("RGB", size) for size in ((300, 200), (90, 400))], return_tensors="pt")["pixel_values"].shape
    assert padded[2] <= height and padded[3] <= width
    with pytest.raises(ValueError, match="no limit"):
        input_size(SIMImageProcessor(size={"shortest_edge": 100}))


def test_a_size_that_the_strides_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="multiples of 32, got 64 x 50"):
        export_program(tiny_model(), (64, 50))

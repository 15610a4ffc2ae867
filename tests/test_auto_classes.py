"""What a fresh process finds: with the package, with only transformers and the model's own code, and what an import costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from factories import tiny_model, tiny_processor
from sim_hf import InstanceSegmentationPipeline
from sim_hf.models.sim import save_with_code

# A process in which the package, and what a ResNet model does not need, cannot be imported.
ONLY_TRANSFORMERS = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("sim_hf", "timm", "pycocotools", "datasets")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""

# Everything that somebody does with a folder; {trust} is how the calls say that they trust its code.
USE = """
import json, torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageSegmentation,
    AutoModelForInstanceSegmentation, AutoModelForUniversalSegmentation, pipeline)
trust = {trust}
for folder, result in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    picture = Image.open(folder + "/../picture.png")
    config = AutoConfig.from_pretrained(folder, **trust)
    processor = AutoImageProcessor.from_pretrained(folder, **trust)
    inputs = processor(picture, return_tensors="pt")
    classes, tensors = {{}}, {{}}
    for auto in (AutoModelForInstanceSegmentation, AutoModelForUniversalSegmentation, AutoModelForImageSegmentation, AutoModel):
        model = auto.from_pretrained(folder, **trust).eval()
        classes[auto.__name__] = type(model).__module__.split(".")[0] + ":" + type(model).__name__
        with torch.no_grad():
            outputs = model(**inputs)
        tensors[auto.__name__] = outputs.pixel_decoder_last_hidden_state.contiguous()
        if auto is not AutoModel:
            tensors[auto.__name__ + ".masks"] = outputs.masks_queries_logits.contiguous()
    segmenter = pipeline("instance-segmentation", model=folder, device="cpu", **trust)
    objects = segmenter(picture, threshold=0.05)
    tensors["pipeline.masks"] = torch.stack([torch.from_numpy(found["mask"]) for found in objects])
    plain = pipeline("image-segmentation", model=folder, device="cpu", **trust)
    classes["image-segmentation"] = type(plain).__name__
    plain(picture, threshold=0.05)
    save_file(tensors, result + ".safetensors")
    facts = {{"classes": classes, "labels": [found["label"] for found in objects],
        "scores": [found["score"] for found in objects], "pipeline": type(segmenter).__module__.split(".")[0]}}
    open(result + ".json", "w").write(json.dumps(facts))
"""


def run_fresh(code: str, *arguments, tmp_path: Path) -> str:
    """Standard output and error of a new process, which nobody can answer."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"},
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise AssertionError(process.stdout + process.stderr)
    return process.stdout + process.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model saved plainly, and with its code; a picture; and what this process makes of them."""
    root = tmp_path_factory.mktemp("models")
    picture = Image.new("RGB", (70, 50), (60, 90, 120))
    ImageDraw.Draw(picture).ellipse((10, 8, 40, 42), fill=(230, 180, 60))
    picture.save(root / "picture.png")
    torch.manual_seed(0)
    model, processor = tiny_model().eval(), tiny_processor()
    model.save_pretrained(root / "plain")
    processor.save_pretrained(root / "plain")
    save_with_code(root / "code", model, processor, pipelines={"instance-segmentation": InstanceSegmentationPipeline})
    with torch.no_grad():
        outputs = model(**processor(picture, return_tensors="pt"))
    return root, outputs


def assert_same(root: Path, result: Path, outputs, home: str) -> dict:
    facts, tensors = json.loads(result.with_suffix(".json").read_text()), load_file(result.with_suffix(".safetensors"))
    for auto in ("AutoModelForInstanceSegmentation", "AutoModelForUniversalSegmentation", "AutoModelForImageSegmentation"):
        assert facts["classes"][auto] == f"{home}:SIMForInstanceSegmentation"
        assert torch.equal(tensors[f"{auto}.masks"], outputs.masks_queries_logits)
    assert facts["classes"]["AutoModel"] == f"{home}:SIMModel"
    assert torch.equal(tensors["AutoModel"], outputs.mask_features)
    assert facts["pipeline"] == home
    segmenter = InstanceSegmentationPipeline(
        tiny_model_of(root / "plain"), image_processor=tiny_processor(), task="instance-segmentation", device="cpu"
    )
    expected = segmenter(root / "picture.png", threshold=0.05)
    assert expected and facts["labels"] == [found["label"] for found in expected]
    assert facts["scores"] == pytest.approx([found["score"] for found in expected])
    masks = torch.stack([torch.from_numpy(found["mask"]) for found in expected])
    assert torch.equal(tensors["pipeline.masks"].bool(), masks)
    return facts


def tiny_model_of(folder: Path):
    return type(tiny_model()).from_pretrained(folder)


def test_models_with_and_without_code_load_where_the_package_is_and_nobody_is_asked(folders, tmp_path):
    root, outputs = folders
    imports = (
        "import sys, sim_hf\n"
        "late = ('datasets', 'pyarrow', 'pandas', 'pycocotools', 'faster_coco_eval', 'tensorboard', 'gradio', 'onnx')\n"
        "assert not [name for name in late if name in sys.modules]\n"
        "assert set(sim_hf.__all__) <= set(dir(sim_hf))\n"
        "assert sim_hf.load_coco.__module__ == 'sim_hf.data.coco'\n"
    )
    code = imports + USE.format(trust="{}")
    said = run_fresh(code, root / "plain", tmp_path / "plain", root / "code", tmp_path / "code", tmp_path=tmp_path)
    for name in ("plain", "code"):
        facts = assert_same(root, tmp_path / name, outputs, "sim_hf")
        assert facts["classes"]["image-segmentation"] == "DefaultThresholdImageSegmentationPipeline"
    assert "not supported" not in said and "run the custom code" not in said and "rror" not in said


def test_a_model_with_code_loads_where_only_transformers_is_if_it_is_trusted(folders, tmp_path):
    root, outputs = folders
    untrusted = (
        "from transformers import AutoModelForInstanceSegmentation\n"
        "try:\n    AutoModelForInstanceSegmentation.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "except ValueError as refusal:\n    print('refused:', refusal)\n"
    )
    hidden = "try:\n    import sim_hf\nexcept ImportError:\n    print('hidden')\n"
    code = ONLY_TRANSFORMERS + hidden + untrusted + USE.format(trust='{"trust_remote_code": True}')
    said = run_fresh(code, root / "code", tmp_path / "result", tmp_path=tmp_path)
    assert_same(root, tmp_path / "result", outputs, "transformers_modules")
    assert "hidden" in said and "refused:" in said and "trust_remote_code=True" in said
    assert "not supported" not in said and "run the custom code" not in said


def test_the_folder_with_code_holds_the_code_and_nothing_else(folders):
    root, _ = folders
    names = {path.name for path in (root / "code").iterdir()}
    assert names - {path.name for path in (root / "plain").iterdir()} == {
        *("configuration_sim.py", "modeling_sim.py", "image_processing_sim.py", "pipeline.py", "backbone.py"),
        "backbone_config.py",
        *("box_prompts.py", "deformable_attention.py", "deformable_attention_triton.py", "depthwise_convolution.py"),
        *("frozen_batch_norm.py", "group_norm.py"),
        *(
            "instance_postprocessing.py",
            "mask_parts.py",
            "masked_attention.py",
            "padding.py",
            "pixel_decoder.py",
            "strict_loading.py",
        ),
        "two_step_resizing.py",
    }
    config = json.loads((root / "code" / "config.json").read_text())
    assert {name.partition(".")[0] + ".py" for name in config["auto_map"].values()} <= names


def test_saving_with_code_leaves_the_model_as_it_was(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    save_with_code(tmp_path / "code", model, processor)
    assert (
        not {"auto_map", "custom_pipelines"} & set(model.config.to_dict()) and processor.to_dict() == tiny_processor().to_dict()
    )
    model.save_pretrained(tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == ["config.json", "model.safetensors"]


def test_a_name_that_the_package_has_not_is_an_attribute_error():
    import sim_hf

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sim_hf.nothing

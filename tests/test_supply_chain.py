"""Nobody is let in: no pickle and no code of others is read by default, versions are pinned, secrets stay at home."""

import ast
import re
from pathlib import Path

import pytest
import torch

from factories import make_arguments, save_tiny_model, tiny_model, tiny_processor, write_shapes
from sim_hf.cli import main
from sim_hf.evaluation.results import typed_command
from sim_hf.models.sim import SIMForInstanceSegmentation
from sim_hf.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
PROGRAMS = [path for folder in ("src", "scripts", "spaces", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
SECRET = "hf_" + "aB3dE5" * 6

# Calls that read or write pickles or run text, and the argument that makes one harmless.
DANGEROUS = {
    "pickle.load": "", "pickle.loads": "", "pickle.dump": "", "torch.load": "weights_only=True", "torch.save": "", "eval": "",
    "exec": "", "yaml.load": "Loader=yaml.BaseLoader", "yaml.unsafe_load": "", "np.load": "", "os.system": "", "joblib.load": "",
}  # fmt: skip


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_program_reads_a_pickle_or_trusts_code_of_others(path):
    for name, call in calls(path):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        given = [f"{argument}={value}" for argument, value in keywords.items()]
        assert name not in DANGEROUS or DANGEROUS[name] in given, f"{name}: {call.lineno}"
        assert keywords.get("trust_remote_code", "False") == "False", call.lineno
        assert keywords.get("use_safetensors", "True") == "True", call.lineno
        assert keywords.get("shell", "False") == "False", call.lineno


def test_every_exception_from_the_security_rules_has_a_reason():
    for path in PROGRAMS:
        for line in path.read_text(encoding="utf-8").splitlines():
            if found := re.search(r"# noqa: [^#]*\bS\d{3}(.*)", line):
                assert re.search(r"- \w+", found[1]), f"{path.relative_to(ROOT)}: {line.strip()}"


def test_every_package_is_pinned_and_comes_from_an_index():
    lines = [line.strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 50
    assert [line for line in packages if not re.fullmatch(r"[A-Za-z0-9._\[\]-]+==[A-Za-z0-9.+!]+( ;.*)?", line)] == []


def test_pickled_weights_are_not_read_unless_asked_for(tmp_path):
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        SIMForInstanceSegmentation.from_pretrained(tmp_path)
    SIMForInstanceSegmentation.from_pretrained(tmp_path, use_safetensors=False)


def test_a_token_of_the_environment_is_nowhere_in_a_run(tmp_path, monkeypatch, capsys, caplog):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    data, model = write_shapes(tmp_path / "data", num_train=2, num_val=1), save_tiny_model(tmp_path / "model")
    Trainer(make_arguments(data, model, tmp_path / "run", max_steps=1, report_to=["tensorboard"])).train()
    assert main(["predict", str(tmp_path / "nowhere"), str(data / "images"), "--output", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert SECRET not in output.out + output.err + caplog.text
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        (["sim-hf", "push", "--token", SECRET], "sim-hf push --token '***'"),
        (["sim-hf", "push", f"--token={SECRET}"], "sim-hf push '--token=***'"),
        (["sim-hf", "predict", "https://a.b/c.jpg?size=1&token=abc"], "sim-hf predict 'https://a.b/c.jpg?***'"),
        (["sim-hf", "predict", "https://ann:geheim@a.b/c.jpg"], "sim-hf predict 'https://***@a.b/c.jpg'"),
        (["sim-hf", "train", "--data", f"a{SECRET}"], "sim-hf train --data 'a***'"),
        (["sim-hf", "train", "--seed", "3"], "sim-hf train --seed 3"),
    ],
)
def test_the_command_in_the_results_holds_no_secret(typed, kept):
    assert typed_command(typed, ["python", *typed]) == kept

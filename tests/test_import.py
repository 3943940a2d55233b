"""`import lgvit_hf` is cheap, quiet, and enough for the Auto classes; each case is a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lgvit_hf
from tests.tiny import KINDS, tiny_images, tiny_model

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (
    "datasets evaluate accelerate sklearn scipy pandas matplotlib onnx onnxruntime onnxscript optimum fastapi".split()
)


def fresh_process(code, *arguments):
    """What `code` prints, as JSON."""
    command = [sys.executable, "-c", f"import json, sys\n{code}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


TIMED = """
import logging, time
import torch, transformers
before = set(sys.modules)
quiet = (logging.root.handlers[:], logging.root.level, transformers.utils.logging.get_verbosity())
start = time.perf_counter()
import lgvit_hf
seconds = time.perf_counter() - start
after = (logging.root.handlers[:], logging.root.level, transformers.utils.logging.get_verbosity())
new = sorted({name.split(".")[0] for name in set(sys.modules) - before})
print(json.dumps([seconds, new, quiet == after]))
"""


def test_import_is_cheap_and_quiet():
    # the best of three, for the machine may be busy
    for _ in range(3):
        seconds, modules, quiet = fresh_process(TIMED)
        assert "lgvit_hf" in modules and not set(modules) & set(OPTIONAL)
        assert quiet, "importing must not touch logging"
        if seconds < 0.3:
            return
    pytest.fail(f"import lgvit_hf takes {seconds:.2f} s")


def test_models_need_no_optional_package():
    code = f"""
sys.modules.update(dict.fromkeys({OPTIONAL}))  # none of them can be imported
from lgvit_hf import ViTHighway, ViTHighwayConfig
import torch
small = dict(hidden_size=24, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2)
model = ViTHighway(ViTHighwayConfig(**small, image_size=16, patch_size=4)).eval()
print(json.dumps(list(model(torch.zeros(1, 3, 16, 16)).logits.shape)))
"""
    assert fresh_process(code) == [1, 2]


@pytest.mark.parametrize("name", lgvit_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(lgvit_hf, name) is not None and name in dir(lgvit_hf)


def test_unknown_name():
    with pytest.raises(AttributeError, match="lgvit_hf.*'Highway'"):
        lgvit_hf.Highway  # noqa: B018


# the third order, models first asked for after us, is that of `test_saved_models_answer_alike_in_a_fresh_process`
ORDERS = {
    "before": "from transformers import AutoConfig\nimport lgvit_hf",
    "after": "import lgvit_hf\nfrom transformers import AutoConfig",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_config_knows_the_model_types(order):
    code = f"""
{ORDERS[order]}
kinds = ["vit_highway", "deit_highway", "swin_highway"]
print(json.dumps([type(AutoConfig.for_model(kind)).__name__ for kind in kinds]))
"""
    assert fresh_process(code) == ["ViTHighwayConfig", "DeiTHighwayConfig", "SwinHighwayConfig"]


@torch.no_grad()
def test_saved_models_answer_alike_in_a_fresh_process(tmp_path):
    images = tiny_images(5)
    save_file({"images": images}, tmp_path / "images.safetensors")
    expected = {}
    for kind in KINDS:
        model = tiny_model(kind)
        model.set_exit_policy("confidence", threshold=0.7)
        model.save_pretrained(tmp_path / kind)
        out = model(images)
        expected[kind] = [type(model).__name__, out.exit_layer.tolist(), out.logits.tolist()]
    code = """
import lgvit_hf, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
folder, *kinds = sys.argv[1:]
images = load_file(f"{folder}/images.safetensors")["images"]
answers = {}
for kind in kinds:
    model = AutoModelForImageClassification.from_pretrained(f"{folder}/{kind}").eval()
    with torch.no_grad():
        out = model(images)
    answers[kind] = [type(model).__name__, out.exit_layer.tolist(), out.logits.tolist()]
print(json.dumps(answers))
"""
    answers = fresh_process(code, tmp_path, *KINDS)
    for kind, (name, depths, logits) in expected.items():
        assert answers[kind][:2] == [name, depths]
        torch.testing.assert_close(torch.tensor(answers[kind][2]), torch.tensor(logits), rtol=1e-5, atol=1e-6)


PLUGIN = ROOT / "lgvit_hf/export/optimum_plugin/optimum/commands/register/register_lgvit.py"


def test_optimum_cli_pays_only_where_it_opens_models():
    code = """
import runpy
loaded = []
for command in (["--help"], ["env"], [], ["env", "export"], ["export", "onnx"], ["onnxruntime"]):
    sys.argv = ["optimum-cli", *command]
    before = set(sys.modules)
    assert runpy.run_path(sys.argv_of_test)["REGISTER_COMMANDS"] == []
    new = set(sys.modules) - before
    loaded.append(["lgvit_hf" in new, "torch" in new or "transformers" in new or "optimum" in new])
    for name in [name for name in sys.modules if name.split(".")[0] == "lgvit_hf"]:
        del sys.modules[name]
print(json.dumps(loaded))
"""
    found = fresh_process(code.replace("sys.argv_of_test", repr(str(PLUGIN))))
    assert found == 4 * [[False, False]] + 2 * [[True, False]]


def test_plugin_leaves_optimum_a_namespace():
    assert not list(PLUGIN.parents[3].rglob("__init__.py")), "Optimum could not be imported beside it"


def test_an_optimum_that_we_do_not_fit_goes_on(tmp_path):
    module = tmp_path / "optimum/exporters/onnx/model_configs.py"
    module.parent.mkdir(parents=True)
    for package in module.parents[:3]:
        (package / "__init__.py").touch()
    module.write_text("ANSWER = 42")
    code = """
import warnings
sys.path.insert(0, sys.argv[1])
import lgvit_hf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from optimum.exporters.onnx.model_configs import ANSWER
print(json.dumps([ANSWER, [str(warning.message) for warning in caught if "highways" in str(warning.message)]]))
"""
    answer, messages = fresh_process(code, tmp_path)
    assert answer == 42 and len(messages) == 1 and "does not export highways" in messages[0]

"""`import lgvit_hf` is cheap, quiet, and enough for the Auto classes; most cases are processes of their own."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lgvit_hf
from tests.clear import clear_model
from tests.tiny import KINDS

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = [
    *"datasets evaluate accelerate sklearn scipy pandas matplotlib".split(),
    *"onnx onnxruntime onnxscript optimum starlette uvicorn".split(),
]


def fresh_process(code, *arguments):
    """What `code` prints, as JSON."""
    command = [sys.executable, "-c", f"import json, sys\n{code}", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


BARE = """
import logging
before, root = set(sys.modules), (logging.root.handlers[:], logging.root.level)
import lgvit_hf
new = set(sys.modules) - before
foreign = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names)
ours = sorted(name for name in new if name.startswith("lgvit_hf"))
print(json.dumps([sorted(foreign), ours, root == (logging.root.handlers[:], logging.root.level)]))
"""


def test_import_is_cheap_and_quiet():
    """Counted in modules, not in seconds: not even torch or transformers, and of ours one that registers."""
    foreign, ours, quiet = fresh_process(BARE)
    assert foreign == ["lgvit_hf"] and ours == ["lgvit_hf", "lgvit_hf.auto"]
    assert quiet, "importing must not touch logging"


def names_for_editors():
    """What `__init__.py` imports under `if TYPE_CHECKING`: every name and its home."""
    tree = ast.parse(Path(lgvit_hf.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and node.test.id == "TYPE_CHECKING")
    return {name.name: f"lgvit_hf.{line.module}" for line in block.body for name in line.names}


@pytest.mark.version_independent
def test_public_names_are_what_their_homes_define():
    names = names_for_editors()
    assert {"ViTHighway", "export_onnx", "HighwayTrainer", "Predictor"} < names.keys()
    assert sorted(lgvit_hf.__all__) == sorted(names) and names.keys() <= set(dir(lgvit_hf))
    for name, home in names.items():
        found = getattr(lgvit_hf, name)
        assert found is vars(import_module(home))[name], name
        # classes and functions; dicts and the like have no module. A home may pass on what it registers things in
        homes = (home, "lgvit_hf.exit_head", "lgvit_hf.exit_policy", "typing", "builtins", "types")
        assert getattr(found, "__module__", home) in homes, name


def test_unknown_name():
    with pytest.raises(AttributeError, match="lgvit_hf.*'Highway'"):
        lgvit_hf.Highway  # noqa: B018


# the third order, models first asked for after us, is that of `test_saved_models_answer_alike_in_a_fresh_process`
ORDERS = {
    "before": "from transformers import AutoConfig\n{}import lgvit_hf",
    "after": "import lgvit_hf\n{}from transformers import AutoConfig",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_config_knows_the_model_types(order):
    state = "(logging.root.handlers[:], logging.root.level, transformers.utils.logging.get_verbosity())"
    code = f"""
import logging, transformers
{ORDERS[order].format(f"before = {state}" + chr(10))}
kinds = ["vit_highway", "deit_highway", "swin_highway", "avit", "wrapped_highway"]
print(json.dumps([[type(AutoConfig.for_model(kind)).__name__ for kind in kinds], before == {state}]))
"""
    names = ["ViTHighwayConfig", "DeiTHighwayConfig", "SwinHighwayConfig", "AViTConfig", "HighwayWrapperConfig"]
    assert fresh_process(code) == [names, True]


@torch.no_grad()
def test_saved_models_answer_alike_in_a_fresh_process(tmp_path):
    """Where no optional package can be imported, too."""
    expected = {}
    for kind in KINDS:
        model, images = clear_model(kind, 1)
        model.save_pretrained(tmp_path / kind)
        save_file({"images": images}, tmp_path / f"{kind}.safetensors")
        out = model(images)
        assert sorted(out.exit_index.tolist()) == [0, 1, 2, 3, 4]
        expected[kind] = [type(model).__name__, out.exit_layer.tolist(), out.logits.tolist()]
    code = f"""
sys.modules.update(dict.fromkeys({OPTIONAL}))  # none of them can be imported
import lgvit_hf, torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
folder, *kinds = sys.argv[1:]
answers = dict()
for kind in kinds:
    model = AutoModelForImageClassification.from_pretrained(f"{{folder}}/{{kind}}").eval()
    with torch.no_grad():
        out = model(load_file(f"{{folder}}/{{kind}}.safetensors")["images"])
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
    # what was loaded: ours, and anything heavy
    assert found == 4 * [[False, False]] + 2 * [[True, False]]


@pytest.mark.version_independent
def test_plugin_leaves_optimum_a_namespace():
    assert PLUGIN.is_file()
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

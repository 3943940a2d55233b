"""A saved folder opens with `trust_remote_code=True` in a process that has transformers and not this package.

Folders of the other major version are opened too where there is a second environment, as in `test_cross_version.py`:
`LGVIT_OTHER_PYTHON=/path/to/python pytest tests/test_remote_code.py`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, Trainer
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

import lgvit_hf
from lgvit_hf import AViT, HighwayWrapper, ViTHighway
from lgvit_hf.data.processing import make_processor
from lgvit_hf.remote_code import auto_map, code_files
from tests.clear import clear_model
from tests.test_cross_version import elsewhere, other, tiny_avit  # noqa: F401  (`other` is a fixture)
from tests.test_modeling_common import training_arguments
from tests.tiny import IMAGE_SIZE, KINDS, OTHER_KINDS, tiny_dataset, tiny_images, tiny_model
from tests.tiny import MODELS as HIGHWAYS

PACKAGE = Path(lgvit_hf.__file__).parent
MODELS = (*dict.fromkeys(HIGHWAYS.values()), AViT)
AUTO_CLASSES = {"AutoConfig", "AutoModel", "AutoModelForImageClassification"}
EXITS = {"exit_positions": [2, 3, 5], "exit_types": ["conv1_1", "vit", "attention_r2"]}
ALL_KINDS = (*KINDS, *OTHER_KINDS, "avit")


def save_all(folder):
    """A model of every kind with its image processor, and what it answers."""
    for kind in ALL_KINDS:
        # two images at each of four exits
        model, images = (tiny_avit("deit"), tiny_images(8)) if kind == "avit" else clear_model(kind, 2, **EXITS)
        model.save_pretrained(folder / kind)
        make_processor(IMAGE_SIZE).save_pretrained(folder / kind)
        with torch.no_grad():
            out = model(images)
        kept = {"images": images, "logits": out.logits, "exit_layer": out.exit_layer}
        save_file(kept, folder / f"{kind}.safetensors")


WITHOUT = """
import importlib.util, sys
assert importlib.util.find_spec("lgvit_hf") is None
try:
    import lgvit_hf
except ImportError:
    pass
else:
    raise AssertionError("this package can be imported here")
"""
# run where `lgvit_hf` is not: saved folders in, their answers out
OPEN_ALL = """
import json, os
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline

trusted = {"trust_remote_code": True}
answers = {}
for kind in sys.argv[2:]:
    folder = os.path.join(sys.argv[1], kind)
    images = load_file(folder + ".safetensors")["images"]
    config = AutoConfig.from_pretrained(folder, **trusted)
    models = [auto.from_pretrained(folder, **trusted).eval() for auto in (AutoModel, AutoModelForImageClassification)]
    again = folder + "-again"
    models[1].save_pretrained(again)
    models.append(AutoModelForImageClassification.from_pretrained(again, **trusted).eval())
    with torch.no_grad():
        outs = [model(images) for model in models]
    classify = pipeline("image-classification", folder, **trusted)
    answers[kind] = {
        "model_type": config.model_type,
        "modules": [type(model).__module__.split(".")[0] for model in models],
        "exit_layer": [out.exit_layer.tolist() for out in outs],
        "logits": [out.logits.tolist() for out in outs],
        "pipeline": classify([Image.new("RGB", (20, 30), "red")] * 2, top_k=5, batch_size=2),
    }
assert "lgvit_hf" not in sys.modules
print(json.dumps(answers))
"""


def site_packages(python):
    """Where a Python has its packages."""
    found = subprocess.run(
        [python, "-c", "import transformers; print(transformers.__path__[0])"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return Path(found.stdout.strip()).parent


def without_the_package(code, arguments, home, python=sys.executable):
    """The last line that code prints; `home` gets a copy of site-packages, in links, without this package."""
    site = home / "site-packages"
    site.mkdir()
    for entry in site_packages(python).iterdir():
        if "lgvit" not in entry.name:
            (site / entry.name).symlink_to(entry)
    # -I and -S: no PYTHONPATH, working folder or site-packages, whose .pth files would bring the package back
    code = f"import sys\nsys.path.insert(0, {str(site)!r})\n{WITHOUT}\n{code}"
    environment = {**os.environ, "HF_MODULES_CACHE": str(home / "modules"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [python, "-I", "-S", "-c", code, *map(str, arguments)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.splitlines()[-1]


def open_without_the_package(folder, home, python=sys.executable):
    return json.loads(without_the_package(OPEN_ALL, [folder, *ALL_KINDS], home, python))


def check_answers(answers, folder):
    for kind in ALL_KINDS:
        expected = load_file(folder / f"{kind}.safetensors")
        assert answers[kind]["model_type"] == json.loads((folder / kind / "config.json").read_text())["model_type"]
        assert set(answers[kind]["modules"]) == {"transformers_modules"}
        for depths, logits in zip(answers[kind]["exit_layer"], answers[kind]["logits"], strict=True):
            assert depths == expected["exit_layer"].tolist()
            torch.testing.assert_close(torch.tensor(logits), expected["logits"], rtol=1e-4, atol=1e-5)
        for image in answers[kind]["pipeline"]:
            # the model of `tiny_avit` has two classes
            assert len(image) == min(5, expected["logits"].shape[1]) and 0 < image[0]["score"] <= 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder)
    return folder


def test_opens_without_the_package(saved, tmp_path):
    check_answers(open_without_the_package(saved, tmp_path), saved)
    # what was saved from there is as complete as what was opened
    for kind in ALL_KINDS:
        for file in (saved / kind).glob("*.py"):
            assert (saved / f"{kind}-again" / file.name).read_bytes() == file.read_bytes()
        first, again = (json.loads((saved / name / "config.json").read_text()) for name in (kind, f"{kind}-again"))
        assert again["auto_map"] == first["auto_map"]


def test_saved_elsewhere_opens_here_without_the_package(other, tmp_path):  # noqa: F811
    (tmp_path / "saved").mkdir()
    elsewhere("from tests import test_remote_code\ntest_remote_code.save_all(Path(sys.argv[1]))", tmp_path / "saved")
    check_answers(open_without_the_package(tmp_path / "saved", tmp_path), tmp_path / "saved")


def test_saved_here_opens_elsewhere_without_the_package(other, saved, tmp_path):  # noqa: F811
    check_answers(open_without_the_package(saved, tmp_path, os.environ["LGVIT_OTHER_PYTHON"]), saved)


@pytest.mark.version_independent
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_files_are_copies_of_root_files_and_no_others(kind, saved):
    files = {file.name: file.read_bytes() for file in (saved / kind).glob("*.py")}
    backbone = kind.removesuffix("_plain")
    assert files == {name: (PACKAGE / name).read_bytes() for name in files}
    assert {"configuration.py", "heads.py"} < files.keys() or kind == "avit"
    assert f"modeling_{backbone}.py" in files and "auto.py" not in files and "__init__.py" not in files
    models = {name for name in files if name.startswith("modeling_")}
    assert models == {f"modeling_{backbone}.py"} | (set() if kind == "avit" else {"modeling_highway.py"})
    assert not [path for path in (saved / kind).iterdir() if path.is_dir()]


@pytest.mark.version_independent
@pytest.mark.parametrize("model", MODELS)
def test_auto_map_names_all_auto_classes(model):
    entries = auto_map(model)
    assert set(entries) == AUTO_CLASSES
    for auto, entry in entries.items():
        module, name = entry.split(".")
        wanted = model.config_class if auto == "AutoConfig" else model
        assert getattr(sys.modules[f"lgvit_hf.{module}"], name) is wanted


@pytest.mark.parametrize("model", MODELS)
def test_every_file_that_is_opened_imports_all_that_it_needs(model):
    # transformers 4 takes from a local folder what the opened file imports itself, and no further
    for entry in set(auto_map(model).values()):
        file = PACKAGE / f"{entry.split('.')[0]}.py"
        own = {f"{name}.py" for name in get_relative_imports(file)}
        assert own == {Path(needed).name for needed in get_relative_import_files(file)}, file.name
        assert all((PACKAGE / name).is_file() for name in own)
        assert own | {file.name} <= {needed.name for needed in code_files(model)}


@pytest.mark.version_independent
def test_the_root_holds_what_travels_with_a_checkpoint():
    travels = {file.name for model in (*MODELS, HighwayWrapper) for file in code_files(model)}
    assert travels | {"__init__.py", "auto.py"} == {file.name for file in PACKAGE.glob("*.py")}


def test_a_config_in_memory_does_not_name_files_that_are_not_there(saved, tmp_path):
    model = ViTHighway.from_pretrained(saved / "vit")
    assert not hasattr(model.config, "auto_map") and not hasattr(tiny_model("vit").config, "auto_map")
    model.config.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_the_package_goes_before_the_code_in_a_folder(saved):
    for kind in ALL_KINDS:
        config = AutoConfig.from_pretrained(saved / kind)
        model = AutoModelForImageClassification.from_pretrained(saved / kind)
        assert type(model).__module__.startswith("lgvit_hf.") and type(config).__module__.startswith("lgvit_hf.")


# both copies of the code in one process, the package's imported first or last
BESIDE = """
import sys
kinds, folder, first = sys.argv[3:], sys.argv[1], sys.argv[2] == "first"
if first:
    import lgvit_hf.modeling_avit
    import lgvit_hf
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
models = {}
for kind in kinds:
    models[kind] = [AutoModelForImageClassification.from_pretrained(f"{folder}/{kind}", trust_remote_code=True).eval()]
import lgvit_hf
from lgvit_hf import AViT, ViTHighway, SwinHighway, DeiTHighway
ours = {"vit": ViTHighway, "swin": SwinHighway, "avit": AViT}
for kind in kinds:
    models[kind].append(ours[kind].from_pretrained(f"{folder}/{kind}").eval())
for kind in kinds:
    expected = load_file(f"{folder}/{kind}.safetensors")
    for model in models[kind]:
        with torch.no_grad():
            out = model(expected["images"])
        assert out.exit_layer.tolist() == expected["exit_layer"].tolist(), kind
        torch.testing.assert_close(out.logits, expected["logits"], rtol=1e-4, atol=1e-5)
# the rooms take either
from lgvit_hf import benchmark, collect
from lgvit_hf.data.processing import stack
rows = [{"pixel_values": image, "labels": 0} for image in expected["images"]]
table = collect(models["vit"][0], rows)
assert table.depths == [2, 3, 5, 6], table.depths
assert benchmark(models["vit"][0], expected["images"], batch_sizes=[2], repeats=1)["batches"]
"""


@pytest.mark.parametrize("order", ["first", "last"])
def test_works_beside_the_package(order, saved, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", BESIDE, str(saved), order, "vit", "swin", "avit"]
    result = subprocess.run(command, env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr[-3000:]


def test_checkpoints_of_a_run_go_without(tmp_path):
    model = tiny_model("vit", **EXITS)
    args = training_arguments(tmp_path, save_strategy="steps", save_steps=1)
    trainer = Trainer(model, args, train_dataset=tiny_dataset(8))
    trainer.train()
    trainer.save_model()
    for folder, has_code in ((tmp_path, True), (tmp_path / "checkpoint-1", False), (tmp_path / "checkpoint-2", False)):
        assert (folder / "model.safetensors").is_file()
        assert bool(list(folder.glob("*.py"))) is has_code
        assert ("auto_map" in json.loads((folder / "config.json").read_text())) is has_code


@pytest.mark.version_independent
def test_only_the_main_process_writes(tmp_path):
    tiny_model("vit", **EXITS).save_pretrained(tmp_path, is_main_process=False)
    assert not list(tmp_path.glob("*.py"))


@pytest.mark.version_independent
def test_a_class_of_somebody_else_brings_its_own_code(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text("from lgvit_hf import ViTHighway\nclass Mine(ViTHighway):\n    pass\n")
    spec = importlib.util.spec_from_file_location("mine", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.Mine(tiny_model("vit", **EXITS).config).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())


@pytest.mark.version_independent
def test_old_code_in_a_folder_is_replaced(tmp_path):
    (tmp_path / "heads.py").write_text("raise SystemExit('old')")
    (tmp_path / "notes.py").write_text("# mine")
    tiny_model("vit", **EXITS).save_pretrained(tmp_path)
    assert (tmp_path / "heads.py").read_bytes() == (PACKAGE / "heads.py").read_bytes()
    assert (tmp_path / "notes.py").read_text() == "# mine"

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import transformers
from PIL import Image

from lgvit_hf.cli import main
from lgvit_hf.cli.main import build_parser, commands


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


LIGHT = """
import runpy, sys
sys.argv = ["lgvit", "--help"]
try:
    runpy.run_module("lgvit_hf.cli", run_name="__main__")
except SystemExit as done:
    assert done.code == 0
loaded = {name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
print(sorted(loaded & {"torch", "transformers", "numpy", "PIL", "datasets", "yaml", "lgvit_hf"}))
"""


@pytest.mark.version_independent
def test_help_is_quick():
    """Counted in what it imports, not in seconds."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout and done.stdout.splitlines()[-1] == "['lgvit_hf']"


@pytest.mark.version_independent
def test_every_command_is_run_and_only_those():
    assert set(commands()) == set(build_parser()._subparsers._group_actions[0].choices)


@pytest.mark.version_independent
@pytest.mark.parametrize("command", commands())
def test_every_command_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert f"lgvit {command}" in capsys.readouterr().out.split("example:")[1]


def test_env_says_what_is_installed(capsys):
    assert lgvit("env") == 0
    said = capsys.readouterr().out
    assert f"transformers     {transformers.__version__}" in said and "torchvision" in said
    assert ("CVE-2026-4372" in said) == (int(transformers.__version__.split(".")[0]) < 5)


@pytest.fixture
def photos(tmp_path):
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            shade = tuple(min(255, value + 2 * number) for value in colour)
            Image.new("RGB", (20, 12), shade).save(tmp_path / "photos" / label / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("backbone", ["vit", "deit", "swin"])
def test_train_both_stages_and_evaluate(backbone, photos, tmp_path, capsys):
    small = ["--data", photos, "--batch-size", 8, "--epochs", 1, "--warmup-steps", 0]
    new = ["--backbone", backbone, "--image-size", 16, "--exit-positions", 4, 8]
    assert lgvit("train", *small, *new, "--stage", "1", "--output", tmp_path / "one") == 0
    assert lgvit("train", *small, "--model", tmp_path / "one", "--stage", 2, "--output", tmp_path / "two") == 0
    capsys.readouterr()
    timed = ["--timed-batch-sizes", 4, "--output", tmp_path / "results.json"]
    policy = ["--policy", "patience", "--patience", 2]
    assert lgvit("evaluate", tmp_path / "two", "--data", photos, *policy, *timed) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["policy"] == {"name": "patience", "patience": 2}
    assert [row["exit_layer"] for row in results["exits"]] == [4, 8, 12]
    assert "layer speed-up" in capsys.readouterr().out
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert sorted(config["id2label"].values()) == ["blue", "red"]


def test_a_finished_run_resumes_to_the_same_model(photos, tmp_path):
    common = ["train", "--data", photos, "--backbone", "vit", "--image-size", 16, "--batch-size", 8, "--stage", "1"]
    assert lgvit(*common, "--epochs", 2, "--output", tmp_path / "run") == 0
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "model.safetensors").unlink()
    assert lgvit(*common, "--epochs", 2, "--output", tmp_path / "run", "--resume") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole


@pytest.mark.version_independent
def test_config_file_and_override(tmp_path, photos):
    file = tmp_path / "run.yaml"
    file.write_text(f"data: {photos}\nbackbone: vit\nimage-size: 16\nepochs: 1\nexit_positions: [3]\nbatch_size: 8\n")
    assert lgvit("train", "--config", file, "--exit-positions", 5, "--output", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["exit_positions"] == [5]


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("", [], (1, None, False, [0.9])),
        ("batch-size: 3\nall_exits: true\n", [], (3, None, True, [0.9])),
        ("batch_size: 3\nlabels: null\nnumbers: [0.5, 1]\n", ["--batch-size", "1"], (1, None, False, [0.5, 1.0])),
        ("numbers: 2\nlabels: a\n", ["--numbers", "0.9", "--labels", "b"], (1, "b", False, [0.9])),
    ],
)
def test_defaults_then_file_then_command_line(text, words, expected, tmp_path, monkeypatch):
    """A value that was typed wins even where it is the default; words are read once."""
    found, read = [], []

    def add_options(command):
        command.add_argument("--batch-size", type=lambda word: read.append(word) or int(word), default=1)
        command.add_argument("--labels")
        command.add_argument("--all-exits", action="store_true")
        command.add_argument("--numbers", type=float, nargs="+", default=[0.9])

    def run(options):
        found.append((options.batch_size, options.labels, options.all_exits, options.numbers))

    module = SimpleNamespace(HELP="test", EXAMPLE="", add_options=add_options, run=run)
    monkeypatch.setattr(sys.modules["lgvit_hf.cli.main"], "commands", lambda: {"evaluate": module})
    (tmp_path / "run.yaml").write_text(text or "{}")
    assert lgvit("evaluate", "--config", tmp_path / "run.yaml", *words) == 0
    assert found == [expected] and read.count("1") == words.count("1")


@pytest.mark.version_independent
@pytest.mark.parametrize(
    "text, message",
    [
        ("epoch: 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("epochs: many", "epochs: 'many' must be a finite number"),
        ("stage: 3", "must be one of backbone, head, 1, 2"),
        ("dry_run: maybe", "must be true or false"),
        ("seed: [1, 2]", "must be one value"),
        ("seed: []", "must be one value"),
        ("- 1", "a mapping of options"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_config_file(text, message, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(text)
    assert lgvit("train", "--config", tmp_path / "run.yaml", "--data", "digits", "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.version_independent
@pytest.mark.parametrize(
    "arguments", [["evaluate", "nowhere", "--data", "digits"], ["evaluate", "x", "--batch-size", "0"]]
)
def test_debug_shows_where_an_error_comes_from(arguments, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nowhere").mkdir()
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert main([*arguments, "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown and shown.splitlines()[-1] == line


@pytest.mark.version_independent
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--output", "OUT"], "lgvit train needs --data"),
        (["train", "--data", "digits", "--output", "OUT"], "give either --model CHECKPOINT or --backbone"),
        (
            ["train", "--data", "./nowhere", "--backbone", "vit", "--output", "OUT"],
            "./nowhere: no such folder, Parquet file or archive",
        ),
        (["train", "--data", "digits", "--model", "EMPTY", "--output", "OUT"], "no config.json there"),
        (
            ["train", "--data", "digits", "--backbone", "vit", "--exit-positions", "99", "--output", "OUT"],
            "exit_positions: [99]",
        ),
        (
            ["train", "--data", "digits", "--backbone", "vit", "--exit-types", "conv9", "--output", "OUT"],
            "unknown head 'conv9'",
        ),
        (
            ["train", "--data", "digits", "--backbone", "vit", "--strategy", "gumbel", "--output", "OUT"],
            "strategy: unknown 'gumbel'",
        ),
        (["evaluate", "EMPTY", "--data", "digits"], "no config.json there"),
        (["evaluate", "EMPTY", "--data", "digits", "--threshold", "0.5"], "--threshold goes with --policy"),
        (["evaluate", "EMPTY", "--treshold", "0.5"], "unknown option --treshold; did you mean --threshold?"),
        (["convert", "EMPTY", "OUT", "--form=lgvit"], "unknown option --form; did you mean --from?"),
        (["serve", "EMPTY", "--wxyz"], "unknown option --wxyz; see lgvit serve --help"),
        (["evaluate", "EMPTY", "stray"], "'stray' is not understood; options are --name value"),
        (["train", "--batch-sise", "8"], "unknown option --batch-sise; did you mean --batch-size?"),
        (["train", "--max_step=8"], "unknown option --max_step; did you mean --max_steps?"),
        (["convert", "EMPTY", "OUT"], "no model.safetensors or pytorch_model.bin"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments, message, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lgvit: ") and message in error and error.rstrip("\n").count("\n") == 0
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.safetensors"))

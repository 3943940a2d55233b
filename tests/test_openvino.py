"""Exported highways in OpenVINO: the answers of ONNX Runtime, which are the model's, in every layout and precision."""

import json
import runpy

import pytest
import torch

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from tests.processes import ROOT
from tests.tiny import IMAGE_SIZE, tiny_images, tiny_model

pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
pytest.importorskip("openvino", reason='pip install "lgvit-hf[openvino]"')

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.segment_graphs import EXPORTABLE, export_parts  # noqa: E402
from lgvit_hf.export.verification import between  # noqa: E402
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402
from lgvit_hf.runtimes.open_exported import open_exported  # noqa: E402
from lgvit_hf.runtimes.openvino import OVHighway  # noqa: E402
from lgvit_hf.runtimes.openvino_session import open_openvino  # noqa: E402
from lgvit_hf.serving.device.session import open_session  # noqa: E402

pytestmark = pytest.mark.version_independent
SMALL = {"num_hidden_layers": 3, "exit_positions": [1, 2], "exit_types": "linear"}
# of probabilities and logits, by other roundings to 8 bits
ROUNDING = 0.02
IMAGES = 64
KINDS = [
    ("single", "float32", "optional"),
    ("single", "float32", "input"),
    ("single", "int8", "input"),
    ("segments", "float32", "optional"),
    ("segments", "int8", "optional"),
    ("all_exits", "float32", "optional"),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A model whose samples exit at all three places, images, and where its exports of some kind are."""
    labels = {"id2label": {digit: str(digit) for digit in range(10)}, "label2id": {str(n): n for n in range(10)}}
    images, model = tiny_images(IMAGES), tiny_model("vit", num_labels=10, **labels, **SMALL)
    with torch.no_grad():
        scores = torch.stack(model(images, early_exit=False).exit_logits).softmax(-1).amax(-1)
    # where scores are far apart, since rounding to 8 bits differs between runtimes where a sum is half way
    first = between(scores[0])
    second = between(scores[1][scores[0] < first])
    model.set_exit_policy("confidence", threshold=[first, second])
    decided = ((scores[:2] - torch.tensor([[first], [second]])).abs() > ROUNDING).all(0)
    folder, parts = tmp_path_factory.mktemp("openvino"), export_parts(model, range(3))

    def exported(layout, precision, thresholds):
        target = folder / f"{layout}_{precision}_{thresholds}"
        if not target.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda *_: parts)
                how = {"precision": precision, "thresholds": thresholds}
                export_onnx(model, target, layout, **how, processor=make_processor(IMAGE_SIZE))
        return target

    return model, images[decided], exported


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_answers_are_those_of_onnx_runtime(kind, exports):
    _, images, exported = exports
    folder = exported(*kind)
    ours, theirs = OVHighway.from_pretrained(folder, threads=1), ORTHighway.from_pretrained(folder, threads=1)
    assert ours.exported.runtime.startswith("openvino 2") and ours.exported.threads == 1
    found, expected = ours(images), theirs(images)
    assert found.exit_index.tolist() == expected.exit_index.tolist() and len(set(expected.exit_index.tolist())) == 3
    atol = 3 * ROUNDING if "int8" in kind else 1e-4
    torch.testing.assert_close(found.logits, expected.logits, atol=atol, rtol=0)
    torch.testing.assert_close(found.exit_score, expected.exit_score, atol=atol, rtol=0)


def test_every_policy_decides_as_in_onnx_runtime(tmp_path):
    """And a running ensemble, in batches of several sizes whose samples exit at different exits."""
    parity = runpy.run_path(str(ROOT / "recipes" / "benchmarks" / "runtime_parity.py"))
    # of so many exits that a gate remembers several
    deep = {"num_hidden_layers": 4, "exit_positions": [1, 2, 3], "exit_types": "linear"}
    model, pixels = tiny_model("deit", **deep), tiny_images(40).numpy()
    sizes, names = parity["batch_sizes"](len(pixels)), set()
    for case in parity["composed"](model, pixels, tmp_path):
        if not case.name.endswith("float32 fixed"):
            continue
        sessions = open_session(case.file, 1), open_openvino(case.file, 1)
        ours, theirs = (parity["in_session"](session, case, pixels, sizes) for session in sessions)
        told = parity["compare"](ours, theirs, case.policy)
        assert told["other_exits"] == told["other_logits"] == 0, (case.name, told)
        names.add(case.name.split()[0])
    assert names == set(EXPORTABLE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_sample_does_not_meet_its_batch(kind, exports):
    _, images, exported = exports
    model = OVHighway.from_pretrained(exported(*kind), threads=1)
    bad = torch.stack([images[0] * 3e38, torch.full_like(images[0], torch.nan), images[0].clone()])
    bad[2, 0, 0, 0] = torch.inf
    mixed = model(torch.cat([images[:4], bad, images[4:8]]))
    for place, image in zip((0, 1, 2, 3, 7, 8, 9, 10), images[:8], strict=True):
        alone = model(image[None])
        assert alone.exit_index[0] == mixed.exit_index[place]
        atol = ROUNDING if "int8" in kind else 1e-5
        torch.testing.assert_close(mixed.logits[place], alone.logits[0], atol=atol, rtol=1e-5)
    assert not mixed.logits[4:7].isfinite().any() and (mixed.exit_index[4:7] == 2).all()


@torch.no_grad()
def test_new_numbers_where_the_file_takes_them(exports):
    model, images, exported = exports
    for kind in KINDS[1], KINDS[3], KINDS[5]:
        opened = OVHighway.from_pretrained(exported(*kind))
        opened.set_exit_policy("confidence", threshold=2.0)
        assert set(opened(images).exit_index.tolist()) == {2}
    optional = OVHighway.from_pretrained(exported(*KINDS[0]))
    with pytest.raises(ValueError, match="openvino takes no new numbers .* 'optional'; export it with .*'input'"):
        optional.set_exit_policy("confidence", threshold=2.0)
    assert optional(images).exit_index.tolist() == model(images).exit_index.tolist()


def test_bad_input(exports, tmp_path):
    model, _, exported = exports
    folder = exported(*KINDS[0])
    with pytest.raises(ValueError, match="runtime='tensorrt' is none of onnxruntime, openvino"):
        open_exported(folder, "tensorrt")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="runtime='openvino' is for an exported folder"):
        open_exported(tmp_path / "model", "openvino")
    assert open_exported(tmp_path / "model") is None
    opened = OVHighway.from_pretrained(folder)
    with pytest.raises(ValueError, match=r"pixel_values: shape \(1, 3, 5, 5\) must be \(batch, 3, "):
        opened(torch.zeros(1, 3, 5, 5))


def test_a_file_that_does_not_compile(tmp_path):
    from lgvit_hf.runtimes.openvino_session import open_openvino

    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="model.onnx does not open in OpenVINO; export again"):
        open_openvino(tmp_path / "model.onnx", 1)


def test_without_the_package(exports, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install .lgvit-hf\[openvino\]"):
        OVHighway.from_pretrained(exports[2](*KINDS[0]))


def test_commands_take_a_runtime(exports, tmp_path, capsys):
    folder = str(exports[2](*KINDS[0]))
    command = ["predict", folder, "digits", "--output", str(tmp_path / "answers.jsonl")]
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    assert main([*command, "--split", "test", "--runtime", "openvino"]) == 0
    found = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert main([*command[:-1], str(tmp_path / "others.jsonl"), "--split", "test"]) == 0
    others = [json.loads(line) for line in (tmp_path / "others.jsonl").read_text().splitlines()]
    assert len(found) > 100
    assert sum(one["exit_index"] != other["exit_index"] for one, other in zip(found, others, strict=True)) <= 1
    command = ["predict", str(tmp_path), "digits", "--split", "test", "--output", str(tmp_path / "no.csv")]
    assert main([*command, "--runtime", "openvino"]) == 2
    assert "is for an exported folder" in capsys.readouterr().err


def test_runtimes_compared_in_one_run(exports, tmp_path, capsys):
    model, _, exported = exports
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    command = ["benchmark", str(exported(*KINDS[3])), "--data", "digits", "--limit", "8", "--batch-sizes", "1", "4"]
    command += ["--repeats", "1", "--output", str(tmp_path / "times.json")]
    named = [*command, "--runtime", "torch", "onnxruntime", "openvino", "--torch-checkpoint", str(tmp_path / "model")]
    assert main(named) == 0
    assert "openvino" in capsys.readouterr().out
    report = json.loads((tmp_path / "times.json").read_text())
    assert [(entry["batch_size"], entry["num_batches"]) for entry in report["batches"]] == [(1, 8), (4, 2)]
    for entry in report["batches"]:
        runs = entry["runs"]
        assert list(runs) == ["torch", "onnxruntime", "openvino"]
        for run in runs.values():
            assert run["speed_up"] == pytest.approx(runs["torch"]["full_ms"] / run["early_exit_ms"])
            assert run["early_exit_speed_up"] == pytest.approx(run["full_ms"] / run["early_exit_ms"])
    capsys.readouterr()
    for options, said in (
        (["torch", "openvino"], "--runtime torch goes with --torch-checkpoint"),
        (["openvino", "onnxruntime", "--plot", str(tmp_path / "no.png")], "--plot is of one runtime"),
    ):
        assert main([*command, "--runtime", *options]) == 2
        assert said in capsys.readouterr().err

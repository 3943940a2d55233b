"""Exported files answer as the model does: every policy, backbone, head, layout and batch; and they skip."""

import copy
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from lgvit_hf import ViTHighway
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.engine import replay, run_all
from lgvit_hf.policies import POLICIES, build_policy
from lgvit_hf.segments import State
from tests.seeds import rng
from tests.tiny import HEADS, IMAGE_SIZE, NUM_LABELS, tiny_images, tiny_model

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
onnxruntime = pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export import segment_graphs  # noqa: E402
from lgvit_hf.export.composition import compose_single  # noqa: E402
from lgvit_hf.export.onnx_export import EXPORTABLE, export_onnx, verify  # noqa: E402
from lgvit_hf.export.segment_graphs import export_decision, export_parts, weight_bytes  # noqa: E402
from lgvit_hf.export.verification import trials, undecided_samples  # noqa: E402
from lgvit_hf.runtimes.manifest import (  # noqa: E402
    Manifest,
    exits_that_run,  # noqa: E402
)
from lgvit_hf.runtimes.onnxruntime import ORTHighway  # noqa: E402
from lgvit_hf.runtimes.single_file import parameter_inputs  # noqa: E402
from lgvit_hf.serving.device.info import file_digest  # noqa: E402

version_independent = pytest.mark.version_independent
NUM_EXITS = 3
ROWS, NAN_ROW = 60, 5
ROUNDING = 1e-5
# every head once. ViT on images that are not square; DeiT with its distillation token; Swin's exits behind its second
# stage's blocks
MODELS = {
    "vit": {
        "num_hidden_layers": 4,
        "image_size": (12, 20),
        "exit_positions": [1, 2, 3],
        "exit_types": ["linear", "conv_normal", "vit"],
    },
    "deit": {
        "num_hidden_layers": 4,
        "exit_positions": [1, 2, 3],
        "exit_types": ["mlp", "attention_r2", "conv1_1"],
    },
    "swin": {
        "depths": [1, 4],
        "num_heads": [2, 2],
        "exit_positions": [2, 3, 4],
        "exit_types": ["conv2_1", "self_attention", "concat"],
    },
}

SMALL = {"num_hidden_layers": 3, "exit_positions": [1, 2], "exit_types": "linear"}


def drawn(kind):
    """A model, and images of which one is NaN, for which rounding decides nothing and every exit is taken.

    The heads stand behind one block: a segment without blocks is exported in a third of the time.
    """
    for number in range(100):
        model = tiny_model(kind, number, **MODELS[kind])
        first, *others, last = model.segments()
        segments = [first, *(replace(segment, blocks=()) for segment in others), last]
        model.segments = lambda *_, segments=segments: segments
        images = tiny_images(ROWS, model.config.image_size, number)
        images[NAN_ROW] = math.nan
        with torch.no_grad():
            exit_logits = run_all(segments, State({"pixel_values": images}))
        if is_settled(exit_logits):
            return model, images
    raise AssertionError("no such model in 100")


def is_settled(exit_logits):
    """Whether no sample is close to another label or to a threshold, and every exit answers one wherever it can."""
    known, depths = torch.arange(ROWS) != NAN_ROW, list(range(1, len(exit_logits) + 1))
    best, second = torch.stack(exit_logits)[:, known].topk(2).values.unbind(-1)
    if (best - second).min() < 1e-4:
        return False
    for settings in (*policies(exit_logits), *policies_that_skip(exit_logits)):
        policy = build_policy(settings, NUM_EXITS)
        taken = set(replay(exit_logits, depths, policy).exit_index.tolist())
        if undecided(settings, exit_logits, depths).any() or len(taken) < least_exits(policy):
            return False
    return True


def least_exits(policy):
    """How many exits must answer, of the samples or NaN, for the tests to compare anything."""
    if policy.name == "confidence":
        return len(exits_that_run(policy, NUM_EXITS + 1))
    if policy.name == "patience" and policy.patience == 2:
        return NUM_EXITS
    return 1 if policy.name == "never" else 2


@pytest.fixture(scope="module", params=MODELS)
def exported(request):
    """A model, its images, and its parts as ONNX."""
    model, images = drawn(request.param)
    return model, images, export_parts(model, range(NUM_EXITS + 1))


only_vit = pytest.mark.parametrize("exported", ["vit"], indirect=True)


def between(scores):
    """A threshold in the widest gap of the middle scores."""
    ranked = np.sort(scores[~scores.isnan()].numpy())
    middle = ranked[len(ranked) // 4 : 3 * len(ranked) // 4]
    widest = int(np.diff(middle).argmax())
    return float(middle[widest : widest + 2].mean())


def policies(exit_logits):
    """Settings by which samples exit at several exits, all of which are asked."""
    num_exits = len(exit_logits) - 1

    def cuts(name, **settings):
        judge = build_policy({"name": name, "threshold": 0.0, **settings}, num_exits)
        return [between(judge(logits, {}, index)[1]["score"]) for index, logits in enumerate(exit_logits[:-1])]

    warm = [0.5, 2.0, *[1.0] * (num_exits - 2)]
    for temperature in (1.0, 1.7, warm, [*warm, 3.0]):
        yield {
            "name": "confidence",
            "threshold": cuts("confidence", temperature=temperature),
            "temperature": temperature,
        }
    for temperature in (1.0, warm):
        for name in ("margin", "entropy"):
            yield {"name": name, "threshold": cuts(name, temperature=temperature), "temperature": temperature}
        yield {
            "name": "confidence_entropy",
            "threshold": cuts("confidence", temperature=temperature),
            "entropy_threshold": cuts("entropy", temperature=temperature),
            "temperature": temperature,
        }
        yield {
            "name": "label_confidence",
            "threshold": cuts("label_confidence", temperature=temperature),
            "temperature": temperature,
        }
    yield {"name": "confidence_entropy", "threshold": 0.0, "entropy_threshold": cuts("entropy")[0]}
    for patience in (1, 2, 3):
        yield {"name": "patience_confidence", "threshold": cuts("entropy"), "patience": patience}
        yield {"name": "patience", "patience": patience}
    yield {
        "name": "patience_confidence",
        "threshold": cuts("entropy", temperature=warm),
        "patience": 2,
        "temperature": warm,
    }


def policies_that_skip(exit_logits):
    """Settings with exits that nobody asks: they are not in a single file."""
    cut = between(exit_logits[1].softmax(-1).amax(-1))
    yield {"name": "confidence", "threshold": [1.0, cut, 1.0], "temperature": 1.0}
    yield {"name": "patience", "patience": 1, "exits": [1]}
    yield {"name": "fixed", "exit_index": 1}
    yield {"name": "never"}


@cache
def decision_of(name):
    """Numbers are inputs: a kind of policy is exported once."""
    every = {"threshold": 1.0, "entropy_threshold": 1.0, "patience": 1, "exit_index": 1}
    fields = {"patience": ["patience"], "patience_confidence": ["threshold", "patience"]}
    fields |= {"confidence_entropy": ["threshold", "entropy_threshold"], "fixed": ["exit_index"], "never": []}
    settings = {field: every[field] for field in fields.get(name, ["threshold"])}
    return export_decision(build_policy({"name": name, **settings}, 2), NUM_LABELS)


def composed(model, parts):
    """One file of the model's parts, with the model's policy."""
    depths = [segment.depth for segment in model.segments()]
    inputs = parameter_inputs(model.exit_policy, len(depths))
    return compose_single(parts, [decision_of(model.exit_policy.name)] * len(parts), depths, inputs)


def opened(folder, model, parts, layout):
    """What `export_onnx` writes, from parts that are there already."""
    folder.mkdir()
    depths = [segment.depth for segment in model.segments()]
    files = {"model.onnx": composed(model, parts)} if layout == "single" else {}
    files = files or {f"segment_{part.exit_index:02}.onnx": part.model for part in parts}
    for name, content in files.items():
        onnx.save(content, folder / name)
    model.config.save_pretrained(folder)
    Manifest(
        layout=layout,
        precision="float32",
        files={name: file_digest(folder / name) for name in files},
        depths=depths,
        exits=[part.exit_index for part in parts],
        policy=model.exit_policy.to_dict(),
        macs={"backbone_costs": [1.0] * len(depths), "heads": [1.0] * len(depths)},
        versions={},
        checks={},
    ).save(folder)
    return ORTHighway.from_pretrained(folder, threads=1)


def batches(images):
    """All samples at once, and in batches of 1, 2, 7 and 32 in turn."""
    yield slice(0, len(images))
    start = 0
    for size in itertools.cycle((1, 2, 7, 32)):
        if start >= len(images):
            return
        yield slice(start, start + size)
        start += size


def assert_same(found, expected, settings, scale=1.0, undecided=None, last_exit=NUM_EXITS):
    """Logits within 1e-4, and every sample exits where it does in PyTorch."""
    keep = slice(None) if undecided is None else ~undecided
    scored = torch.ones_like(expected.exit_index, dtype=torch.bool) if undecided is None else ~undecided
    if settings["name"] == "patience_confidence":
        # what the final classifier adds to the count is judged by a threshold that it does not have
        scored &= expected.exit_index < last_exit
    for field in ("exit_index", "exit_layer"):
        assert getattr(found, field)[keep].tolist() == getattr(expected, field)[keep].tolist(), (field, settings)
    close = {"rtol": 0, "equal_nan": True, "msg": lambda text: f"{settings}: {text}"}
    torch.testing.assert_close(found.logits[keep], expected.logits[keep], atol=1e-4 * scale, **close)
    torch.testing.assert_close(found.exit_score[scored], expected.exit_score[scored], atol=1e-5, **close)


def rows_of(output, rows):
    """Some rows of a batch's answers."""
    fields = ("logits", "exit_index", "exit_layer", "exit_score")
    return type(output)(**{field: getattr(output, field)[rows] for field in fields})


@version_independent
def test_every_policy_and_head_is_tried():
    assert set(EXPORTABLE) <= set(POLICIES)
    exit_logits = list(torch.randn(NUM_EXITS + 1, ROWS, NUM_LABELS))
    tried = [*policies(exit_logits), *policies_that_skip(exit_logits)]
    # those whose rule differs by exit are tried in tests/test_gate_export.py
    assert {settings["name"] for settings in tried} == {*EXPORTABLE} - {"gate", "calibrated_confidence"}
    heads = {head for settings in MODELS.values() for head in settings["exit_types"]}
    # the other attention heads differ from `attention_r2` by a number
    assert heads == {*HEADS, "concat"} - {"attention_r1", "attention_r3"}


@torch.no_grad()
def test_files_answer_as_the_model(exported, tmp_path):
    model, images, parts = exported
    exit_logits = run_all(model.segments(), State({"pixel_values": images}))
    model.set_exit_policy("never")
    segments, single, exits_taken = opened(tmp_path / "segments", model, parts, "segments"), {}, Counter()
    tried = list(policies(exit_logits))
    if model.config.model_type != "vit_highway":  # what a policy decides is the same of all backbones
        tried = [tried[2], next(settings for settings in tried if settings["name"] == "patience_confidence")]
    for settings in tried:
        name = settings["name"]
        for each in (model, segments):
            each.config.problem_type = POLICIES[name].problem_type
        model.set_exit_policy(settings)
        expected = model(images)
        assert expected.exit_index[NAN_ROW] == NUM_EXITS and len(set(expected.exit_index.tolist())) > 1
        exits_taken.update(expected.exit_index.tolist())
        if name not in single:
            single[name] = opened(tmp_path / name, model, parts, "single")
        for ort in (single[name], segments):
            ort.set_exit_policy(settings)
            for rows in batches(images):
                assert_same(ort(images[rows]), rows_of(expected, rows), settings)
    model.config.problem_type = None
    assert set(exits_taken) == set(range(NUM_EXITS + 1))


@version_independent
@only_vit
@torch.no_grad()
def test_exits_that_nobody_asks(exported, tmp_path):
    model, images, parts = exported
    model.set_exit_policy("never")
    segments = opened(tmp_path / "segments", model, parts, "segments")
    exit_logits, parts_of = run_all(model.segments(), State({"pixel_values": images})), {}
    for number, settings in enumerate(policies_that_skip(exit_logits)):
        model.set_exit_policy(settings)
        exits = exits_that_run(model.exit_policy, NUM_EXITS + 1)
        assert len(exits) < NUM_EXITS + 1
        if tuple(exits) not in parts_of:
            parts_of[tuple(exits)] = export_parts(model, exits)
        single = opened(tmp_path / f"single{number}", model, parts_of[tuple(exits)], "single")
        # a file of `fixed` has no deeper exit to which a NaN row could go
        kept = images[[row for row in range(ROWS) if row != NAN_ROW or settings["name"] != "fixed"]]
        expected = model(kept)
        assert set(expected.exit_index.tolist()) == set(exits)
        for ort in (segments, single):
            ort.set_exit_policy(settings)
            for rows in batches(kept):
                assert_same(ort(kept[rows]), rows_of(expected, rows), settings)


@version_independent
@pytest.mark.parametrize("exit_index", [0, 1])
@torch.no_grad()
def test_truncated_models(exit_index, tmp_path):
    model = tiny_model("deit", num_hidden_layers=2, exit_positions=[1], exit_types="conv1_1").truncate(exit_index)
    images = tiny_images(9)
    images[NAN_ROW] = math.nan
    parts = export_parts(model, [0])
    for layout in ("single", "segments"):
        ort = opened(tmp_path / layout, model, parts, layout)
        for rows in (images, images[:1]):
            assert_same(ort(rows), model(rows), {"name": "never"})
        assert set(ort(images).exit_layer.tolist()) == {exit_index + 1}


def undecided(settings, exit_logits, depths):
    """Samples that exit elsewhere when all thresholds move by as much as rounding may."""

    def left(step):
        moved = {
            name: [number + step for number in numbers] if isinstance(numbers, list) else numbers + step
            for name, numbers in settings.items()
            if name in ("threshold", "entropy_threshold")
        }
        return replay(exit_logits, depths, build_policy({**settings, **moved}, len(depths) - 1)).exit_index

    return (left(-ROUNDING) != left(0.0)) | (left(ROUNDING) != left(0.0))


@pytest.mark.slow
def test_a_trained_model_on_real_images(shared, tmp_path):
    pytest.importorskip("datasets", reason='pip install "lgvit-hf[train]"')
    from datasets import load_dataset

    folders = shared / "models" / "fashion_vit", shared / "data" / "fashion_mnist"
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no trained model or no images at {', '.join(map(str, folders))}")
    heads = ["conv1_1", "mlp", "attention_r2", "linear"]
    model = ViTHighway.from_backbone(folders[0], exit_positions=[2, 4, 6, 8], exit_types=heads)
    processor = AutoImageProcessor.from_pretrained(folders[0])
    rows = load_dataset("parquet", data_files={"test": str(folders[1] / "test*.parquet")}, split="test").select(
        range(ROWS + 256)
    )
    pixels = processor([image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    images, labels = pixels[:ROWS], torch.tensor(rows["label"])
    # heads that know something, so that scores are as they are in use
    model.requires_grad_(False).exits.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.exits.parameters(), 3e-3)
    for step in range(24):
        batch = slice(ROWS + 64 * (step % 4), ROWS + 64 * (step % 4 + 1))
        model(pixels[batch], labels[batch], early_exit=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        exit_logits = run_all(model.segments(), State({"pixel_values": images}))
        depths, parts = [2, 4, 6, 8, 12], export_parts(model, range(5))
        scale, close = max(1.0, torch.stack(exit_logits).abs().max().item()), 0
        model.set_exit_policy("never")
        segments, single = opened(tmp_path / "segments", model, parts, "segments"), {}
        plain = [
            {"name": "confidence", "threshold": 0.8},
            {"name": "margin", "threshold": 0.6},
            {"name": "entropy", "threshold": 0.5},
            {"name": "patience_confidence", "threshold": 0.9, "patience": 2},
        ]
        for settings in (*policies(exit_logits), *plain):
            model.set_exit_policy(settings)
            expected, unsure, name = model(images), undecided(settings, exit_logits, depths), settings["name"]
            close += int(unsure.sum())
            if name not in single:
                single[name] = opened(tmp_path / name, model, parts, "single")
            for ort in (single[name], segments):
                ort.set_exit_policy(settings)
                for rows in batches(images):
                    assert_same(ort(images[rows]), rows_of(expected, rows), settings, scale, unsure[rows], last_exit=4)
        assert close <= 2
        for number, settings in enumerate(({"name": "never"}, {"name": "fixed", "exit_index": 2})):
            model.set_exit_policy(settings)
            cut = export_parts(model, exits_that_run(model.exit_policy, 5))
            segments.set_exit_policy(settings)
            for ort in (opened(tmp_path / str(number), model, cut, "single"), segments):
                for rows in batches(images):
                    assert_same(ort(images[rows]), rows_of(model(images), rows), settings, scale)


def executed(session, images):
    """How often each node was run, by ONNX Runtime's own account."""
    session.run(None, {"pixel_values": images.numpy()})
    with open(session.end_profiling()) as file:
        events = json.load(file)
    return Counter(
        event["name"].removesuffix("_kernel_time")
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )


def nodes_until(graph, exit_index):
    """Names of the nodes that must run, and no others, for rows to come as far as an exit and back."""
    nodes = Counter(node.name for node in graph.node if node.op_type != "Constant")
    branch = [node for node in graph.node if node.op_type == "If"]
    if branch:
        bodies = {attribute.name: attribute.g for attribute in branch[0].attribute}
        if exit_index == 0:
            return nodes + nodes_until(bodies["then_branch"], 0)
        return nodes + nodes_until(bodies["else_branch"], exit_index - 1)
    return nodes


@version_independent
@only_vit
@pytest.mark.parametrize("name", ["confidence", "patience"])
@torch.no_grad()
def test_nodes_run_are_those_of_the_parts_reached(exported, name, tmp_path):
    model, images, parts = exported
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads, options.enable_profiling = 3, 1, True
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.profile_file_prefix = str(tmp_path / "profile")
    first = run_all(model.segments(), State({"pixel_values": images}))[0].softmax(-1).amax(-1)
    for deepest in range(NUM_EXITS + 1):
        if name == "confidence":
            # half of the samples exit at the first exit, the others at the deepest one
            before = [between(first), *[2.0] * NUM_EXITS][:deepest]
            settings = {"name": name, "threshold": [*before, *[-2.0] * (NUM_EXITS - deepest)]}
        else:
            settings = {"name": name, "patience": 2 if deepest else 1}
        model.set_exit_policy(settings)
        index = model(images).exit_index
        single, mixed = images[index == deepest][:1], images[index <= deepest]
        assert model(single).exit_index.tolist() == [deepest]
        shallowest = 0 if name == "confidence" or not deepest else 1
        assert {shallowest, deepest} <= set(model(mixed).exit_index.tolist()) <= set(range(deepest + 1))
        graph = composed(model, parts)
        expected = nodes_until(graph.graph, deepest)
        for rows in (single, mixed):
            session = onnxruntime.InferenceSession(graph.SerializeToString(), options)
            ran = executed(session, rows)
            assert ran == expected, (ran - expected, expected - ran)
            for part in parts:
                own = Counter(
                    f"e{part.exit_index}_part_{node.name}"
                    for node in part.model.graph.node
                    if node.op_type != "Constant"
                )
                assert own
                assert sum((ran & own).values()) == (sum(own.values()) if part.exit_index <= deepest else 0)


@pytest.fixture(scope="module")
def small():
    """A model whose samples exit at both places where patience 2 lets them, images, photos, and its parts as ONNX."""
    images = tiny_images(9)
    photos = [Image.fromarray(rng(shade).integers(0, 256, (20, 30, 3), np.uint8)) for shade in range(6)]
    processor = make_processor(IMAGE_SIZE)
    names = [f"class {index}" for index in range(NUM_LABELS)]
    for number in range(50):
        model = tiny_model("vit", number, **SMALL)
        model.set_exit_policy("patience", patience=2)
        with torch.no_grad():
            exit_logits = torch.stack(model(images, early_exit=False).exit_logits)
            answers = model(processor(photos, return_tensors="pt")["pixel_values"])
            best, second = torch.cat([exit_logits.flatten(0, 1), answers.logits]).topk(2).values.unbind(-1)
            taken = set(model(images).exit_index.tolist())
        if taken == {1, 2} and (best - second).min() > 1e-4 and len(set(answers.logits.argmax(-1).tolist())) > 1:
            break
    else:
        raise AssertionError("no such model in 50")
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    labels = [names[label] for label in answers.logits.argmax(-1).tolist()]
    return model, images, photos, labels, export_parts(model, range(3))


@pytest.fixture
def parts_of_small(small, monkeypatch):
    """The parts of that model need not be exported again, which takes long."""
    parts = small[-1]
    monkeypatch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda _, exits: [parts[index] for index in exits])


@pytest.mark.parametrize("layout", ["single", "segments", "all_exits"])
@torch.no_grad()
def test_folder_of_every_layout(layout, small, parts_of_small, tmp_path, capsys):
    model, images, photos, labels, _ = small
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "onnx"), "--layout", layout]) == 0
    assert "as the model does" in capsys.readouterr().out
    ort, expected = ORTHighway.from_pretrained(tmp_path / "onnx", threads=1), model(images)
    for rows in (images, images[:1]):
        torch.testing.assert_close(ort(rows).logits, model(rows).logits, atol=1e-4, rtol=0)
    assert ort(images).exit_layer.tolist() == expected.exit_layer.tolist()
    classify = pipeline("image-classification", model=ort, image_processor=make_processor(IMAGE_SIZE), device="cpu")
    assert [answer[0]["label"] for answer in classify(photos, batch_size=2)] == labels
    ort.set_exit_policy("patience", patience=1)
    assert set(ort(images).exit_index.tolist()) == {0}
    if layout == "single":
        with pytest.raises(ValueError, match="decides by 'patience', not by 'confidence'"):
            ort.set_exit_policy("confidence", threshold=0.5)
        with pytest.raises(ValueError, match="always exits early"):
            ort(images, early_exit=False)
    else:
        ort.set_exit_policy("confidence", threshold=2.0)
        full = ort(images, early_exit=False)
        torch.testing.assert_close(full.logits, model(images, early_exit=False).logits, atol=1e-4, rtol=0)
        assert len(full.exit_logits) == 3 and set(ort(images).exit_index.tolist()) == {2}
        assert set(ort(images, max_depth=2).exit_layer.tolist()) == {2}


@version_independent
def test_infer_needs_no_torch(tmp_path):
    model = tiny_model("vit", num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    generator, processor = rng(), make_processor(IMAGE_SIZE)
    files = [tmp_path / f"{number}.png" for number in range(4)]
    for file in files:
        Image.fromarray(generator.integers(0, 255, (24, 31, 3), np.uint8)).save(file)
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores = model(pixels, early_exit=False).exit_logits[0].softmax(-1).amax(-1)
        ranked = scores.sort().values
        model.set_exit_policy("confidence", threshold=between(torch.cat([ranked[:1], ranked, ranked[-1:]])))
        expected = model(pixels)
    assert set(expected.exit_layer.tolist()) == {1, 2}
    export_onnx(model, tmp_path / "onnx", processor=processor)
    done = subprocess.run(
        [sys.executable, tmp_path / "onnx" / "infer.py", *files], capture_output=True, text=True, check=True
    )
    for line, logits, depth, score in zip(
        done.stdout.splitlines(), expected.logits, expected.exit_layer, expected.exit_score, strict=True
    ):
        assert f"{model.config.id2label[int(logits.argmax())]} after {depth} blocks" in line
        assert float(line.split()[-1]) == pytest.approx(score.item(), abs=1e-3)
    source = (tmp_path / "onnx" / "infer.py").read_text()
    assert "torch" not in source and "transformers" not in source


def test_a_folder_without_an_image_processor(small, parts_of_small, tmp_path, capsys, monkeypatch):
    small[0].save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "processor")
    command = ["export", str(tmp_path / "model"), str(tmp_path / "onnx")]
    with monkeypatch.context() as patch:
        patch.setattr("lgvit_hf.hub.loading.load_highway", lambda _: pytest.fail("the model was opened first"))
        for options, place in (([], "model"), (["--processor", str(tmp_path / "none")], "none")):
            assert main([*command, *options]) == 2
            error = capsys.readouterr().err
            assert f"{place}: no preprocessor_config.json there" in error and "--processor FOLDER|NAME" in error
    assert main([*command, "--processor", str(tmp_path / "processor")]) == 0
    written = [
        json.loads((tmp_path / name / "preprocessor_config.json").read_text()) for name in ("onnx", "processor")
    ]
    assert written[0] == written[1] and (tmp_path / "onnx" / "infer.py").is_file()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_files_that_would_be_too_large(precision, tmp_path, monkeypatch):
    model = tiny_model("vit", **SMALL)
    model.set_exit_policy("patience", patience=2)
    sizes = weight_bytes(copy.deepcopy(model).half() if precision == "float16" else model, [0, 1, 2])
    monkeypatch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr("lgvit_hf.export.segment_graphs.MAX_FILE_BYTES", sum(sizes) - 1)
    advice = {"float32": "or precision='float16'", "int8": r"or precision='float16' .*\(int8 is made of"}
    for layout in ("single", "all_exits"):
        with pytest.raises(ValueError, match=r"model\.onnx would hold .* GB; use layout='segments' .*") as error:
            export_onnx(model, tmp_path / "onnx", layout, precision=precision)
        assert error.match(advice.get(precision, r"use layout='segments' \(--layout segments\)$"))
    monkeypatch.setattr("lgvit_hf.export.segment_graphs.MAX_FILE_BYTES", max(sizes) - 1)
    with pytest.raises(ValueError, match=r"segment_0\d\.onnx would hold .* use more exits, which make smaller"):
        export_onnx(model, tmp_path / "onnx", "segments", precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_counted_as_the_files_hold_them(small, tmp_path, monkeypatch):
    model, _, _, _, parts = small
    sizes = weight_bytes(model, [0, 1, 2])
    held = [sum(onnx.numpy_helper.to_array(each).nbytes for each in part.model.graph.initializer) for part in parts]
    # shapes and other small constants are counted in the files alone
    assert all(0 <= found - size < 1000 for found, size in zip(held, sizes, strict=True)), (held, sizes)
    monkeypatch.setattr("lgvit_hf.export.segment_graphs.MAX_FILE_BYTES", max(sizes))
    monkeypatch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda *_: parts)
    assert len(export_onnx(model, tmp_path / "onnx", "segments").files) == 3


@version_independent
@torch.no_grad()
def test_equal_blocks_are_translated_once(monkeypatch):
    # without what other tests have translated
    monkeypatch.setattr(segment_graphs, "_exported", segment_graphs._exported.__wrapped__)
    translated, translate = [], torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *given, **named: translated.append(1) or translate(*given, **named)
    )
    model = tiny_model("vit", num_hidden_layers=6, exit_positions=[2, 3, 4], exit_types="linear")
    # what transformers calls the way to its blocks depends on its version
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    model.get_submodule(blocks[4]).layernorm_before.eps = 0.5  # computes something else
    images, parts = tiny_images(3), export_parts(model, range(4))
    # the stem, a block, the block of its own, an exit, the final classifier
    assert len(translated) == 5
    state, expected = {"pixel_values": images.numpy()}, run_all(model.segments(), State({"pixel_values": images}))
    for part, logits in zip(parts, expected, strict=True):
        session = onnxruntime.InferenceSession(part.model.SerializeToString())
        names = [entry.name.removesuffix("_out") for entry in session.get_outputs()]
        state = dict(zip(names, session.run(None, state), strict=True))
        np.testing.assert_allclose(state.pop("logits"), logits.numpy(), atol=1e-4)
    weights = {entry.name for part in parts for entry in part.model.graph.initializer}
    assert {f"0_{block}.layernorm_after.weight" for block in blocks[2:5]} <= weights


@version_independent
def test_rows_that_rounding_decides():
    clear, other, tie = [2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [2.0, 2.0 - 1e-6, 0.0]
    rows = [
        [clear, clear, clear],
        [tie, clear, clear],
        [clear, clear, tie],
        [clear, tie, other],
        [clear, other, clear],
    ]
    exit_logits, depths = torch.tensor(rows).transpose(0, 1), [1, 2, 3]

    def found(name, **settings):
        return undecided_samples(build_policy({"name": name, **settings}, 2), exit_logits, depths, 2).tolist()

    assert found("patience", patience=2) == [False, True, True, True, False]
    assert found("patience", patience=1, exits=[1]) == [False, False, True, True, False]
    assert found("confidence", threshold=0.9) == [False] * 5
    sure = exit_logits[0, 0].softmax(-1).max().item()
    assert found("confidence", threshold=[sure, 0.0]) == [True, False, True, True, True]


@version_independent
@pytest.mark.parametrize("name", ["confidence", "patience", "never"])
@torch.no_grad()
def test_what_an_export_is_tried_on(name):
    model = tiny_model("vit", num_hidden_layers=4, exit_positions=[1, 2, 3], exit_types="linear")
    model.set_exit_policy(name, **{"confidence": {"threshold": 0.5}, "patience": {"patience": 2}, "never": {}}[name])
    tried = list(trials(model, list(range(4)) if name != "never" else [3]))
    for trial in tried:
        expected = model.set_exit_policy(trial.policy) or model(trial.images)
        same = expected.exit_index == trial.expected.exit_index
        assert bool((same | trial.undecided).all())
        torch.testing.assert_close(expected.logits[same], trial.expected.logits[same], atol=1e-4, rtol=0)
    forced = {(len(trial.images), *trial.expected.exit_index.unique().tolist()) for trial in tried}
    everywhere = {"confidence": range(4), "patience": (0, 3), "never": (3,)}[name]
    assert {(size, index) for size in (1, 2, 7) for index in everywhere} <= forced
    assert 32 in {entry[0] for entry in forced}
    if name == "confidence":
        assert any(entry[0] == 32 and len(entry) > 2 for entry in forced)


@version_independent
def test_a_file_that_answers_otherwise_is_not_kept(small, parts_of_small, tmp_path, monkeypatch):
    model = copy.deepcopy(small[0])
    export_onnx(model, tmp_path / "good")
    with torch.no_grad():
        model.classifier.bias += 1.0
    with pytest.raises(
        ValueError, match="does not answer as the model does: .* samples exit elsewhere, and logits differ"
    ):
        verify(model, tmp_path / "good")
    monkeypatch.setattr("lgvit_hf.export.onnx_export.verify", lambda *_: (_ for _ in ()).throw(ValueError("no")))
    with pytest.raises(ValueError, match="no"):
        export_onnx(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    file = tmp_path / "good" / "model.onnx"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not the file that was written"):
        ORTHighway.from_pretrained(tmp_path / "good")
    with pytest.raises(OSError, match="not an exported highway"):
        ORTHighway.from_pretrained(tmp_path)


@version_independent
def test_what_cannot_be_exported(tmp_path):
    model = tiny_model("vit", num_hidden_layers=2, exit_positions=[1], exit_types="linear")
    with pytest.raises(ValueError, match="layout='nested' is none of single, segments, all_exits"):
        export_onnx(model, tmp_path / "out", "nested")
    model.set_exit_policy(lambda logits, memory: (logits[:, 0] > 0, memory))
    with pytest.raises(ValueError, match="layout='segments' runs any policy"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

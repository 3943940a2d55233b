"""An exported highway is taken where a PyTorch model is: the same call and tables, calibrated and timed; honestly."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from torch.nn import functional
from transformers import pipeline

from lgvit_hf import ExitTable, ORTHighway, ViTHighway, ViTHighwayConfig, build_policy
from lgvit_hf.cli import main
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, make_processor
from lgvit_hf.engine import replay
from lgvit_hf.evaluation.benchmark import benchmark, wall_clock_speed_up
from lgvit_hf.evaluation.calibration import calibrate, fit_temperature
from lgvit_hf.evaluation.cost_table import architecture, measure_cost_table
from lgvit_hf.evaluation.costs import Costs, model_macs
from lgvit_hf.evaluation.exit_table import collect, weights_digest
from lgvit_hf.evaluation.report import evaluate, evaluate_as_text
from lgvit_hf.evaluation.report_text import benchmark_as_text, verdict
from lgvit_hf.evaluation.threshold_search import confidence_scores
from tests.seeds import rng, seeded
from tests.tiny import scrambled, tiny_images

onnx = pytest.importorskip("onnx", reason='pip install "lgvit-hf[onnx]"')
pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')

from lgvit_hf.export.onnx_export import export_onnx  # noqa: E402
from lgvit_hf.export.quantization import quantize  # noqa: E402
from lgvit_hf.export.segment_graphs import export_parts  # noqa: E402
from lgvit_hf.runtimes.manifest import Manifest  # noqa: E402
from lgvit_hf.serving.device.info import file_digest  # noqa: E402

version_independent = pytest.mark.version_independent
LAYOUTS = ("single", "segments", "all_exits")
FIELDS = ("logits", "exit_layer", "exit_index", "exit_score")
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def images():
    return tiny_images(40, 8)


@pytest.fixture(scope="module")
def photos():
    return [Image.new("RGB", (9, 7), tuple(rng(number).integers(0, 256, 3).tolist())) for number in range(7)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, images, photos):
    """A random highway for digits, with exits behind blocks 1 and 2 of 3; its policy takes all three."""
    names = [str(digit) for digit in range(10)]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    exits = {"exit_positions": [1, 2], "exit_types": ["conv1_1", "linear"]}
    processor = make_processor(8)
    digits = stacked(ProcessedImages(load_images("digits").test, processor))
    others = torch.cat([digits, processor(photos, return_tensors="pt")["pixel_values"]])
    for number in range(100):
        seeded(number)
        model = scrambled(ViTHighway(ViTHighwayConfig(image_size=8, patch_size=4, **sizes, **labels, **exits)))
        policies = policies_of(model, images)
        model.set_exit_policy(policies["saved"])
        if is_settled(model, policies, images, [images.bfloat16().float(), images.half().float(), others], photos):
            break
    else:
        raise AssertionError("no such model in 100")
    folder = tmp_path_factory.mktemp("models") / "highway"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def stacked(dataset):
    return torch.stack([item["pixel_values"] for item in dataset])


@torch.no_grad()
def exit_logits_of(model, pixels):
    return torch.stack(model(pixels, early_exit=False).exit_logits)


def is_settled(model, policies, images, others, photos):
    """Whether rounding decides nothing, and each policy takes the exits that it can."""
    exit_logits, depths = exit_logits_of(model, images), [1, 2, 3]
    all_logits = [exit_logits, *(exit_logits_of(model, pixels) for pixels in others)]
    best, second = torch.cat(all_logits, 1).topk(2).values.unbind(-1)
    if (best - second).min() < 1e-4:
        return False
    for name, policy in policies.items():
        for logits in all_logits if name in ("saved", "changed") else all_logits[:1]:
            left = [replay(logits, depths, build_policy(moved(policy, step), 2)) for step in (-ROUNDING, 0, ROUNDING)]
            if any((each.exit_index != left[1].exit_index).any() for each in left):
                return False
        if len(set(replay(exit_logits, depths, build_policy(policy, 2)).exit_index.tolist())) < AT_LEAST[name]:
            return False
    # a pipeline whose answers are all alike would show nothing
    return len(set(all_logits[-1][-1, -len(photos) :].argmax(-1).tolist())) > 1


def moved(policy, step):
    """A policy whose threshold is another by `step`."""
    if callable(policy):
        return partial(policy, step=step) if policy is positive else started(partial(policy, step=step))
    if "threshold" not in policy:
        return policy
    threshold = policy["threshold"]
    return {
        **policy,
        "threshold": [number + step for number in threshold] if isinstance(threshold, list) else threshold + step,
    }


def policies_of(model, images):
    """Policies whose thresholds lie in gaps of the scores, as many above as below."""
    exit_logits = exit_logits_of(model, images)

    def cuts(name, share=0.5, **settings):
        judge = build_policy({"name": name, "threshold": 0.0, **settings}, 2)
        scores = [judge(logits, {}, index)[1]["score"].sort().values for index, logits in enumerate(exit_logits[:2])]
        place = int(share * len(images))
        return [score[place - 1 : place + 1].mean().item() for score in scores]

    calm, warm = [1.5, 1.0], [2.0, 0.5]
    return {
        "saved": {"name": "confidence", "threshold": cuts("confidence")},
        # fewer samples exit at the first exit
        "changed": {
            "name": "confidence",
            "threshold": cuts("confidence", 0.75, temperature=calm),
            "temperature": calm,
        },
        "patience": {"name": "patience", "patience": 2},
        "second exit": {"name": "patience", "patience": 1, "exits": [1]},
        "patience_confidence": {"name": "patience_confidence", "threshold": cuts("entropy"), "patience": 2},
        "entropy": {"name": "entropy", "threshold": cuts("entropy")},
        "margin": {"name": "margin", "threshold": cuts("margin", temperature=warm), "temperature": warm},
        "fixed": {"name": "fixed", "exit_index": 1},
        "never": {"name": "never"},
        "rule": positive,
        "counting": counting,
    }


def positive(logits, memory, step=0.0):
    """Exit where the first logit is positive: a policy without a name."""
    return logits[:, 0] > step, memory


def counting(logits, memory, step=0.0):
    """Exit at the second exit that is sure: a policy with a memory of its own."""
    sure = memory["sure"] + (logits.softmax(-1).amax(-1) > 0.3 + step)
    return sure >= 2, {"sure": sure}


def started(rule):
    rule.start = lambda batch_size, device: {"sure": torch.zeros(batch_size, dtype=torch.int64, device=device)}
    return rule


started(counting)
# how many exits a policy must take, or nothing is compared
AT_LEAST = {"saved": 3, "changed": 3, "patience": 2, "second exit": 1, "patience_confidence": 2, "entropy": 3}
AT_LEAST |= {"margin": 3, "fixed": 1, "never": 1, "rule": 3, "counting": 2}


@pytest.fixture
def model(checkpoint):
    return ViTHighway.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def saved(checkpoint):
    """The policy in its config."""
    return json.loads((checkpoint / "config.json").read_text())["exit_policy"]


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """The highway in each layout; of the same parts, which take long."""
    home, model = tmp_path_factory.mktemp("exports"), ViTHighway.from_pretrained(checkpoint).eval()
    parts = export_parts(model, range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lgvit_hf.export.onnx_export.export_parts", lambda _, exits: [parts[index] for index in exits])
        for layout in LAYOUTS:
            export_onnx(model, home / layout, layout, processor=make_processor(8))
    return {layout: home / layout for layout in LAYOUTS}


@pytest.fixture
def copies(folders, tmp_path):
    """The same, to be changed."""
    return {layout: shutil.copytree(folder, tmp_path / layout) for layout, folder in folders.items()}


def rows_of(model, images):
    """A dataset whose labels are what the full model answers."""
    with torch.no_grad():
        labels = model(images, early_exit=False).logits.argmax(-1).tolist()
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def assert_same(found, expected):
    for name in FIELDS:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0, equal_nan=True)


def lgvit(*arguments):
    return main([str(argument) for argument in arguments])


# -- the call --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_same_call_and_answers(layout, folders, model, images):
    ort = ORTHighway.from_pretrained(str(folders[layout]), threads=1)
    assert not ort.training and ort.exit_policy == model.exit_policy
    for rows in (images, images[:1], images[5:7], images.flip(0)):
        assert_same(ort(rows), model(rows))
    assert len(set(model(images).exit_index.tolist())) == 3, "or nothing is compared"
    labels = torch.arange(40) % 10
    found, expected = ort(images, labels=labels), model(images, labels=labels)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=0)
    assert list(found) == list(expected)
    as_tuple = ort(images, labels=labels, return_dict=False)
    assert [tensor.dtype for tensor in as_tuple] == [tensor.dtype for tensor in expected.values()]
    for dtype in (torch.bfloat16, torch.float16):
        assert_same(ort(pixel_values=images.to(dtype)), model(images.to(dtype).float()))


@version_independent
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_row_of_nan_never_leaves(layout, folders, model, images):
    images = images.clone()
    images[[0, 3, 4]] = float("nan")
    found = ORTHighway.from_pretrained(folders[layout])(images)
    assert_same(found, model(images))
    assert found.exit_index[[0, 3, 4]].tolist() == [2, 2, 2]


@version_independent
@pytest.mark.parametrize("layout", ["segments", "all_exits"])
@torch.no_grad()
def test_all_exits_and_bounds(layout, folders, model, images):
    ort, labels = ORTHighway.from_pretrained(folders[layout]), torch.arange(40) % 10
    found, expected = (m(images, labels=labels, early_exit=False) for m in (ort, model))
    assert set(expected) - set(found) == {"exit_features"} and found.exit_score is None
    for name in ("loss", "logits", "exit_logits", "exit_layer", "exit_index"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=0)
    for bounds in ({"min_depth": 2}, {"max_depth": 2}, {"min_depth": 2, "max_depth": 2}, {"max_depth": 1}):
        assert_same(ort(images, **bounds), model(images, **bounds))
    for m in (ort, model):
        with pytest.raises(ValueError, match="max_depth=0 is shallower than the first exit"):
            m(images, max_depth=0)
        with pytest.raises(ValueError, match="they mean nothing when all exits run"):
            m(images, early_exit=False, max_depth=1)


@version_independent
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_batch(layout, folders, images):
    ort = ORTHighway.from_pretrained(folders[layout])
    for bad in (images[:0], images[0], images[:, :1], images[..., :4]):
        with pytest.raises(ValueError, match=r"must be \(batch, 3, 8, 8\), with at least one image"):
            ort(bad)
    with pytest.raises(ValueError, match="You have to specify pixel_values"):
        ort()
    with pytest.raises(ValueError, match="label"):
        ort(images[:2], labels=torch.tensor([0, 10]))
    if layout == "single":
        for settings in ({"early_exit": False}, {"min_depth": 2}, {"max_depth": 2}):
            with pytest.raises(ValueError, match="a single file always exits early"):
                ort(images, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pipeline_at_any_batch_size(layout, folders, model, photos):
    processor = make_processor(8)
    with torch.no_grad():
        expected = model(processor(photos, return_tensors="pt")["pixel_values"]).logits.softmax(-1).max(-1)
    ort = ORTHighway.from_pretrained(folders[layout])
    classify = pipeline("image-classification", model=ort, image_processor=processor, device="cpu")
    for batch_size in (1, 3, 7):
        answers = [answer[0] for answer in classify(photos, batch_size=batch_size)]
        assert [answer["label"] for answer in answers] == [str(index) for index in expected.indices.tolist()]
        assert [answer["score"] for answer in answers] == pytest.approx(expected.values.tolist(), abs=1e-4)


# -- policies --------------------------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize("name", [name for name in AT_LEAST if name not in ("saved", "changed")])
@torch.no_grad()
def test_any_policy_on_segments(name, folders, model, images):
    policy = policies_of(model, images)[name]
    model.set_exit_policy(policy)
    expected = model(images)
    assert len(set(expected.exit_index.tolist())) >= AT_LEAST[name]
    for layout in ("segments", "all_exits"):
        ort = ORTHighway.from_pretrained(folders[layout])
        ort.set_exit_policy(policy)
        assert_same(ort(images), expected)
        assert ort.config.exit_policy == model.config.exit_policy


def edit(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@version_independent
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_policy_comes_from_the_config(layout, copies, model, images):
    changed = policies_of(model, images)["changed"]
    edit(copies[layout], exit_policy=changed)
    before = model(images).exit_index.tolist()
    model.set_exit_policy(changed)
    ort = ORTHighway.from_pretrained(copies[layout])
    assert_same(ort(images), model(images))
    assert ort(images).exit_index.tolist() != before


@version_independent
def test_what_a_single_file_does_not_hold(copies, saved):
    with pytest.raises(ValueError, match="parameters .'threshold'. go with a policy name"):
        ORTHighway.from_pretrained(copies["single"]).set_exit_policy(saved, threshold=0.1)
    edit(copies["single"], exit_policy={"name": "patience", "patience": 2})
    with pytest.raises(ValueError, match="this file decides by 'confidence', not by 'patience'; .*layout 'segments'"):
        ORTHighway.from_pretrained(copies["single"])
    edit(copies["single"], exit_policy=saved)
    manifest = Manifest.load(copies["single"])
    replace(manifest, exits=[1, 2]).save(copies["single"])
    with pytest.raises(ValueError, match=r"exit 0 was skipped .* its exits: \[1, 2\]"):
        ORTHighway.from_pretrained(copies["single"])
    edit(copies["single"], exit_policy={**saved, "threshold": [1.0, 0.25]})
    assert ORTHighway.from_pretrained(copies["single"]).exported.macs.heads[0] == 0.0


def test_config_of_another_highway(copies):
    edit(copies["segments"], exit_positions=[1], exit_types=["linear"], exit_policy="never")
    with pytest.raises(ValueError, match=r"answers at depths \[1, 3\], the files beside it at \[1, 2, 3\]"):
        ORTHighway.from_pretrained(copies["segments"])
    edit(copies["segments"], model_type="vit")
    with pytest.raises(ValueError, match="config.json: model type 'vit' is no highway"):
        ORTHighway.from_pretrained(copies["segments"])


@torch.no_grad()
def test_saved_with_its_policy(folders, images, tmp_path):
    ort = ORTHighway.from_pretrained(folders["segments"])
    ort.set_exit_policy("patience", patience=2)
    ort.save_pretrained(tmp_path / "copy")
    again = ORTHighway.from_pretrained(tmp_path / "copy")
    assert again.exit_policy == ort.exit_policy and again.manifest == ort.manifest
    assert_same(again(images), ort(images))


# -- tables and calibration ------------------------------------------------------------------------------------


@version_independent
def test_table_is_that_of_the_model(folders, model, images):
    rows, digests = rows_of(model, images), set()
    expected = collect(model, rows, batch_size=16)
    for layout in ("segments", "all_exits"):
        found = collect(ORTHighway.from_pretrained(folders[layout]), rows, batch_size=16)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
        assert found.labels.tolist() == expected.labels.tolist() and found.depths == expected.depths == [1, 2, 3]
        assert (
            found.costs.backbone_costs == expected.costs.backbone_costs and found.costs.heads == expected.costs.heads
        )
        assert found.costs.backbone == expected.costs.backbone > 0
        digests.add(found.weights)
    assert len({*digests, expected.weights}) == 3


@version_independent
def test_heads_of_files_are_run_unasked(folders, model):
    counted = model_macs(model)
    exported = model_macs(ORTHighway.from_pretrained(folders["segments"]))
    assert not counted.fused and exported == replace(counted, fused=True)
    assert exported.of_exit(1, evaluated=[]) == counted.of_exit(1) > counted.of_exit(1, evaluated=[])
    assert Costs([4.0, 8.0], [1.0, 0.5], fused=True).mean([0.0, 1.0], evaluated=[]) == 13.5


@version_independent
def test_table_survives_a_file(folders, model, images, tmp_path):
    ort = ORTHighway.from_pretrained(folders["segments"])
    table = collect(ort, rows_of(model, images))
    table.save(tmp_path / "table.safetensors")
    assert ExitTable.load(tmp_path / "table.safetensors", weights=weights_digest(ort)).costs == table.costs
    with pytest.raises(ValueError, match="a table of a model with other weights"):
        ExitTable.load(tmp_path / "table.safetensors", weights=weights_digest(model))


@version_independent
def test_quantized_is_another_model(copies, folders, model, images, tmp_path):
    folder = copies["segments"]
    manifest = Manifest.load(folder)
    for name in manifest.files:
        onnx.save(quantize(onnx.load(folder / name)), folder / name)
    files = {name: file_digest(folder / name) for name in manifest.files}
    replace(manifest, precision="int8", files=files).save(folder)
    ort, exact = ORTHighway.from_pretrained(folder), ORTHighway.from_pretrained(folders["segments"])
    assert weights_digest(ort) != weights_digest(exact) and "int8" in architecture(ort)
    assert len({architecture(m) for m in (ort, exact, model)}) == 3
    rows = rows_of(model, images)
    assert not torch.allclose(collect(ort, rows).logits, collect(exact, rows).logits, atol=1e-4)


def answering(logits, by, labels, right):
    """Logits whose classes change places so that the label's are the largest of `by` where `right`, else the least."""
    ranked, rows = by.argsort(-1), torch.arange(len(by))
    place = torch.where(right, ranked[:, -1], ranked[:, 0])
    classes = torch.arange(by.shape[-1]).repeat(len(by), 1)
    classes[rows, place], classes[rows, labels] = labels, place
    return logits.gather(1, classes)


@version_independent
@torch.no_grad()
def test_calibrates_to_the_same_policy(folders, model, images):
    ort = ORTHighway.from_pretrained(folders["segments"])
    expected, found = (collect(m, rows_of(model, images)) for m in (model, ort))
    labels = torch.arange(40) % 10
    last, nobody = 9.0 * functional.one_hot(labels, 10), torch.zeros(40, dtype=torch.bool)
    for policy in ("confidence", "entropy"):
        # the surer half is answered rightly at the first exit, nobody at the second, and all of them at the end
        sure = confidence_scores(expected, policy, (1.0, 1.0, 1.0))[0]
        rights = (sure > sure.median(), nobody)
        of_model, of_export = (
            replace(
                table,
                labels=labels,
                logits=torch.stack([*map(answering, table.logits, expected.logits, (labels, labels), rights), last]),
            )
            for table in (expected, found)
        )
        # halves by number, as sure as each other: where logits differ by a bit, calibration would draw others; a
        # temperature would change which rows are the surer half
        settings = {"policy": policy, "max_accuracy_drop": 0.1, "temperature": False}
        rows = sure.argsort()
        by_model, by_export, honest = (
            calibrate(table.select(rows[::2]), tested=table.select(rows[1::2]), **settings)
            for table in (of_model, replace(of_export, costs=of_model.costs), of_export)
        )
        assert by_export.policy["threshold"] == pytest.approx(by_model.policy["threshold"], abs=1e-3)
        assert by_export.mean_macs == by_model.mean_macs < by_model.full_macs
        assert honest.mean_macs < honest.full_macs
        for m in (model, ort):
            m.set_exit_policy(by_model.policy)
        left = model(images).exit_index.tolist()
        assert ort(images).exit_index.tolist() == left
        assert 10 <= left.count(0) <= 30, "or nothing is compared"
    most = torch.arange(40) % 8 != 0
    for of_model, of_export in zip(expected.logits, found.logits, strict=True):
        wanted, fitted = (
            fit_temperature(answering(logits, of_model, labels, most), labels) for logits in (of_model, of_export)
        )
        assert fitted == pytest.approx(wanted, rel=1e-2) and 1 / 49 < wanted < 49
    # a segment runs its head whether the policy asks it or not
    shares, unasked = [0.5, 0.0, 0.5], expected.costs.heads[1]
    assert found.costs.mean(shares, [0, 1]) == expected.costs.mean(shares, [0, 1])
    assert found.costs.mean(shares, [0]) == pytest.approx(expected.costs.mean(shares, [0]) + 0.5 * unasked)


# -- clocks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(checkpoint, folders, images):
    """The benchmark of the model and of its segments."""
    model = ViTHighway.from_pretrained(checkpoint)
    rows, ort = rows_of(model.eval(), images[:8]), ORTHighway.from_pretrained(folders["segments"], threads=2)
    return [benchmark(m, rows, batch_sizes=[1, 4], repeats=1) for m in (model, ort)]


@version_independent
def test_benchmark_has_every_key(reports):
    of_model, of_export = reports
    assert of_export.keys() == of_model.keys() and json.loads(json.dumps(of_export)) == of_export
    assert of_export["batches"][0].keys() == of_model["batches"][0].keys()
    assert of_export["environment"].keys() == of_model["environment"].keys()
    assert of_export["environment"]["threads"] == of_export["cost_table"]["threads"] == 2
    assert of_export["accuracies"] == of_model["accuracies"]
    assert [exit["samples"] for exit in of_export["exits"]] == [exit["samples"] for exit in of_model["exits"]]


@version_independent
def test_benchmark_does_not_say_what_is_not_known(reports):
    of_model, of_export = reports
    assert of_model["exported"] is None and of_export["exported"]["layout"] == "segments"
    assert of_export["exported"]["precision"] == "float32" and of_export["exported"]["file_bytes"] > 1000
    assert of_export["memory"] is None and of_export["parameters"] is None
    parts = of_export["profile"]
    assert [row["part"] for row in parts] == ["segment 0", "segment 1", "segment 2"]
    assert [row["depth"] for row in parts] == [1, 2, 3] and {row["parameters"] for row in parts} == {None}
    assert sum(row["macs"] for row in parts) == pytest.approx(sum(row["macs"] for row in of_model["profile"]))
    assert all(row["ms"].keys() == {"1", "4"} and min(row["ms"].values()) > 0 for row in parts)


@version_independent
def test_benchmark_text(reports):
    of_model, of_export = reports
    said = benchmark_as_text(of_export)
    assert "MB of ONNX, layout segments, float32, in onnxruntime" in said and "threads: 2" in said
    assert "an exported segment always runs its head" in verdict(of_export)[-1]
    assert "ONNX" not in benchmark_as_text(of_model)
    line = next(line for line in said.splitlines() if line.startswith("segment 2"))
    assert line.split()[2] == "3" and line.split()[4] == "-"


@version_independent
def test_cost_table(folders, model, images):
    ort = ORTHighway.from_pretrained(folders["segments"], threads=1)
    table = measure_cost_table(ort, images, [2], repeats=2)
    table.check(3, architecture(ort))
    with pytest.raises(ValueError, match="the cost table is of vit_highway: 3 blocks, .* MB of ONNX"):
        table.check(3, architecture(model))
    assert table.batch_sizes == [1, 2] and [len(times) for times in (table.backbone_costs, table.heads)] == [3, 3]
    assert all(len(times) == 2 and min(times) > 0 for times in table.backbone_costs)


# -- the other layouts -----------------------------------------------------------------------------------------


@version_independent
def test_a_single_file_is_judged_by_what_it_answers(folders, model, images):
    rows, single = rows_of(model, images), ORTHighway.from_pretrained(folders["single"])
    expected, found = (evaluate(m, rows, timed_batch_sizes=[8]) for m in (model, single))
    unknown = {"accuracy_full_model"}
    for name in set(expected["overall"]) - unknown:
        assert found["overall"][name] == pytest.approx(expected["overall"][name]), name
    for here, there in zip(found["exits"], expected["exits"], strict=True):
        for name in set(there) - {"accuracy_all", "calibration_error_all"}:
            assert here[name] == (there[name] if isinstance(there[name], str) else pytest.approx(there[name])), name
        assert here["accuracy_all"] is here["calibration_error_all"] is None
    assert found["confusion"] == expected["confusion"] and found["classes"] == expected["classes"]
    assert found["wall_clock"]["8"]["early_exit_seconds"] > 0 and found["wall_clock"]["8"]["backbone_seconds"] is None
    said = evaluate_as_text(json.loads(json.dumps(found)))
    assert "full model" not in said and "ms per image" in said and "layout single, float32, in onnxruntime" in said


@version_independent
def test_what_a_single_file_cannot_say(folders, model, images):
    rows, single = rows_of(model, images), ORTHighway.from_pretrained(folders["single"])
    for run in (
        lambda: collect(single, rows),
        lambda: benchmark(single, rows),
        lambda: measure_cost_table(single, images, [1]),
    ):
        with pytest.raises(ValueError, match="decides inside its file, .* export with layout='segments'"):
            run()


@version_independent
def test_all_exits_saves_nothing_and_says_so(folders, model, images):
    ort = ORTHighway.from_pretrained(folders["all_exits"])
    report = evaluate(ort, rows_of(model, images), timed_batch_sizes=[])
    assert report["exits"][0]["accuracy_all"] is not None and report["wall_clock"] == {}
    assert "this layout runs every exit of every sample" in evaluate_as_text(report)
    found = wall_clock_speed_up(ort, [images], repeats=1)
    assert found["wall_clock_speed_up"] == found["backbone_seconds"] / found["early_exit_seconds"]
    for run in (lambda: benchmark(ort, images), lambda: measure_cost_table(ort, images, [1])):
        with pytest.raises(ValueError, match="runs every exit of every sample, .* export with layout='segments'"):
            run()


# -- commands --------------------------------------------------------------------------------------------------


@version_independent
def test_evaluate_command(folders, tmp_path, capsys):
    accuracies = set()
    for layout in LAYOUTS:
        asked = ["--data", "digits", "--timed-batch-sizes", 32, "--output", tmp_path / f"{layout}.json"]
        assert lgvit("evaluate", folders[layout], *asked) == 0
        said = capsys.readouterr().out
        assert f"layout {layout}" in said and "wall-clock, batch  32" in said
        accuracies.add(json.loads((tmp_path / f"{layout}.json").read_text())["overall"]["accuracy"])
    assert len(accuracies) == 1
    assert lgvit("evaluate", folders["single"], "--data", "digits", "--plots", tmp_path / "plots") == 2
    assert "export with --layout segments" in capsys.readouterr().err


@pytest.fixture
def threads():
    """A number of threads that is not the usual one, which is set again afterwards."""
    usual = torch.get_num_threads()
    yield usual + 1
    torch.set_num_threads(usual)


@version_independent
def test_threads_reach_the_sessions(folders, threads):
    for asked, given in ((None, torch.get_num_threads()), (threads, threads)):
        ort = ORTHighway.from_pretrained(folders["segments"], threads=asked)
        given_to = [session.get_session_options() for session in ort.sessions]
        assert {options.intra_op_num_threads for options in given_to} == {given}
        # threads that spun on after an answer would take cores from others
        assert {options.get_session_config_entry("session.force_spinning_stop") for options in given_to} == {"1"}
        assert ort.exported.threads == given


def test_calibrate_and_benchmark_commands(copies, saved, tmp_path, capsys, threads):
    folder, costs = copies["segments"], tmp_path / "costs.json"
    fast = ["--limit", 8, "--repeats", 1, "--batch-sizes", 4, "--threads", threads]
    assert lgvit("benchmark", folder, "--data", "digits", *fast, "--cost-table", costs) == 0
    assert "an exported segment always runs its head" in capsys.readouterr().out
    assert json.loads(costs.read_text())["threads"] == threads
    asked = ["--data", "digits", "--ignore-labels", "--max-latency", 1e4, "--cost-table", costs, "--batch-size", 4]
    assert lgvit("calibrate", folder, *asked, "--policy", "entropy", "--output", tmp_path / "calibrated") == 0
    written = json.loads((tmp_path / "calibrated" / "calibration.json").read_text())
    assert ORTHighway.from_pretrained(tmp_path / "calibrated").exit_policy == build_policy(written["policy"], 2)
    assert ORTHighway.from_pretrained(folder).exit_policy == build_policy(saved, 2), "left as it was"
    assert lgvit("calibrate", folder, "--data", "digits", "--ignore-labels", "--max-accuracy-drop", 0.5) == 0
    written = json.loads((folder / "calibration.json").read_text())
    assert ORTHighway.from_pretrained(folder).exit_policy == build_policy(written["policy"], 2)
    capsys.readouterr()
    for command in (["calibrate", "--max-accuracy-drop", 0.5], ["benchmark"]):
        assert lgvit(command[0], copies["single"], "--data", "digits", *command[1:]) == 2
        assert "export with layout='segments'" in capsys.readouterr().err
    (folder / "manifest.json").write_text("{}")
    assert lgvit("evaluate", folder, "--data", "digits") == 2
    assert "manifest.json" in capsys.readouterr().err


@version_independent
def test_sweep_command(folders, tmp_path, capsys):
    asked = ["--data", "digits", "--output", tmp_path / "sweep", "--values", 0.3, 0.6]
    assert lgvit("sweep", folders["segments"], *asked, "--timed-batch-sizes", 32) == 0
    assert "clock, batch 32" in capsys.readouterr().out
    assert ExitTable.load(tmp_path / "sweep" / "table.safetensors").costs.fused

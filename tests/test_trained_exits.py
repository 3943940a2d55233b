"""`recipes/benchmarks/trained_exits.py`: models that share times, what A-ViT answers, which rows are read."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from lgvit_hf import AViT, AViTConfig, ExitTable, ViTHighway, ViTHighwayConfig
from lgvit_hf.evaluation.costs import Costs

TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TINY |= {"image_size": 8, "patch_size": 4, "num_labels": 3}


@pytest.fixture(scope="module")
def exits(benchmark):
    return benchmark("trained_exits")


@pytest.fixture(scope="module")
def halting(benchmark):
    return benchmark("trained_halting")


def test_times_are_shared_by_models_that_run_the_same(exits):
    def of(**settings):
        return exits.exits_of(SimpleNamespace(config=ViTHighwayConfig(**TINY, **settings)))

    two = {"exit_positions": [1, 2], "exit_types": "linear"}
    assert of(**two) == of(**two)
    others = [of(), of(**two | {"exit_positions": [1, 3]}), of(**two | {"exit_types": "mlp"})]
    assert len({of(**two), *others}) == 4


def test_a_linear_map_in_place_of_blocks_has_times_of_its_own(exits):
    whole = ViTHighwayConfig(**TINY)
    shorter = ViTHighwayConfig(**TINY, linear_blocks=[2, 3])
    assert exits.exits_of(SimpleNamespace(config=whole)) != exits.exits_of(SimpleNamespace(config=shorter))


def test_a_vit_is_a_table_of_one_exit_with_the_macs_of_its_tokens(halting, tmp_path):
    config = AViTConfig(**TINY, gate_scale=4.0, gate_center=1.0)
    AViT(config).save_pretrained(tmp_path / "avit")
    ViTForImageClassification(ViTConfig(**TINY)).save_pretrained(tmp_path / "plain")
    assert halting.halting_model(tmp_path / "plain") is None
    model = halting.halting_model(tmp_path / "avit")
    samples = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 3} for number in range(5)]
    table = halting.answers_of(model, samples)
    with torch.no_grad():
        out = model(torch.stack([sample["pixel_values"] for sample in samples]))
    assert table.depths == [4] and table.labels.tolist() == [0, 1, 2, 0, 1]
    torch.testing.assert_close(table.logits[0], out.logits)
    never = halting.token_macs(config, torch.full((1, 5), 4)).item()
    expected = halting.token_macs(config, out.token_depth).mean().item()
    assert table.known_costs == Costs([pytest.approx(expected)], [0.0]) and expected <= never


def test_a_vit_takes_the_median_of_its_times_at_every_batch_size(halting):
    table = halting.costs_of({1: [1.0, 3.0, 2.0], 8: [5.0]})
    of_image = [2000.0, 625.0]  # milliseconds
    assert [table.at(size).of_exit(0, []) for size in (1, 8)] == pytest.approx(of_image)
    assert [table.mean_latency([1.0], [], size) for size in (1, 8)] == pytest.approx(of_image)


def test_a_model_that_is_cut_off_answers_all_samples_at_one_exit_and_runs_no_other(exits, tmp_path):
    labels = torch.tensor([0, 1, 2, 0])
    logits = torch.randn(3, 4, 3)
    table = ExitTable(logits, labels, [1, 2, 4], Costs([1.0, 2.0, 4.0], [0.5, 0.5, 0.0]))
    for part in ("held_out", "test"):
        (tmp_path / "mixed" / "model").mkdir(parents=True, exist_ok=True)
        table.save(tmp_path / "mixed" / "model" / f"{part}.safetensors")
    right = table.right.numpy()
    curve = exits.curve_of("mixed", exits.METHODS["cut_off"], {"data": "not read"}, tmp_path, right[-1], 0)
    assert curve.costs.tolist() == [[cost] * 4 for cost in (7.0, 1.5, 3.5)]
    assert (curve.drops == right[-1].astype(float) - right[[2, 0, 1]]).all()


def test_a_cut_off_is_as_fast_as_its_costs_say_where_it_is_right(exits, tmp_path):
    labels = torch.arange(64) % 3
    right, wrong = 9 * torch.nn.functional.one_hot(labels, 3).float(), torch.zeros(64, 3)
    tables = {
        "plain": ExitTable(right[None], labels, [4], Costs([7.0], [0.0])),
        "mixed": ExitTable(
            torch.stack([wrong, right, right]), labels, [1, 2, 4], Costs([1.0, 2.5, 3.5], [0.5, 0.5, 0.0])
        ),
    }
    for row, table in tables.items():
        (tmp_path / row / "model").mkdir(parents=True)
        for part in ("held_out", "test"):
            table.save(tmp_path / row / "model" / f"{part}.safetensors")
    methods = {"cut_off": exits.Method(("mixed",), "fixed"), "ours": exits.Method(("mixed",), "confidence")}
    lines = json.loads(json.dumps(exits.at_batch_size(methods, "ours", {"data": "not read"}, tmp_path, 0)))
    at_drop = {(line["method"], line["drop"]): line for line in lines if "drop" in line}
    assert at_drop["cut_off", 0.01]["over_plain"] == pytest.approx([7 / 4] * 3, abs=1e-4)
    # it runs the first head, too, before it is sure at the second exit
    assert at_drop["ours", 0.01]["over_plain"] == pytest.approx([7 / 4.5] * 3, abs=1e-4)
    assert at_drop["cut_off", 0.01]["headline_over"] == pytest.approx([4 / 4.5] * 3, abs=1e-4)
    assert sum("drops" in line for line in lines) == 2


def test_methods_are_read_at_those_of_their_rows_that_are_trained(exits):
    found = exits.of_trained(["first6", "second6", "sdn"])
    assert found["shorter"].rows == ("first6", "second6") and found["pabee"].policy == "patience"
    assert not {*found} & {"lgvit", *exits.OURS}


def test_a_gate_and_an_ensemble_are_charged_where_a_method_has_them(exits, tmp_path):
    torch.manual_seed(0)
    table = ExitTable(torch.randn(2, 64, 3), torch.randint(3, (64,)), [2, 4], Costs([2.0, 2.0], [0.5, 0.0]))
    for row, highway in (
        ("plain", {"exit_positions": []}),
        ("mixed", {"exit_positions": [2], "exit_types": ["linear"]}),
    ):
        folder = tmp_path / row / "model"
        ViTHighway(ViTHighwayConfig(**TINY, **highway)).save_pretrained(folder)
        whole = ExitTable(table.logits[1:], table.labels, [4], Costs([4.0], [0.0]))
        for part in ("test",) if row == "plain" else ("held_out", "test"):
            (whole if row == "plain" else table).save(folder / f"{part}.safetensors")
    exits.time_rows(["plain", "mixed"], {"data": "not read"}, tmp_path, repeats=1)
    times = json.loads((tmp_path / "times.json").read_text())
    assert {*times["tables"]} == {"plain", "mixed"} and times["machine"]["threads"] == torch.get_num_threads()
    simple = times["tables"]["mixed"]["simple"]
    # as if a gate and an ensemble made all three times as slow
    times["tables"]["mixed"]["rich"] = {
        **simple,
        **{n: scaled(simple[n], 3) for n in ("backbone_costs", "heads", "select")},
    }
    (tmp_path / "times.json").write_text(json.dumps(times))
    of = {
        name: exits.curve_of(
            "mixed", exits.Method(("mixed",), policy, ensemble), {}, tmp_path, table.right[-1].numpy(), 8
        )
        for name, policy, ensemble in (("without", "confidence", False), ("with", "confidence", True))
    }
    assert of["with"].costs[0].mean() == pytest.approx(3 * of["without"].costs[0].mean(), rel=1e-4)


def test_stopped_timing_goes_on_after_the_rounds_that_are_kept(exits, tmp_path):
    found, folder = {"name": {1: []}}, tmp_path / "rounds"
    calls = {0: lambda: found["name"][1].append(float(len([*folder.iterdir()])))}
    assert exits.all_of(exits.in_rounds(calls, found, "these", folder, 2), "name") == {1: [0.0, 1.0]}
    assert exits.all_of(exits.in_rounds(calls, found, "these", folder, 3), "name") == {1: [0.0, 1.0, 2.0]}
    assert exits.in_rounds(calls, found, "these", folder, 3)[2] == {"name": {"1": [2.0]}}
    assert sorted(file.name for file in folder.iterdir()) == ["0.json", "1.json", "2.json"]
    # other rows, or another machine
    assert exits.all_of(exits.in_rounds(calls, found, "others", folder, 1), "name") == {1: [3.0]}


def scaled(values, factor):
    return [[factor * value for value in each] for each in values]

"""`recipes/benchmarks/study.py` goes on where it stopped, and the page says what its lines say."""

import json
import sys

import pytest
import torch

from lgvit_hf.data.settings import read_yaml
from tests.tiny import KINDS, tiny_images, tiny_model

DROPS = (0.0, 0.01)
TINY = {"patch_size": 8, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
pytestmark = pytest.mark.usefixtures("benchmark")


@pytest.fixture(scope="module")
def run(benchmark, tmp_path_factory):
    import study

    output = tmp_path_factory.mktemp("study")
    clock, measured = study.wall_clock_speed_up, []

    def tiny(file):
        settings = read_yaml(file)
        return settings | ({"model_settings": dict(TINY)} if "model_settings" in settings else {})

    def timed(*arguments, **options):
        measured.append(clock(*arguments, **options))
        return measured[-1]

    def run_once(runs, **_):
        for function in runs.values():
            function()
        return {"plain": [3.0, 3.0, 9.0], "fast": [2.0, 2.0, 9.0]}

    def run(*methods):
        """The study of a ViT on digits that trains two steps each; its lines."""
        words = f"study.py --data digits=digits --output {output} --backbones vit --methods {' '.join(methods)} "
        words += "--epochs 0.05 --joint-epochs 0.05 --exit-epochs 0.05 --images 32 --repeats 1 --no-export"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words.split())
            patch.setattr(study, "wall_clock_speed_up", timed)
            patch.setattr(study, "time_interleaved", run_once)
            patch.setattr(study, "DROPS", DROPS)
            patch.setattr(study, "read_yaml", tiny)
            threads = torch.get_num_threads()
            study.main()
            torch.set_num_threads(threads)
        return (output / "results.jsonl").read_text().splitlines()

    run.output, run.measured = output, measured
    return run


@pytest.mark.version_independent
def test_study_goes_on_where_it_stopped(run):
    first = run("sdn", "truncated_sdn")
    weights = run.output / "digits" / "vit" / "seed0" / "backbone" / "model.safetensors"
    trained = weights.stat().st_mtime_ns
    # killed while it wrote the second line
    (run.output / "results.jsonl").write_text(first[0] + "\n" + first[1][:40])
    second = run("sdn", "truncated_sdn", "ours_frozen", "blocks6", "avit")
    assert second[0] == first[0] and second[1] == first[1][:40]
    rows = [json.loads(line) for line in (second[0], *second[2:])]
    assert [row["method"] for row in rows] == ["sdn", "truncated_sdn", "ours_frozen", "blocks6", "avit"]
    assert weights.stat().st_mtime_ns == trained
    assert run("sdn", "truncated_sdn", "ours_frozen", "blocks6", "avit") == second


def test_lines_say_what_the_models_do(run):
    import study

    run("sdn", "ours_frozen", "blocks6", "avit")
    rows = {row["method"]: row for row in study.measured(run.output / "results.jsonl")}
    assert {"sdn", "ours_frozen", "blocks6", "avit"} <= set(rows)
    plain = rows["sdn"]["plain_accuracy"]
    home = run.output / "digits" / "vit" / "seed0"
    logs = {folder.parent.name: json.loads(folder.read_text()) for folder in home.glob("*/training.json")}
    trainings = {"sdn": ["backbone", "sdn"], "ours_frozen": ["backbone", "frozen"], "blocks6": ["blocks6"]}
    for method, names in trainings.items():
        assert rows[method]["training_seconds"] == pytest.approx(sum(logs[name]["seconds"] for name in names))
    for method, row in rows.items():
        assert row["plain_accuracy"] == plain and row["points"]
        for point in row["points"]:
            assert point["accuracy"] == pytest.approx(plain - point["drop"])
            assert point["batch_size"] in study.BATCH_SIZES
            if method in ("sdn", "ours_frozen"):
                assert point["speed_up"] in [times["wall_clock_speed_up"] for times in run.measured]
            else:
                # medians of the other clock, which stands still here
                assert point["speed_up"] == pytest.approx(1.5)
    # the backbone was not touched, and never leaving is always accurate enough
    frozen = rows["ours_frozen"]
    assert frozen["exit_accuracies"][-1] == plain
    assert {point["asked_drop"] for point in frozen["points"]} == set(DROPS)
    # the smaller model is trained for as long as backbone and exits together
    assert rows["blocks6"]["points"][0]["layer_speed_up"] == 2
    assert logs["blocks6"]["steps"] > logs["backbone"]["steps"]


def line(method, title, speed, *, seed=0, drop=0.01, **facts):
    points = [
        {
            "asked_drop": drop,
            "batch_size": size,
            "accuracy": 0.75,
            "drop": 0.005,
            "drop_plus_minus": 0.002,
            "layer_speed_up": 3.0,
            "macs_speed_up": 2.5,
            "speed_up": speed,
        }
        for size in (1, 8, 32)
    ]
    return {
        "data": "photos",
        "backbone": "vit",
        "seed": seed,
        "method": method,
        "title": title,
        "plain_accuracy": 0.76,
        "rows": {"validation": 10, "test": 20},
        "timing": {"images": 32, "repeats": 1},
        "budget": {"backbone": 2, "joint": 1, "exits": 1},
        "machine": {"cpu": "some", "threads": 1},
        "points": points,
        **facts,
    }


@pytest.mark.version_independent
def test_page_says_who_is_ahead(tmp_path, monkeypatch):
    import study_page

    rows = [
        line("sdn", "SDN", 1.5, depths=[1, 2], exit_accuracies=[0.5, 0.75], head_share=0.01),
        line("ours", "ours", 2.0, depths=[1, 2], exit_accuracies=[0.6, 0.76], head_share=0.02),
        line("ours", "ours", 3.0, seed=1, depths=[1, 2], exit_accuracies=[0.6, 0.76], head_share=0.02),
    ]
    smaller = line("blocks6", "6 blocks", 1.7)
    smaller["points"] = [{key: p[key] for key in p if key != "asked_drop"} for p in smaller["points"]]
    rows.append(smaller)
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(sys, "argv", ["study_page.py", str(tmp_path / "results.jsonl"), str(tmp_path / "page.md")])
    study_page.main()
    page = (tmp_path / "page.md").read_text()
    assert "*ours* is at 2.50x, ahead of every other that has a setting for it" in page
    assert "| `sdn` | SDN | 75.0% | +0.50 ± 0.20 | 3.00x | 2.50x | 1.50x | 1.50x | 1.50x |" in page
    assert "as many epochs as backbone and exits together: 0.5 pt below, 1.70x." in page
    assert "--images 32 --repeats 1" in page
    assert "| SDN | 1.50x |" in page and "| 6 blocks | 1.70x, 0.5 pt below |" in page
    assert "| ours | 60.0 | 76.0 | 2.0% |" in page and "seeds 0, 1" in page
    assert (tmp_path / "results_photos_vit.png").stat().st_size > 5000
    (tmp_path / "results.jsonl").write_text(json.dumps(line("ours", "ours", 1.2)) + "\n" + json.dumps(rows[0]) + "\n")
    study_page.main()
    assert "behind SDN" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("backbone", KINDS)
def test_the_model_of_transformers_answers_as_the_backbone(backbone, tmp_path):
    from delivered import plain_model

    model = tiny_model(backbone)
    model.set_exit_policy("never")
    model.save_pretrained(tmp_path)
    pixels = tiny_images(2)
    with torch.no_grad():
        plain = plain_model(str(tmp_path))
        assert type(plain).__module__.startswith("transformers.")
        torch.testing.assert_close(plain(pixels).logits, model(pixels).logits, atol=1e-5, rtol=1e-5)

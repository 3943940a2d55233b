"""`lgvit visualize`: the right images, what the model made of them, and the pixels that it was shown."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, ViTImageProcessor

from lgvit_hf import AViT, AViTConfig
from lgvit_hf.cli import main
from lgvit_hf.cli.main import build_parser
from lgvit_hf.data import held_out
from lgvit_hf.data.datasets import load_images
from lgvit_hf.data.processing import ProcessedImages, make_processor
from lgvit_hf.evaluation import plots
from lgvit_hf.evaluation.image_scores import as_seen, first_and_last, limits_of, scores_by_exit, widest_spread
from lgvit_hf.policies import build_policy
from tests.seeds import rng, seeded
from tests.test_evaluation import in_a_gap
from tests.tiny import scrambled, tiny_images, tiny_model

version_independent = pytest.mark.version_independent

NUM_BLOCKS = 5


def save_avit(folder, size=(16, 16), images=None, **settings):
    """An AViT of random weights: the first whose tokens (those of `images`) halt at four different depths or more."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": NUM_BLOCKS}
    settings = {"num_labels": 10, "gate_scale": 2.0, "gate_center": 1.0, **settings}
    height, width = size
    processor = ViTImageProcessor(
        size={"height": height, "width": width}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]
    )
    processor.save_pretrained(folder)
    pixels = tiny_images(6, size) if images is None else pixels_of(images, AutoImageProcessor.from_pretrained(folder))
    for number in range(100):
        seeded(number)
        model = scrambled(AViT(AViTConfig(**small, image_size=list(size), patch_size=4, **settings)))
        with torch.no_grad():
            if len(model(pixels).token_depth.unique()) >= 4:
                break
    model.save_pretrained(folder)
    return folder


def pixels_of(images, processor):
    return torch.stack([item["pixel_values"] for item in ProcessedImages(images, processor)])


def few_digits(**settings):
    """The first 48 images of the digits' test split."""
    return load_images("digits", **settings).test.select(range(48))


@pytest.fixture
def digits(monkeypatch):
    few = SimpleNamespace(splits=SimpleNamespace(test=few_digits()))
    monkeypatch.setattr(held_out, "load_known", lambda *_, **__: few)


@pytest.fixture(scope="module")
def avit(tmp_path_factory):
    return save_avit(tmp_path_factory.mktemp("models") / "avit", images=few_digits())


@pytest.fixture(scope="module")
def highway(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "highway"
    model, pixels = tiny_model("vit", num_labels=10), pixels_of(few_digits(), make_processor(16))
    with torch.no_grad():
        scores = torch.stack(model(pixels, early_exit=False).exit_logits).softmax(-1).amax(-1)
    # some leave at the first, the third, and the fourth exit or the last
    first = in_a_gap(scores[0])
    third = in_a_gap(scores[2][scores[0] < first])
    model.set_exit_policy("confidence", threshold=[first, 1.0, third, 0.999])
    model.save_pretrained(folder)
    make_processor(16).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Six images of six sizes, without labels."""
    (tmp_path / "photos").mkdir()
    for number in range(6):
        noise = rng(number).integers(0, 256, (9 + number, 40 - number, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path / "photos"


@pytest.fixture
def drawn(monkeypatch):
    """What the plots are given, by name; they draw all the same."""
    calls = {}

    def spy(name):
        draw = getattr(plots, name)

        def keep_and_draw(file, *arguments, **settings):
            calls[name] = (*arguments, settings)
            draw(file, *arguments, **settings)

        monkeypatch.setattr(plots, name, keep_and_draw)

    for name in ("plot_token_depths", "plot_tokens_alive", "plot_scores"):
        spy(name)
    return calls


def visualize(checkpoint, data, output, *others):
    return main(list(map(str, ["visualize", checkpoint, "--data", data, "--output", output, *others])))


def test_tokens_of_the_images_with_the_widest_spread(avit, digits, drawn, tmp_path, capsys):
    assert visualize(avit, "digits", tmp_path / "out", "--images", 3) == 0
    assert capsys.readouterr().out == f"drawn in {tmp_path / 'out'}: depths.png, tokens_alive.png\n"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"depths.png", "tokens_alive.png"}
    assert all(Image.open(file).width > 500 for file in (tmp_path / "out").iterdir())

    rows = few_digits()
    with torch.no_grad():
        out = AViT.from_pretrained(avit).eval()(pixels_of(rows, AutoImageProcessor.from_pretrained(avit)))
    depths = out.token_depth.numpy()
    assert len(np.unique(depths)) >= 4, "a case in which tokens halt at different depths"
    # in whole numbers, in which equal spreads are equal
    spread = depths.shape[1] * (depths**2).sum(1) - depths.sum(1) ** 2

    given, settings = drawn["plot_tokens_alive"]
    order = settings["shown"]
    assert (given == depths).all() and settings["num_blocks"] == NUM_BLOCKS and len({*order}) == 3
    assert spread[order].tolist() == np.sort(spread)[:-4:-1].tolist()
    seen, answers, settings = drawn["plot_token_depths"]
    assert settings["num_blocks"] == NUM_BLOCKS and settings["title"].startswith("3 of 48 images")
    for row, image, answer in zip(order, seen, answers, strict=True):
        assert answer["class_token"] == depths[row, 0]
        assert answer["depths"].tolist() == depths[row, 1:].reshape(4, 4).tolist()
        assert answer["label"] == str(rows[row]["label"])
        assert answer["predicted"] == str(out.logits[row].argmax().item())
        shown = rows[row]["image"].convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
        assert (image == np.asarray(shown)).all()


@pytest.mark.parametrize("backbone", ["vit", "deit"])
def test_images_without_labels_on_a_grid_that_is_no_square(backbone, photos, drawn, tmp_path):
    checkpoint = save_avit(tmp_path / "model", (8, 24), backbone=backbone, distilled=backbone == "deit")
    assert visualize(checkpoint, photos, tmp_path / "out", "--images", 6) == 0
    seen, answers, _ = drawn["plot_token_depths"]
    depths, settings = drawn["plot_tokens_alive"]
    assert seen.shape == (6, 8, 24, 3) and sorted(settings["shown"]) == [0, 1, 2, 3, 4, 5]
    assert depths.shape == (6, 12 + (2 if backbone == "deit" else 1))
    for row, answer in zip(settings["shown"], answers, strict=True):
        assert answer["label"] is None and answer["predicted"].startswith("LABEL_")
        assert answer["depths"].tolist() == depths[row, -12:].reshape(2, 6).tolist()


def test_highway_images_that_left_first_and_last(highway, digits, drawn, tmp_path):
    assert visualize(highway, "digits", tmp_path / "out", "--images", 5) == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["first_and_last.png"]
    rows = few_digits()
    model = type(tiny_model("vit")).from_pretrained(highway).eval()
    with torch.no_grad():
        pixels = pixels_of(rows, make_processor(16))
        early, every = model(pixels), model(pixels, early_exit=False)
    order = np.argsort(early.exit_layer.numpy(), kind="stable")
    assert len(early.exit_layer.unique()) > 2
    seen, answers, settings = drawn["plot_scores"]
    assert settings == {
        "depths": [2, 3, 4, 5, 6],
        "score": "largest probability",
        "thresholds": [model.exit_policy.threshold[0], None, *model.exit_policy.threshold[2:], None],
    }
    for row, image, answer in zip([*order[:3], *order[-2:]], seen, answers, strict=True):
        assert answer["depth"] == early.exit_layer[row] and answer["label"] == str(rows[int(row)]["label"])
        expected = [logits[row].softmax(-1).max().item() for logits in every.exit_logits]
        expected[1] = np.nan  # nobody is asked there
        assert answer["scores"] == pytest.approx(expected, abs=1e-5, nan_ok=True)
        assert answer["scores"][early.exit_index[row]] == pytest.approx(early.exit_score[row].item(), abs=1e-5)
        assert image.shape == (16, 16, 3)


@torch.no_grad()
def test_scores_of_patience_go_on_counting():
    model = tiny_model("vit")
    model.set_exit_policy("patience", patience=2)
    pixels = tiny_images(12)
    answers = torch.stack([logits.argmax(-1) for logits in model(pixels, early_exit=False).exit_logits])
    count, expected = torch.zeros(12), []
    for index, answer in enumerate(answers):
        count = torch.where(answer == answers[index - 1], count + 1, 1.0) if index else count + 1
        expected.append(count)
    assert torch.equal(scores_by_exit(model, pixels), torch.stack(expected))
    assert limits_of(model.exit_policy, 4) == [2, 2, 2, 2, None]


@version_independent
def test_policies_without_a_limit():
    assert limits_of(build_policy("never", 2), 2) == [None, None, None]
    assert limits_of(build_policy({"name": "fixed", "exit_index": 1}, 2), 2) == [None, None, None]
    patience = {"name": "patience_confidence", "patience": 2, "threshold": 0.5, "exits": [1]}
    assert limits_of(build_policy(patience, 2), 2) == [None, 2, None]


def test_other_class_names_are_no_labels(photos, highway, drawn, tmp_path):
    for number, file in enumerate(sorted(photos.glob("*.png"))):
        (photos / f"kind {number % 2}").mkdir(exist_ok=True)
        file.rename(photos / f"kind {number % 2}" / file.name)
    assert visualize(highway, photos, tmp_path / "out", "--images", 2, "--split", "train") == 0
    _, answers, _ = drawn["plot_scores"]
    assert [answer["label"] for answer in answers] == [None, None]


@version_independent
def test_chosen_by_hand():
    depths = torch.tensor([[1, 5, 1, 5], [3, 3, 3, 3], [1, 1, 1, 5], [1, 5, 1, 5]])
    assert widest_spread(depths, 3) == [0, 3, 2]
    assert first_and_last(torch.tensor([3, 1, 2, 1]), 4) == [1, 3, 2, 0]
    assert first_and_last(torch.tensor([3, 1, 2]), 1) == [1]


def test_pixels_are_given_back():
    pixels = torch.randint(0, 256, (2, 3, 8, 6), dtype=torch.uint8)
    plain = {"do_resize": False, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    for settings in ({}, {"do_normalize": False}, {"do_rescale": False, "do_normalize": False}):
        processor = ViTImageProcessor(**{**plain, **settings})
        images = [image.permute(1, 2, 0).numpy() for image in pixels]
        shown = processor(images, return_tensors="pt")["pixel_values"]
        assert (as_seen(shown, processor) == pixels.permute(0, 2, 3, 1).numpy()).all(), settings


@version_independent
def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["visualize", "--help"])
    assert stop.value.code == 0 and "lgvit visualize" in capsys.readouterr().out.split("example:")[1]


@version_independent
def test_one_clear_line(avit, photos, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        assert visualize(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lgvit:")]
        assert len(lines) == 1 and not (tmp_path / "out").exists()
        return lines[0]

    out = tmp_path / "out"
    assert "images=7: there are 6 in" in refused(avit, photos, out, "--images", 7)
    assert "argument --images: '0' must be a whole number of at least 1" in refused(avit, photos, out, "--images", 0)
    assert "no config.json there" in refused(photos, photos, out)
    assert "no such folder" in refused(avit, tmp_path / "nowhere", out)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"model_type": "vit"}')
    assert "model type 'vit' must be avit or one of vit_highway," in refused(tmp_path / "plain", photos, out)
    assert main(["visualize", str(avit), "--data", str(photos)]) == 2
    assert "needs --output" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert 'pip install "lgvit-hf[plots]"' in refused(avit, photos, out)

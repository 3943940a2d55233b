"""`lgvit export --web`: pixels as Python has them, and a page that answers as Python does, in a browser."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lgvit_hf import Predictor, ViTHighway, ViTHighwayConfig
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.export import web
from lgvit_hf.pages import FOLDER
from lgvit_hf.policies import build_policy
from lgvit_hf.runtimes.manifest import Manifest
from lgvit_hf.serving.device.pixels import pixel_settings, prepare
from lgvit_hf.serving.device.session import open_session, run_session
from tests.browser import needs_browser, open_page
from tests.gates import typical_models
from tests.seeds import rng, seeded
from tests.tiny import IMAGE_SIZE, tiny_config, tiny_images, tiny_model

pytestmark = pytest.mark.version_independent
HOSTILE = "<img src=x onerror=window.hacked=1>"
RUNTIME = Path(os.environ.get("ONNXRUNTIME_WEB", "web"))

NODE = """
import { readFileSync, writeFileSync } from "node:fs";
const { prepare } = await import(process.argv[2]);
const cases = JSON.parse(readFileSync(process.argv[3], "utf8"));
writeFileSync(process.argv[4], Buffer.concat(cases.map(({ rgba, size, settings }) =>
  Buffer.from(prepare(Uint8ClampedArray.from(rgba), size, settings).buffer))));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_pixels_are_those_of_pillow(tmp_path):
    """Every filter, larger and smaller, grey and coloured, cropped and not."""
    numbers, cases, expected = rng(), [], []
    mean, std = {1: [0.4], 3: [0.5, 0.4, 0.3]}, {1: [0.2], 3: [0.5, 0.3, 0.2]}
    for filter in web.FILTERS:
        for (height, width), (rows, columns), crop in (
            ((37, 61), (16, 20), None),
            ((9, 5), (24, 24), (17, 20)),
            ((24, 50), (24, 13), None),
            ((1, 90), (7, 7), (4, 7)),
        ):
            channels = int(numbers.choice([1, 3]))
            size = {"height": rows, "width": columns}
            more = {} if crop is None else {"do_center_crop": True, "crop_size": dict(zip(size, crop, strict=True))}
            settings = pixel_settings(
                {
                    **{"do_resize": True, "size": size, "resample": filter, "do_rescale": True},
                    **{"rescale_factor": 1 / 255, "do_normalize": True},
                    **{"image_mean": mean[channels], "image_std": std[channels], **more},
                },
                channels,
            )
            # dark and bright beside each other: where a cubic filter overshoots
            bytes = numbers.choice([0, 255, 128, 17], (height, width, 3)).astype(np.uint8)
            rgba = np.dstack([bytes, np.full((height, width), 255, np.uint8)])
            cases.append({"rgba": rgba.ravel().tolist(), "size": [height, width], "settings": settings})
            expected.append(prepare(Image.fromarray(bytes), settings).ravel())
    (tmp_path / "run.mjs").write_text(NODE)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    run = ["node", tmp_path / "run.mjs", FOLDER / "pixels.mjs", tmp_path / "cases.json", tmp_path / "found"]
    subprocess.run(run, check=True, timeout=60)
    found = np.fromfile(tmp_path / "found", np.float32)
    # the same bytes, so that float32 is all that they differ by
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)


def fake_runtime(folder):
    """The files of onnxruntime-web by name."""
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"version": "1.30.0"}')
    for name in web.RUNTIME:
        (folder / "dist" / name).write_text(name)
    return folder / "dist"


@pytest.fixture
def exported(tmp_path):
    """A folder as an export leaves it, with a manifest and no weights."""
    folder = tmp_path / "onnx"
    folder.mkdir()
    settings = pixel_settings({"do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2}, 3)
    manifest = Manifest(
        layout="single",
        precision="float32",
        files={"model.onnx": "0" * 64},
        depths=[2, 6],
        exits=[0, 1],
        policy={"name": "entropy", "threshold": 0.5},
        macs={"backbone_costs": [1.0, 2.0], "heads": [0.5, 0.5]},
        versions={"lgvit_hf": "0.1.0"},
        checks={},
        thresholds="input",
        inputs={"exit_thresholds": [0.5], "exit_temperatures": [1.0, 1.0]},
        image=settings,
    )
    return folder, manifest


def test_what_is_written(exported, tmp_path):
    folder, manifest = exported
    runtime = fake_runtime(tmp_path / "node_modules" / "onnxruntime-web")
    assert web.find_runtime(tmp_path) == web.find_runtime(runtime.parent) == runtime
    pictures = [Image.new("RGB", (2000, 40)), Image.new("L", (4, 4))]
    web.write_web(folder, manifest, [f"</script>{HOSTILE}", "plain"], runtime, name=HOSTILE, pictures=pictures)
    page = (folder / "index.html").read_text()
    assert page.count("</script>") == 3 and HOSTILE not in page and '"runtime":"1.30.0"' in page
    text = page + "".join((folder / "web" / name).read_text() for name in web.SCRIPTS)
    assert "{{" not in page and "https://" not in text and text.replace("http://www.w3.org", "").count("http://") == 1
    sizes = [Image.open(folder / "web" / f"sample{index}.png").size for index in range(2)]
    assert sizes == [(512, 10), (4, 4)]
    assert {file.name for file in (folder / "web").glob("*.*s*")} >= {*web.RUNTIME, *web.SCRIPTS}


def test_what_cannot_be_a_page_is_said_before_exporting(tmp_path, capsys, monkeypatch):
    words = ["export", "nowhere", str(tmp_path / "out"), "--web"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, str(tmp_path)]) == 2 and "npm install --prefix web" in capsys.readouterr().err
    assert main(words) == 2 and "no onnxruntime-web" in capsys.readouterr().err
    config, number, processor = tiny_config("vit"), tiny_config("vit", num_labels=1), make_processor(16)
    shortest, nearest = make_processor(16), make_processor(16)
    shortest.size, nearest.resample = {"shortest_edge": 16}, 0
    for asked, images, export, message in (
        (number, processor, {}, r"this model's 1 label\(s\) are numbers"),
        (config, processor, {"layout": "segments"}, "--layout single"),
        (config, processor, {"thresholds": "fixed"}, "--thresholds input"),
        (config, processor, {"precision": "float16"}, "not float16"),
        (config, shortest, {}, "it does not resize to a height and a width"),
        (config, nearest, {}, r"resample=0 of the image processor must be one of 1 \(lanczos\)"),
    ):
        with pytest.raises(ValueError, match=message):
            web.check_web(asked, images, **export)
    web.check_web(config, processor)


# -- every policy that exports ---------------------------------------------------------------------------------

# the first ones are each moved in their own way, the others as one of these
POLICIES = [
    {"name": "confidence_entropy", "threshold": 0.6, "entropy_threshold": 1.6},
    {"name": "gate", "threshold": 0.8, "exits": [0, 2], "models": typical_models(2), "num_labels": 5},
    {"name": "patience", "patience": 2},
    {"name": "patience_confidence", "threshold": 0.9, "patience": 2},
    {"name": "fixed", "exit_index": 1},
    {"name": "calibrated_confidence", "threshold": 0.8, "edges": [[0.6]] * 3, "accuracies": [[0.5, 0.9]] * 3},
    {"name": "confidence", "threshold": [0.6, 0.7, 0.8]},
    {"name": "entropy", "threshold": 0.6, "temperature": 2.0},
    {"name": "label_confidence", "threshold": 0.6},
    {"name": "margin", "threshold": 0.3},
    {"name": "never"},
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """For a policy: a folder with the single file of a tiny highway by it, and its manifest."""
    pytest.importorskip("onnxruntime", reason='pip install "lgvit-hf[onnx]"')
    import onnx

    from lgvit_hf.export.composition import joined, set_thresholds
    from lgvit_hf.export.segment_graphs import EXPORTABLE, export_parts
    from lgvit_hf.export.writing import exits_in_files, manifest_of, write_parts

    assert {settings["name"] for settings in POLICIES} == {*EXPORTABLE} == {*web.SCORES, "fixed", "never"}
    model = tiny_model("vit", num_hidden_layers=4, exit_positions=[1, 2, 3], exit_types="linear")
    parts = export_parts(model, range(4))

    def write(settings):
        folder = tmp_path_factory.mktemp(settings["name"])
        model.config.problem_type = build_policy(settings, 3).problem_type
        model.set_exit_policy(settings)
        files = write_parts(model, joined(parts, exits_in_files(model.exit_policy, 4, "single")), folder, "single")
        content = onnx.load(folder / "model.onnx")
        set_thresholds(content, "input")
        onnx.save(content, folder / "model.onnx")
        return folder, replace(manifest_of(model, folder, files), thresholds="input")

    return write


def exits_by(folder, manifest, pixels, changes):
    """At which exits a batch exits with some of the inputs changed, as the page runs the file."""
    inputs = {name: np.array(numbers, np.float32) for name, numbers in {**manifest.inputs, **changes}.items()}
    return run_session(open_session(folder / "model.onnx", 1), {"pixel_values": pixels, **inputs})["exit_index"]


@pytest.mark.parametrize(
    "settings",
    [*POLICIES[:5], *(pytest.param(settings, marks=pytest.mark.slow) for settings in POLICIES[5:])],
    ids=lambda settings: settings["name"],
)
def test_slider_and_exits_of_every_policy(settings, written):
    """Its ends are all exits and none, and every exit has numbers by which any image exits there."""
    (folder, manifest), pixels = written(settings), tiny_images(40).numpy()
    data, last = web.page_data(manifest, ["a", "b", "c", "d", "e"]), 3
    slider, taken = data["slider"], [exits_by(folder, manifest, pixels, changes) for changes in data["runs"]]
    if "exit_patience" in manifest.inputs and "exit_thresholds" not in manifest.inputs:
        assert set(taken[0]) == {0} and set(taken[-1]) == {last} and len(taken) == 4
    else:
        assert [set(exits) for exits in taken] == [{exit} for exit in manifest.exits]
    assert (slider is None) == (settings["name"] in ("fixed", "never"))
    if slider is not None:
        length = len(manifest.inputs[slider["input"]])
        least, most = (
            exits_by(folder, manifest, pixels, {slider["input"]: [slider[end]] * length}) for end in ("least", "most")
        )
        fewest, all = (least, most) if slider["lower"] else (most, least)
        assert set(fewest) == {last} and all.min() < last and slider["score"]


# -- in a browser ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory):
    """An exported highway of random weights with its page, and the photos that it was made with."""
    home = tmp_path_factory.mktemp("web")
    seeded()
    names = [HOSTILE, "green", "plain"]
    numbers = rng()
    for name in names:
        (home / "photos" / name).mkdir(parents=True)
        for number in range(8):
            colour = numbers.integers(0, 256, (1, 1, 3))
            noise = numbers.integers(-60, 60, (40 + number, 60, 3))
            Image.fromarray((colour + noise).clip(0, 255).astype(np.uint8)).save(
                home / "photos" / name / f"{number}.png"
            )
    sizes = {"hidden_size": 24, "intermediate_size": 24, "image_size": IMAGE_SIZE, "patch_size": 4}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    exits = {"num_hidden_layers": 4, "exit_positions": [1, 2, 3], "exit_types": "linear", "num_attention_heads": 2}
    policy = {"exit_policy": {"name": "confidence", "threshold": 0.7}}
    model = ViTHighway(ViTHighwayConfig(**sizes, **labels, **exits, **policy))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(home / "model")
    make_processor(IMAGE_SIZE).save_pretrained(home / "model")
    words = ["--data", str(home / "photos"), "--web", str(RUNTIME)]
    assert main(["export", str(home / "model"), str(home / "onnx"), *words]) == 0
    return home


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def served(folder):
    """The address of a page in a folder, by a server as `python -m http.server` is one."""
    handler = functools.partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/index.html"
        server.shutdown()


@pytest.fixture
def address(page_folder):
    with served(page_folder / "onnx") as found:
        yield found


def shown(page, exits=4):
    """The answer once every exit is drawn: class, probability in per cent, blocks run."""
    page.wait_for_function(
        "exits => document.querySelectorAll('#exit-table tbody tr').length === exits && "
        "document.querySelector('#message').hidden",
        arg=exits,
    )
    label, probability = page.inner_text("#label").split("\nprobability ")
    return label, float(probability.split("\u00a0")[0]), int(page.inner_text("#exit").split()[2])


needs_runtime = pytest.mark.skipif(
    not (RUNTIME / "node_modules" / "onnxruntime-web").is_dir(),
    reason="npm install --prefix web onnxruntime-web@1.30, and ONNXRUNTIME_WEB=web",
)


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_answers_as_python_does(page_folder, address):
    """Three sample images, at the exported thresholds and others; nothing is asked of another host."""
    with open_page(address) as (page, errors):
        page.wait_for_selector("#message:has-text('Ready')")
        for index in range(3):
            page.get_by_alt_text(f"sample image {index + 1}", exact=True).click()
            page.wait_for_timeout(100)
            found = {}
            for position in (None, 0, 1000):
                page.locator("#slider").fill(str(position)) if position is not None else page.click("#reset")
                page.wait_for_timeout(300)
                label, probability, depth = found[position] = shown(page)
                threshold = 0.7 if position is None else position / 1000
                ours = Predictor(page_folder / "onnx", {"name": "confidence", "threshold": threshold})
                pixels = ours.pixel_values(page_folder / "onnx" / "web" / f"sample{index}.png")
                answers = ours({"pixel_values": np.asarray(pixels)[None]})
                probabilities = ours.probabilities(answers)[0]
                assert depth == answers["exit_layer"][0]
                assert label == (HOSTILE, "green", "plain")[probabilities.argmax()]
                assert abs(probability - 100 * probabilities.max()) < 0.06
            assert found[0][2] == 1 and found[1000][2] == 4
        assert page.evaluate("window.hacked") is None and not errors, errors


@pytest.mark.slow
@needs_browser
@needs_runtime
@pytest.mark.parametrize("settings", POLICIES, ids=lambda settings: settings["name"])
def test_every_policy_on_a_page(settings, written):
    """As exported and with the slider at both ends, an image exits where the file lets it exit in ONNX Runtime."""
    folder, manifest = written(settings)
    fields = {
        "do_resize": True,
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 2,
        "do_rescale": True,
    }
    manifest = replace(manifest, image=pixel_settings({**fields, "rescale_factor": 1 / 255}, 3))
    pictures = [Image.fromarray(rng(number).integers(0, 256, (20, 20, 3), np.uint8)) for number in range(2)]
    several = settings["name"] == "label_confidence"
    runtime = web.find_runtime(RUNTIME)
    web.write_web(folder, manifest, list("abcde"), runtime, name="tiny", has_several=several, pictures=pictures)
    data = web.page_data(manifest, list("abcde"))
    slider = data["slider"]
    positions = {None: None} if slider is None else {None: None, 0: slider["least"], slider["steps"]: slider["most"]}
    with served(folder) as address, open_page(address) as (page, errors):
        page.wait_for_selector("#message:has-text('Ready')")
        assert page.locator("#slider").is_visible() == (slider is not None)
        said = page.inner_text("#position")
        assert said.startswith(settings["name"]) and ("as exported" in said) == (slider is not None)
        assert ("exit patience stays 2." in said) == (settings["name"] == "patience_confidence")
        for number, picture in enumerate(pictures):
            pixels = prepare(picture, manifest.image)[None]
            page.get_by_alt_text(f"sample image {number + 1}", exact=True).click()
            page.wait_for_timeout(100)
            reached = {int(exits_by(folder, manifest, pixels, changes)[0]) for changes in data["runs"]}
            for position, value in positions.items():
                page.locator("#slider").fill(str(position)) if position is not None else None
                page.wait_for_timeout(200)
                moved = {} if value is None else {slider["input"]: [value] * len(manifest.inputs[slider["input"]])}
                expected = manifest.depths[exits_by(folder, manifest, pixels, moved)[0]]
                assert shown(page, len(reached))[2] == expected
            if slider is not None:
                page.click("#reset")
        assert not errors, errors


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_bad_input_is_a_sentence(page_folder, address, tmp_path):
    (tmp_path / "no.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "huge.png").write_bytes(bytes(50_000_000))
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "zero.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"/>')
    Image.new("L", (10_000, 6_000)).save(tmp_path / "wide.png")
    with open_page(address, size=(390, 844)) as (page, errors):
        page.wait_for_selector("#message:has-text('Ready')")
        for name, message in (
            ("no.png", "no.png: it is no image that this browser reads, as PNG, JPEG or WebP."),
            ("empty.png", "empty.png: the file is empty."),
            ("huge.png", "huge.png: the file has 50 MB; at most 32 MB are taken."),
            ("notes.txt", "notes.txt: it is no image that this browser reads, as PNG, JPEG or WebP."),
            ("zero.svg", "zero.svg: it is no image that this browser reads, as PNG, JPEG or WebP."),
            ("wide.png", "wide.png: it has 10000 x 6000 pixels; at most 50 million are taken, and 32768 on one side."),
        ):
            page.set_input_files("#file", tmp_path / name)
            page.wait_for_function("text => document.querySelector('#message').textContent === text", arg=message)
        drop = """files => {
            const dataTransfer = new DataTransfer();
            for (const name of files) dataTransfer.items.add(new File(["text"], name));
            dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }"""
        page.evaluate(drop, [])
        page.wait_for_selector("#message:has-text('What was dropped: no file was dropped')")
        page.evaluate(drop, ["dropped.txt"])
        page.wait_for_selector("#message:has-text('dropped.txt: it is no image')")
        page.get_by_alt_text("sample image 1", exact=True).click()
        assert shown(page)[2] in (1, 2, 3, 4)
        assert page.evaluate("document.documentElement.scrollWidth") == 390 and not errors, errors


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_a_model_that_does_not_open_is_a_sentence(page_folder, address):
    file = page_folder / "onnx" / "model.onnx"
    kept = file.read_bytes()
    try:
        for content, message in ((kept[:1000], "model.onnx does not open: "), (None, "the server says 404")):
            file.write_bytes(content) if content is not None else file.unlink()
            with open_page(address) as (page, _):
                page.wait_for_function(
                    "text => document.querySelector('#message').textContent.includes(text)", arg=message
                )
                assert "Export it again" in page.inner_text("#message")
    finally:
        file.write_bytes(kept)


@pytest.mark.slow
@needs_browser
@needs_runtime
def test_by_keyboard_and_webcam(page_folder, address):
    with open_page(address, permissions=["camera"]) as (page, errors):
        page.wait_for_selector("#message:has-text('Ready')")
        page.locator("#samples button").first.focus()
        page.keyboard.press("Enter")
        assert shown(page)[2] in (1, 2, 3, 4)
        page.locator("#slider").focus()
        page.keyboard.press("Home")
        page.wait_for_function("document.querySelector('#exit').textContent.startsWith('after block 1')")
        page.get_by_role("button", name="Start webcam").click()
        page.get_by_role("button", name="Classify this frame").click()
        assert shown(page)[2] == 1
        page.get_by_role("button", name="Stop webcam").click()
        assert not page.locator("#video").is_visible() and not errors, errors

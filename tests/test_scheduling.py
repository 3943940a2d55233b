"""Which scheduler a service has, and that it answers the same between segments; the command and the metrics."""

import numpy as np
import pytest
import torch

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.export import onnx_export
from lgvit_hf.serving.batching import Batcher
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.open_part import open_any
from lgvit_hf.serving.predictor import Predictor
from lgvit_hf.serving.scheduling import Scheduling
from lgvit_hf.serving.segment_scheduler import SegmentScheduler
from tests.clear import clear_model
from tests.test_split import SMALL, random_image
from tests.tiny import IMAGE_SIZE

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')
import safetensors.numpy  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from lgvit_hf.serving.device.message import CONTENT_TYPE, unpack  # noqa: E402
from lgvit_hf.serving.prometheus import Metrics  # noqa: E402
from lgvit_hf.serving.server import make_app  # noqa: E402

pytestmark = pytest.mark.version_independent
TENSORS = {"content-type": CONTENT_TYPE, "accept": CONTENT_TYPE}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint and what is made of it, images that exit at each exit in turn, and answers to them."""
    folder = tmp_path_factory.mktemp("scheduling")
    model, images = clear_model("vit", 4, **SMALL)
    model.save_pretrained(folder / "model")
    make_processor(IMAGE_SIZE).save_pretrained(folder / "model")
    for layout in ("single", "segments", "all_exits"):
        onnx_export.export_onnx(model, folder / layout, layout=layout)
    with torch.no_grad():
        model.split([2], folder / "parts")
    return folder, images.numpy(), Predictor(folder / "model")({"pixel_values": images.numpy()})


def started(folder, **settings):
    return Scheduling(**settings).start(RemoteHighway(open_any(folder)), Metrics())


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model", SegmentScheduler), ("segments", SegmentScheduler), ("single", Batcher), ("all_exits", Batcher)]
    + [("parts/part0", Batcher)],
)
def test_segments_where_there_are_some(home, name, kind):
    scheduler = started(home[0] / name)
    assert type(scheduler) is kind
    if name != "parts/part0":
        futures = [scheduler.submit({"pixel_values": home[1][number : number + 3]}) for number in range(0, 9, 3)]
        for number, future in enumerate(futures):
            found, wanted = future.result(60), slice(3 * number, 3 * number + 3)
            assert found["exit_index"].tolist() == home[2]["exit_index"][wanted].tolist()
            np.testing.assert_allclose(found["logits"], home[2]["logits"][wanted], atol=1e-4)
    scheduler.close()
    batcher = started(home[0] / name, scheduler="batch")
    assert type(batcher) is Batcher
    batcher.close()
    if kind is Batcher:
        for settings in ({"scheduler": "segments"}, {"max_run_ms": 5.0}):
            with pytest.raises(ValueError, match="--layout segments"):
                started(home[0] / name, **settings)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="none of segments, batch"):
        Scheduling("blocks")
    with pytest.raises(ValueError, match="max_run_ms=5 is for"):
        Scheduling("batch", max_run_ms=5.0)


def test_the_command_refuses_segments_of_a_single_file(home, capsys):
    assert main(["serve", str(home[0] / "single"), "--scheduler", "segments", "--port", "0"]) == 2
    assert "--layout segments" in capsys.readouterr().err
    assert main(["serve", str(home[0] / "model"), "--scheduler", "batch", "--max-run-ms", "5"]) == 2
    assert "max_run_ms=5" in capsys.readouterr().err


def test_a_service_answers_between_segments_and_opens_its_model_again(home):
    folder, pixels, expected = home

    def reopen():
        return RemoteHighway(open_any(folder / "model"))

    app = make_app(reopen(), workers=1, reopen=reopen, scheduler=None, max_batch_size=5)
    with TestClient(app) as client:

        def answers():
            body = safetensors.numpy.save({"pixel_values": pixels})
            reply = client.post("/predict", content=body, headers=TENSORS)
            assert reply.status_code == 200, reply.text
            return unpack(reply.content, client.app.state.service.served.info.answers, None)

        for version in (1, 2):
            found = answers()
            assert found["exit_index"].tolist() == expected["exit_index"].tolist()
            np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)
            lines = client.get("/metrics").text.splitlines()
            counted = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
            left = version * len(pixels)
            for segment, exited in enumerate(np.bincount(expected["exit_index"], minlength=4)):
                name = f'{{segment="{segment}"}}'
                assert counted[f"lgvit_segment_queue_age_seconds_count{name}"] == left
                assert counted[f"lgvit_segment_exits_sum{name}"] == version * exited
                assert counted[f"lgvit_segment_batch_fill_count{name}"] >= left / 5
                left -= version * exited
            assert client.portal.call(client.app.state.service.reload) is True
        image = np.asarray(random_image(20, 30))
        assert client.post("/predict", content=as_png(image)).status_code == 200
    assert not app.state.service.served.batcher.alive


def as_png(array):
    from PIL import Image

    from tests.test_service import as_png as encoded

    return encoded(Image.fromarray(array))

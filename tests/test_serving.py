"""Messages, the service and its client: equal answers, refusals with a reason, answers when the next part is gone."""

import base64
import contextlib
import http.server
import io
import json
import os
import queue
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.serving.batching import Batcher, Busy
from lgvit_hf.serving.device import remote
from lgvit_hf.serving.device.message import CONTENT_TYPE, MessageError, pack, unpack
from lgvit_hf.serving.device.remote import Hop, NextPartGone, RemoteHighway
from lgvit_hf.serving.open_part import open_any, open_part
from tests.clear import clear, clear_model
from tests.seeds import examples, rng
from tests.test_split import SMALL, random_image
from tests.tiny import IMAGE_SIZE, tiny_model

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')
import uvicorn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from lgvit_hf.serving.admission import Limits  # noqa: E402
from lgvit_hf.serving.server import make_app  # noqa: E402

one_version = pytest.mark.version_independent

WANTED = {"hidden": {"dtype": "float32", "shape": [2, 3]}, "memory.label": {"dtype": "int64", "shape": []}}
TENSORS = {"content-type": CONTENT_TYPE, "accept": CONTENT_TYPE}


# -- messages ------------------------------------------------------------------------------------------------


def arrays(rows=4):
    # as float16, each is rounded by at most its 2048th part
    hidden = rng().uniform(0.1, 3, (rows, 2, 3)) * rng(1).choice([-1, 1], (rows, 2, 3))
    return {"hidden": hidden.astype(np.float32), "memory.label": np.arange(rows)}


@one_version
def test_a_message_is_a_safetensors_file():
    body = pack(arrays(), {"part": "1"})
    for found in (safetensors.numpy.load(body), unpack(body, WANTED, {"part": "1"})):
        for name, array in arrays().items():
            np.testing.assert_array_equal(found[name], array)
    theirs = unpack(safetensors.numpy.save(arrays()), WANTED)
    np.testing.assert_array_equal(theirs["hidden"], arrays()["hidden"])


@one_version
def test_half_a_state_is_a_whole_one_again():
    half = {**arrays(), "hidden": arrays()["hidden"].astype(np.float16)}
    found = unpack(pack(half), WANTED)["hidden"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, arrays()["hidden"], rtol=2**-11)
    assert len(pack(arrays())) - len(pack(half)) == 4 * 2 * 3 * 2


@one_version
def test_numbers_that_are_none_are_refused():
    for value in (np.nan, np.inf, -np.inf):
        bad = arrays()
        bad["hidden"][1, 1, 1] = value
        with pytest.raises(MessageError, match="hidden: NaN or infinity"):
            unpack(pack(bad), WANTED)


@one_version
@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": np.zeros((4, 3, 2), np.float32)}, r"hidden: shape \[4, 3, 2\], but must be \[samples, 2, 3\]"),
        ({"hidden": np.zeros((4, 2, 3), np.int64)}, "hidden: dtype 'int64', but must be float32"),
        ({"hidden": np.zeros((5, 2, 3), np.float32)}, "every array must have the same"),
        ({"more": np.zeros(4, np.float32)}, "but must hold hidden, memory.label"),
        ({"memory.label": np.zeros(4, np.uint8)}, "memory.label: dtype 'uint8'"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(change, message):
    with pytest.raises(MessageError, match=message):
        unpack(pack({**arrays(), **change}), WANTED)


@one_version
def test_messages_of_others_are_refused():
    body = pack(arrays(), {"model": "a", "part": "1"})
    with pytest.raises(MessageError, match="says model='a', but this is for model='b'"):
        unpack(body, WANTED, {"model": "b"})
    with pytest.raises(MessageError, match="says schema=None"):
        unpack(body, WANTED, {"schema": "1"})
    with pytest.raises(MessageError, match="4 samples, but at most 3"):
        unpack(body, WANTED, max_samples=3)
    with pytest.raises(MessageError, match="at least one"):
        unpack(pack({name: array[:0] for name, array in arrays().items()}), WANTED)


@one_version
@settings(max_examples=examples(100))
@given(st.data())
def test_no_bytes_do_more_than_be_refused(data):
    body = bytearray(pack(arrays(), {"part": "1"}))
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "header", "noise"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 8))):
            body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del body[data.draw(st.integers(0, len(body) - 1)) :]
    elif kind == "grow":
        body += data.draw(st.binary(min_size=1, max_size=50))
    elif kind == "noise":
        body = bytearray(data.draw(st.binary(max_size=300)))
    else:
        json_value = st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=5,
        )
        size = int.from_bytes(body[:8], "little")
        header = json.loads(body[8 : 8 + size])
        name = data.draw(st.sampled_from([*header]))
        field = data.draw(st.sampled_from([None, "dtype", "shape", "data_offsets"]))
        value = data.draw(json_value)
        header = {**header, name: value if field is None else {**header[name], field: value}}
        text = json.dumps(header).encode()
        body = bytearray(len(text).to_bytes(8, "little") + text + body[8 + size :])
    try:
        found = unpack(bytes(body), WANTED, {"part": "1"}, max_samples=100)
    except MessageError:
        return
    assert {name: array.shape[1:] for name, array in found.items()} == {"hidden": (2, 3), "memory.label": ()}
    assert np.isfinite(found["hidden"]).all()


# -- the service ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint, and its parts cut behind the exit after two blocks."""
    folder = tmp_path_factory.mktemp("serving")
    # sixteen images at each of four exits, two of them behind the cut
    model, images = clear_model("vit", 16, **SMALL)
    model.save_pretrained(folder / "model")
    processor = make_processor(IMAGE_SIZE)
    processor.save_pretrained(folder / "model")
    model.split([2], folder / "parts", processor=processor)
    return folder, model, images


def parts_of(home):
    return [open_part(home[0] / "parts" / f"part{index}") for index in range(2)]


@torch.no_grad()
def expected_of(home, images=None):
    return home[1](home[2] if images is None else images)


class Running:
    """A service in a thread of this process."""

    def __init__(self, app, port=0, **options):
        self.socket = socket.create_server(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, **options))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the service did not start"
            time.sleep(0.01)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join(10)
        self.socket.close()


@pytest.fixture
def nobody():
    """A port at which nobody listens, and that nobody else is given."""
    with socket.socket() as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(("127.0.0.1", 0))
        yield place.getsockname()[1]


class Clock:
    """The time of `Hop`, which stands still until it is told to go on; sockets wait as they always do."""

    def __init__(self):
        self.now, self.pauses = 1000.0, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(remote, "time", clock)
    return clock


def as_png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def whole(home):
    with TestClient(make_app(RemoteHighway(open_any(home[0] / "model")))) as client:
        yield client


@torch.no_grad()
def test_a_whole_checkpoint_answers_images(home, whole):
    images = [random_image(20 + number, 30, number) for number in range(40)]
    pixels = torch.from_numpy(make_processor(IMAGE_SIZE)(images, return_tensors="np")["pixel_values"])
    chosen = clear(home[1], pixels).nonzero()[:6, 0].tolist()
    assert len(chosen) == 6
    images, expected = [images[number] for number in chosen], home[1](pixels[chosen])
    files = [as_png(image) for image in images]
    found = [whole.post("/predict", content=file).json()["answers"] for file in files]
    assert all(len(each) == 1 for each in found)
    found = [each[0] for each in found]
    together = whole.post("/predict", json={"images": [base64.b64encode(file).decode() for file in files]})
    for answers in (found, together.json()["answers"]):
        assert [answer["exit_layer"] for answer in answers] == expected.exit_layer.tolist()
        assert [answer["exit_index"] for answer in answers] == expected.exit_index.tolist()
        assert [answer["label"] for answer in answers] == [f"LABEL_{n}" for n in expected.logits.argmax(-1).tolist()]
        assert not any(answer["degraded"] for answer in answers)
        shares = expected.logits.softmax(-1).amax(-1)
        assert [answer["probability"] for answer in answers] == pytest.approx(shares.tolist(), abs=1e-5)
    one = whole.post("/predict", json={"image": base64.b64encode(files[0]).decode()}).json()["answers"]
    assert one == found[:1]


@one_version
def test_tensors_in_tensors_out(home, whole):
    info = open_any(home[0] / "model").info
    expected = expected_of(home)
    reply = whole.post("/predict", content=safetensors.numpy.save({"pixel_values": home[2].numpy()}), headers=TENSORS)
    assert reply.headers["content-type"] == CONTENT_TYPE
    found = unpack(reply.content, info.answers, {"model": info.model})
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=1e-5)
    assert found["exit_index"].tolist() == expected.exit_index.tolist()


@one_version
def test_health_and_metrics_count(home):
    with TestClient(make_app(RemoteHighway(open_any(home[0] / "model")))) as client:
        assert client.get("/health").json()["status"] == "ok"
        client.post("/predict", content=safetensors.numpy.save({"pixel_values": home[2].numpy()}), headers=TENSORS)
        client.post("/predict", content=b"text")
        client.get("/nowhere")
        lines = client.get("/metrics").text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    counted = {name: float(value) for name, value in pairs}
    exits = expected_of(home).exit_layer.unique(return_counts=True)
    for depth, number in zip(*(each.tolist() for each in exits), strict=True):
        assert counted[f'lgvit_exits_total{{exit_layer="{depth}"}}'] == number
    assert counted['lgvit_requests_total{path="/predict",status="200"}'] == 1
    assert counted['lgvit_requests_total{path="/predict",status="400"}'] == 1
    assert counted['lgvit_requests_total{path="other",status="404"}'] == 1
    assert counted["lgvit_answers_degraded_total"] == 0
    # 64 samples, at most 32 at a time
    assert counted["lgvit_batches_total"] == counted["lgvit_batch_fill_count"] == 2
    assert counted["lgvit_batch_fill_sum"] == 2 and counted["lgvit_queue_age_seconds_count"] == 2
    assert counted['lgvit_request_seconds_bucket{le="+Inf"}'] == counted["lgvit_request_seconds_count"] == 2


def nan_pixels():
    pixels = np.zeros((2, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    pixels[1, 0, 0, 0] = np.nan
    return pixels


PIXELS = np.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
BAD = {
    "empty": ({"content": b""}, 400, "the body is empty"),
    "text": ({"content": b"hello"}, 400, "image 0: no readable image: "),
    "cut image": ({"content": as_png(random_image(50, 50))[:200]}, 400, "image 0: no readable image: "),
    "no json": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "Invalid JSON"),
    "no image": ({"json": {"picture": "aGk="}}, 400, '"image": BASE64'),
    "no images": ({"json": {"images": []}}, 400, '"image": BASE64'),
    "numbers": ({"json": {"images": [1]}}, 400, '"image": BASE64'),
    "no base64": ({"json": {"image": "%%"}}, 400, "not base64"),
    "text in json": ({"json": {"image": "aGVsbG8="}}, 400, "image 0: no readable image: "),
    "nan": ({"content": pack({"pixel_values": nan_pixels()}), "headers": TENSORS}, 400, "NaN or infinity"),
    "shape": (
        {"content": pack({"pixel_values": PIXELS[..., 1:]}), "headers": TENSORS},
        400,
        "must be [samples, 3, 16, 16]",
    ),
    "noise": ({"content": bytes(range(256)), "headers": TENSORS}, 400, "no safetensors message"),
    "too large": ({"content": bytes(2_000_001)}, 413, "more than 2000000 bytes"),
    "too many": ({"json": {"images": ["aGk="] * 257}}, 413, "257 images"),
    "a form": ({"files": {"image": b"x"}}, 400, "the image file is the body itself"),
    "timeout": ({"content": b"x", "headers": {"x-lgvit-timeout": "nan"}}, 400, "no number of seconds"),
}


@pytest.fixture(scope="module")
def strict(home):
    with TestClient(
        make_app(RemoteHighway(open_any(home[0] / "model")), limits=Limits(body_bytes=2_000_000))
    ) as client:
        yield client


@one_version
@pytest.mark.parametrize("name", BAD)
def test_bad_requests_get_a_reason(name, home, strict):
    request, status, reason = BAD[name]
    if name == "timeout":
        request = {**request, "content": as_png(random_image(9, 9))}
    reply = strict.post("/predict", **request)
    assert reply.status_code == status and reason in reply.json()["error"]
    assert strict.get("/health").status_code == 200


@one_version
def test_addresses_that_are_none_get_a_reason(whole):
    for method, path, status in (("GET", "/", 404), ("GET", "/predict", 405), ("POST", "/predict/x", 404)):
        reply = whole.request(method, path)
        assert reply.status_code == status and "/continue" in reply.json()["error"]
    assert "the first part" in whole.post("/continue", content=b"x").json()["error"]


@one_version
def test_numbers_too_large_for_the_model_are_refused(home, whole):
    pixels = np.full_like(PIXELS, 3e38)
    reply = whole.post("/predict", content=pack({"pixel_values": pixels}), headers=TENSORS)
    assert reply.status_code == 422 and "sample 0" in reply.json()["error"]


@one_version
def test_a_body_that_does_not_come_is_not_waited_for(home):
    limits = Limits(body_seconds=0.2)
    with Running(make_app(RemoteHighway(open_any(home[0] / "model")), limits=limits)) as running:
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
            connection.settimeout(10)
            assert connection.recv(1000).startswith(b"HTTP/1.1 408")


# -- from part to part ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind(home):
    """The service of the last part."""
    with Running(make_app(RemoteHighway(parts_of(home)[1]))) as running:
        yield running


def assert_as_expected(found, expected, tolerance=1e-5):
    assert found["exit_index"].tolist() == expected.exit_index.tolist()
    assert found["exit_layer"].tolist() == expected.exit_layer.tolist()
    np.testing.assert_allclose(found["logits"], expected.logits.numpy(), atol=tolerance)
    assert not found["degraded"].any()


def test_here_and_there_answer_as_the_whole(home, behind):
    highway = RemoteHighway(parts_of(home)[0], behind.url)
    assert highway.check_next() is None
    expected = expected_of(home)
    assert expected.exit_index.bincount().tolist() == [16] * 4
    assert_as_expected(highway({"pixel_values": home[2].numpy()}), expected)
    sent = int((expected.exit_layer > 2).sum())
    assert highway.counts["sent_rows"] == sent
    # a float32 for every number of the state, and less than a kilobyte that says what it is
    assert 0 < highway.counts["sent_bytes"] - sent * 17 * 32 * 4 < 1024


@one_version
def test_half_a_state_is_half_the_bytes(home, behind):
    first, last = parts_of(home)
    highway = RemoteHighway(first, behind.url, state_dtype="float16")
    found, expected = highway({"pixel_values": home[2].numpy()}), expected_of(home).logits.numpy()
    _, rows, state = first({"pixel_values": home[2].numpy()})
    # the first part's answers as they are, those of the last part for a rounded state
    rounded, _, _ = last({**state, "hidden": state["hidden"].astype(np.float16).astype(np.float32)})
    expected[rows] = rounded["logits"]
    np.testing.assert_allclose(found["logits"], expected, atol=1e-5)
    unrounded, _, _ = last(state)
    alike = unrounded["exit_index"] == rounded["exit_index"]
    assert alike.mean() > 0.9
    np.testing.assert_allclose(rounded["logits"][alike], unrounded["logits"][alike], atol=0.05)
    assert highway.counts["sent_bytes"] < 1024 + highway.counts["sent_rows"] * 17 * 32 * 2
    # too large for float16: sent as it is
    large = highway.message({"hidden": np.full((1, 17, 32), 1e6, np.float32)})
    assert unpack(large, parts_of(home)[1].info.takes)["hidden"].max() == 1e6


@one_version
def test_services_in_a_row_answer_as_the_whole(home, behind):
    app = make_app(RemoteHighway(parts_of(home)[0], behind.url))
    with TestClient(app) as client:
        reply = client.post("/predict", content=pack({"pixel_values": home[2].numpy()}), headers=TENSORS)
        assert_as_expected(unpack(reply.content, parts_of(home)[0].info.answers), expected_of(home))


@one_version
def test_a_part_behind_refuses_what_is_not_for_it(home, behind):
    first, last = parts_of(home)
    _, _, state = first({"pixel_values": home[2].numpy()})
    hop = Hop(behind.url, cooldown=0)
    words = last.info.words
    good = pack(state, words)
    unpack(hop.post("/continue", good), last.info.answers, {"model": last.info.model})
    for change, reason in (
        ({"schema": "2"}, "says schema='2'"),
        ({"model": "0" * 64}, "says model="),
        ({"part": "0"}, "says part='0'"),
    ):
        with pytest.raises(NextPartGone, match=f"status 400.*{reason}"):
            hop.post("/continue", pack(state, {**words, **change}))
    with pytest.raises(NextPartGone, match="status 400.*takes states at /continue"):
        hop.post("/predict", good)


@one_version
@torch.no_grad()
def test_a_lost_part_is_replaced_by_the_deepest_exit_here(home, nobody, clock):
    first, last = parts_of(home)
    images = {"pixel_values": home[2].numpy()}
    expected = expected_of(home)
    here = home[1](home[2], early_exit=False).exit_logits[1].numpy()
    highway = RemoteHighway(first, f"http://127.0.0.1:{nobody}", timeout=60, retries=1, backoff=0.01, cooldown=3)
    with Running(make_app(RemoteHighway(last)), nobody):
        assert_as_expected(highway(images), expected)
    gone = highway(images)
    lost = gone["degraded"].astype(bool)
    assert lost.tolist() == (expected.exit_layer > 2).tolist() and lost.sum() == 32
    np.testing.assert_allclose(gone["logits"][lost], here[lost], atol=1e-5)
    assert set(gone["exit_layer"][lost].tolist()) == {2}
    np.testing.assert_allclose(gone["logits"][~lost], expected.logits.numpy()[~lost], atol=1e-5)
    clock.now += 2.9
    assert "failed less than 3 s ago" in str(pytest.raises(NextPartGone, highway.hop.post, "/continue", b"").value)
    clock.now += 0.2
    with Running(make_app(RemoteHighway(last)), nobody):
        assert_as_expected(highway(images), expected)
    assert highway.counts["next_failures"] == 1 and highway.counts["degraded_rows"] == lost.sum()


@one_version
def test_without_a_next_part_answers_are_marked(home):
    found = RemoteHighway(parts_of(home)[0])({"pixel_values": home[2].numpy()})
    assert found["degraded"].tolist() == (expected_of(home).exit_layer > 2).int().tolist()
    assert found["exit_layer"].max() == 2


LATE = object()


class Stub(http.server.ThreadingHTTPServer):
    """A next part that gives the answers of `script`, one by one: a status and a body. `LATE` waits for `go_on`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script, self.asked, self.go_on = [], queue.Queue(), threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def told(self):
        """How many seconds the next message says that there are."""
        return float(self.asked.get(timeout=60))


class Answering(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        answer = self.server.script.pop(0)
        self.server.asked.put(self.headers["x-lgvit-timeout"])
        if answer is LATE:
            self.server.go_on.wait(60)
            answer = 200, b"late"
        status, body = answer
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    with Stub() as running:
        yield running
        running.go_on.set()
        running.shutdown()


@one_version
def test_a_message_is_sent_again_but_not_when_refused(stub, clock, monkeypatch):
    monkeypatch.setattr(remote.random, "uniform", lambda low, high: {(0.5, 1.5): 1.25}[low, high])
    hop = Hop(stub.url, timeout=60, retries=2, backoff=1, cooldown=0)
    stub.script = [(503, b"busy"), (500, b"oh"), (200, b"yes")]
    assert hop.post("/continue", b"x") == b"yes"
    # after a second, and after two; each a little longer or shorter by chance
    assert clock.pauses == [1.25, 2.5]
    stub.script = [(400, b"no"), (200, b"yes")]
    with pytest.raises(NextPartGone, match="status 400: no"):
        hop.post("/continue", b"x")
    assert stub.script.pop() == (200, b"yes")
    stub.script = [(503, b"busy")] * 3
    with pytest.raises(NextPartGone, match="status 503"):
        hop.post("/continue", b"x")
    assert not stub.script


@one_version
def test_a_slow_part_is_not_waited_for(stub, clock):
    hop = Hop(stub.url, timeout=60, cooldown=0)
    stub.script = [LATE]
    with pytest.raises(NextPartGone, match="no answer in time"):
        hop.post("/continue", b"x", timeout=0.2)
    # what it is told leaves us time for our own answer
    assert stub.told() == pytest.approx(0.8 * 0.2)


@one_version
def test_who_is_in_a_hurry_or_is_refused_does_not_send_others_away(stub, clock):
    hop = Hop(stub.url, timeout=60, cooldown=60)
    for answer, reason, timeout in ((LATE, "in time", 0.05), ((400, b"x"), "status 400", None)):
        stub.script = [answer]
        with pytest.raises(NextPartGone, match=reason):
            hop.post("/continue", b"x", timeout=timeout)
        stub.told()
        stub.script = [(200, b"yes")]
        assert hop.post("/continue", b"x") == b"yes"
        stub.told()


@one_version
def test_one_message_alone_tries_a_part_that_hangs(stub, clock):
    hop = Hop(stub.url, timeout=0.2, cooldown=0)
    stub.script = [LATE, LATE, (200, b"yes")]
    with pytest.raises(NextPartGone, match="no answer in time"):
        hop.post("/continue", b"x")
    stub.told()
    hop.timeout = 60
    with ThreadPoolExecutor(1) as pool:
        trying = pool.submit(hop.post, "/continue", b"x")
        stub.told()
        with pytest.raises(NextPartGone, match="is being tried again"):
            hop.post("/continue", b"x")
        assert not trying.done()
        stub.go_on.set()
        assert trying.result(60) == b"late"
    assert hop.post("/continue", b"x") == b"yes"


@one_version
def test_an_answer_that_trickles_in_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n" + b"x" * 99:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.02)

        thread = threading.Thread(target=trickle)
        thread.start()
        # all of it would come, each byte well within the time, but only after seconds
        hop = Hop(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.5, retries=0)
        with pytest.raises(NextPartGone, match="no answer in time"):
            hop.post("/continue", b"x")
        thread.join(10)


@one_version
@torch.no_grad()
def test_a_large_batch_is_sent_in_several_messages(home, behind, monkeypatch):
    first, last = parts_of(home)
    highway, sent = RemoteHighway(first, behind.url, timeout=60), []

    def post(path, body, timeout):
        sent.append(len(unpack(body, last.info.takes)["hidden"]))
        return Hop.post(highway.hop, path, body, timeout)

    monkeypatch.setattr(highway.hop, "post", post)
    images = home[2].repeat(9, 1, 1, 1)
    assert_as_expected(highway({"pixel_values": images.numpy()}), expected_of(home, images))
    # half of the samples go on, and no message has more than 256
    assert sent == [256, 32] and highway.counts["sent_rows"] == 288
    few, of_a_state = home[2][:8], 17 * 32 * 4
    for limit, wanted in ((3 * of_a_state - 1, [2, 2]), (1, [1] * 4)):
        # one at least, whatever a message may hold
        monkeypatch.setattr(remote, "MESSAGE_BYTES", limit)
        sent.clear()
        assert_as_expected(highway({"pixel_values": few.numpy()}), expected_of(home, few))
        assert sent == wanted


@one_version
def test_an_answer_that_is_none_is_not_taken(home, stub):
    highway = RemoteHighway(parts_of(home)[0], stub.url, timeout=60)
    info, lost = highway.info, (expected_of(home).exit_layer > 2).int().tolist()
    rows, words = sum(lost), {"schema": "1", "model": info.model}

    def answers(rows):
        found = {name: np.full((rows, *array["shape"]), 3, array["dtype"]) for name, array in info.answers.items()}
        return {**found, "exit_layer": np.full(rows, info.depths[3]), "degraded": np.zeros(rows, np.uint8)}

    for reply, taken in (
        (b"", False),
        (b"garbage", False),
        (pack({"logits": np.zeros((rows, 5), np.float32)}, words), False),
        (pack(answers(rows - 1), words), False),
        (pack({**answers(rows), "exit_index": np.full(rows, 99)}, words), False),
        (pack(answers(rows), {**words, "model": "0" * 64}), False),
        (pack(answers(rows), words), True),
    ):
        stub.script = [(200, reply)]
        found = highway({"pixel_values": home[2].numpy()})
        assert not stub.script
        # what is said of the samples that went on is taken as it is
        assert found["degraded"].tolist() == [0 if taken else each for each in lost]
        assert (found["logits"] == 3).all(-1).tolist() == [bool(taken and each) for each in lost]


@one_version
def test_an_edge_that_waits_for_its_cloud_still_answers_in_time(home, stub, tmp_path):
    home[1].split([1, 2], tmp_path / "row")
    first, middle = (open_part(tmp_path / "row" / f"part{index}") for index in range(2))
    stub.script = [(503, b"busy")]
    with Running(make_app(RemoteHighway(middle, stub.url, timeout=600, retries=0))) as edge:
        found = RemoteHighway(first, edge.url, timeout=100)({"pixel_values": home[2].numpy()})
    lost = found["degraded"].astype(bool)
    assert lost.tolist() == (expected_of(home).exit_layer > 2).tolist()
    # the edge's last exit, not the device's
    assert set(found["exit_layer"][lost].tolist()) == {2}
    # 80 of its 100 s to the edge, and 80 % of what is left of those to the cloud
    assert 24 < stub.told() <= 64


@one_version
def test_settings_of_a_hop_are_checked(home, behind, nobody):
    first, last = parts_of(home)
    with pytest.raises(ValueError, match="must be a URL"):
        RemoteHighway(first, "cloud:8000")
    for timeout in (0, -1, float("nan"), float("inf"), 3601):
        with pytest.raises(ValueError, match=f"timeout={timeout}"):
            RemoteHighway(first, "http://cloud", timeout=timeout)
    with pytest.raises(ValueError, match="none of float32, float16"):
        RemoteHighway(first, state_dtype="int8")
    with pytest.raises(ValueError, match="the last part"):
        RemoteHighway(last, "http://cloud")
    assert f"127.0.0.1:{nobody}" in RemoteHighway(first, f"http://127.0.0.1:{nobody}").check_next()


def test_another_model_behind_is_noticed(home, tmp_path):
    other = tiny_model("vit", seed=1, **SMALL)
    other.split([2], tmp_path / "parts")
    with Running(make_app(RemoteHighway(open_part(tmp_path / "parts" / "part1")))) as running:
        with pytest.raises(ValueError, match="serves model="):
            RemoteHighway(parts_of(home)[0], running.url).check_next()


# -- requests together ---------------------------------------------------------------------------------------


class Slow:
    """A part that is told when to go on, or fails."""

    def __init__(self, part):
        self.part, self.info, self.error = part, part.info, None
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __call__(self, inputs):
        self.begun.set()
        assert self.go_on.wait(60)
        if self.error:
            raise self.error
        return self.part(inputs)


@one_version
def test_requests_share_batches_and_nobody_notices(home, behind):
    slow, expected = Slow(parts_of(home)[0]), expected_of(home)
    batcher = Batcher(RemoteHighway(slow, behind.url, timeout=60), max_samples=16, max_wait=0)
    pixels = home[2].numpy()
    # the first runs alone, and all that come meanwhile wait for it
    sizes = [1, 3, 2, 20, 1, 5, 1, 1, 7, 1]
    starts = np.cumsum([0, *sizes[:-1]])

    def submit(start, size):
        return batcher.submit({"pixel_values": pixels[start : start + size]})

    with ThreadPoolExecutor(len(sizes)) as pool:
        futures = [submit(starts[0], sizes[0])]
        assert slow.begun.wait(60)
        futures += pool.map(submit, starts[1:], sizes[1:])
    slow.go_on.set()
    for start, size, future in zip(starts, sizes, futures, strict=True):
        rows = slice(start, start + size)
        part = type(expected)(logits=expected.logits[rows], exit_index=expected.exit_index[rows])
        part.exit_layer = expected.exit_layer[rows]
        assert_as_expected(future.result(60), part)
    # 20 samples run alone; the 21 others, in whatever order they came, as two batches of at most 16 or as three
    assert 4 <= batcher.batches <= 6
    batcher.close()
    with pytest.raises(Busy, match="shutting down"):
        batcher.submit({"pixel_values": pixels[:1]})


@one_version
def test_who_is_in_a_hurry_shares_no_batch(home):
    first, last = parts_of(home)
    slow = Slow(first)
    pixels = home[2].numpy()
    with Running(make_app(RemoteHighway(last))) as running:
        batcher = Batcher(RemoteHighway(slow, running.url, timeout=60), max_samples=1024, max_wait=0)
        begun = batcher.submit({"pixel_values": pixels[:1]})
        assert slow.begun.wait(60)
        asked = [batcher.submit({"pixel_values": pixels}, timeout) for timeout in (None, 60.0, 1000.0, 900.0)]
        slow.go_on.set()
        patient, hurried, *alike = [future.result(60) for future in asked]
        begun.result(60)
        batcher.close()
    for found in (patient, hurried, *alike):
        assert_as_expected(found, expected_of(home))
    # the first request, two by themselves, and two together
    assert batcher.batches == 4


@one_version
def test_what_waits_is_answered_before_the_end_and_more_is_refused(home):
    slow = Slow(parts_of(home)[1])
    _, _, state = parts_of(home)[0]({"pixel_values": home[2].numpy()})
    one = {name: array[:1] for name, array in state.items()}
    batcher = Batcher(RemoteHighway(slow), max_samples=1, max_waiting=3)
    running = batcher.submit(one)
    assert slow.begun.wait(60)
    waiting = [batcher.submit(one) for _ in range(3)]
    with pytest.raises(Busy, match="3 samples are waiting"):
        batcher.submit(one)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    slow.go_on.set()
    for future in (running, *waiting):
        assert len(future.result(60)["logits"]) == 1
    closing.join(10)
    assert not closing.is_alive()


@one_version
def test_a_failure_is_told_to_those_it_concerns(home):
    slow = Slow(parts_of(home)[1])
    _, _, state = parts_of(home)[0]({"pixel_values": home[2].numpy()})
    slow.go_on.set()
    slow.error = RuntimeError("no memory left")
    batcher = Batcher(RemoteHighway(slow))
    with pytest.raises(RuntimeError, match="no memory left"):
        batcher.submit(state).result(60)
    slow.error = None
    assert len(batcher.submit(state).result(60)["logits"]) == len(state["hidden"])
    batcher.close()


# -- the command ---------------------------------------------------------------------------------------------


def assert_nobody_is_let_in(port):
    """At once or soon: the service has been told to stop, and has to notice."""
    for _ in range(6000):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    pytest.fail("new connections are still taken")


@one_version
def test_the_command_drains_on_sigterm(home, monkeypatch, capfd):
    """In this process: a thread asks half a question, sends the signal, and asks the other half."""
    before, started = signal.getsignal(signal.SIGTERM), uvicorn.Server.run

    def ask(port):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                body = as_png(random_image(40, 40))
                head = f"POST /predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n"
                connection.sendall(head.encode() + b"expect: 100-continue\r\n\r\n")
                # said once the request is being worked on
                assert connection.recv(4096).startswith(b"HTTP/1.1 100")
                connection.sendall(body[:50])
                os.kill(os.getpid(), signal.SIGTERM)
                assert_nobody_is_let_in(port)
                # what has begun is answered
                connection.sendall(body[50:])
                return b"".join(iter(lambda: connection.recv(4096), b""))
        except BaseException:
            os.kill(os.getpid(), signal.SIGTERM)  # or the service would never end
            raise

    with ThreadPoolExecutor(1) as pool:
        asked = []

        def run(self, sockets):
            asked.append(pool.submit(ask, sockets[0].getsockname()[1]))
            started(self, sockets=sockets)

        monkeypatch.setattr(uvicorn.Server, "run", run)
        try:
            assert main(["serve", str(home[0] / "parts" / "part0"), "--port", "0"]) == 0
            reply = asked[0].result(60)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert reply.startswith(b"HTTP/1.1 200") and b'"degraded"' in reply
    said = capfd.readouterr().out
    assert "part 0 of 2 at http://127.0.0.1:" in said and "marked degraded" in said


@one_version
def test_a_sigterm_right_after_the_address_is_not_lost(home, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGTERM)
    started = uvicorn.Server.run
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, **options: (signal.raise_signal(signal.SIGTERM), started(self, **options))
    )
    try:
        assert main(["serve", str(home[0] / "parts" / "part1"), "--port", "0"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    found = capfd.readouterr()
    assert "part 1 of 2 at http://" in found.out and "Traceback" not in found.err


@one_version
def test_the_command_says_what_is_wrong(home, tmp_path, capsys):
    part = str(home[0] / "parts" / "part1")
    for words, reason in (
        ([str(tmp_path)], "no config.json there"),
        ([part, "--next", "http://cloud"], "the last part"),
        ([part, "--policy", "never"], "split the model again"),
        ([part, "--max-body-mb", "0"], "must be positive"),
        ([str(home[0] / "parts" / "part0"), "--next", "nowhere"], "must be a URL"),
    ):
        assert main(["serve", *words]) == 2
        assert reason in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", part, "--port", str(taken.getsockname()[1])]) == 2
        assert "in use" in capsys.readouterr().err

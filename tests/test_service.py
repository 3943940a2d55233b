"""A service under load and attack: limits, workers that die, deadlines, clients that leave, reload; KServe."""

import asyncio
import io
import json
import socket
import threading
from concurrent.futures import Future

import numpy as np
import pytest

from lgvit_hf.data.processing import make_processor
from lgvit_hf.serving.batching import Batcher, Busy, Expired
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.model_version import _answer
from lgvit_hf.serving.open_part import open_any
from lgvit_hf.serving.predictor import Predictor
from tests.clear import clear_model
from tests.test_split import SMALL, random_image
from tests.tiny import IMAGE_SIZE
from tests.waiting import until

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')
from starlette.testclient import TestClient  # noqa: E402

from lgvit_hf.serving.admission import Limits, protocol  # noqa: E402
from lgvit_hf.serving.prometheus import Metrics  # noqa: E402
from lgvit_hf.serving.server import make_app  # noqa: E402

pytestmark = pytest.mark.version_independent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service") / "model"
    model, images = clear_model("vit", 4, **SMALL)
    model.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    return folder, images.numpy(), Predictor(folder)({"pixel_values": images.numpy()})


@pytest.fixture(scope="module")
def client(home):
    def reopen():
        return RemoteHighway(open_any(home[0]))

    with TestClient(make_app(reopen(), workers=1, reopen=reopen)) as client:
        yield client


def as_png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


# -- KServe -----------------------------------------------------------------------------------------------------


def tensors(home, client, binary):
    """A request by plain HTTP, and the outputs of its response."""
    pixels = home[1]
    entry = {"name": "pixel_values", "datatype": "FP32", "shape": list(pixels.shape)}
    head = {"id": "seven", "inputs": [entry], "outputs": [{"name": "logits"}, {"name": "exit_index"}]}
    if not binary:
        entry["data"] = pixels.ravel().tolist()
        said = client.post("/v2/models/model/infer", json=head).json()
        found = {each["name"]: np.reshape(each["data"], each["shape"]) for each in said["outputs"]}
        return said, found
    entry["parameters"] = {"binary_data_size": pixels.nbytes}
    head["parameters"] = {"binary_data_output": True}
    text = json.dumps(head).encode()
    headers = {"inference-header-content-length": str(len(text))}
    reply = client.post("/v2/models/model/versions/1/infer", content=text + pixels.tobytes(), headers=headers)
    length = int(reply.headers["inference-header-content-length"])
    said, data, found = json.loads(reply.content[:length]), reply.content[length:], {}
    for each in said["outputs"]:
        size = each["parameters"]["binary_data_size"]
        dtype = {"FP32": np.float32, "INT64": np.int64}[each["datatype"]]
        found[each["name"]], data = np.frombuffer(data[:size], dtype).reshape(each["shape"]), data[size:]
    assert not data
    return said, found


@pytest.mark.parametrize("binary", [False, True], ids=["json", "binary"])
def test_kserve_takes_and_gives_tensors(home, client, binary):
    said, found = tensors(home, client, binary)
    assert said["model_name"] == "model" and said["model_version"] == "1" and said["id"] == "seven"
    assert list(found) == ["logits", "exit_index"]
    np.testing.assert_allclose(found["logits"], home[2]["logits"], atol=1e-5)
    assert found["exit_index"].tolist() == home[2]["exit_index"].tolist()


def test_kserve_takes_image_files(home, client):
    files = [as_png(random_image(20, 30, number)) for number in range(3)]
    data = b"".join(len(file).to_bytes(4, "little") + file for file in files)
    entry = {"name": "image", "datatype": "BYTES", "shape": [3], "parameters": {"binary_data_size": len(data)}}
    text = json.dumps({"inputs": [entry]}).encode()
    headers = {"inference-header-content-length": str(len(text))}
    said = client.post("/v2/models/model/infer", content=text + data, headers=headers).json()
    found = {each["name"]: each["data"] for each in said["outputs"]}
    expected = Predictor(home[0]).images(files)
    np.testing.assert_allclose(np.reshape(found["logits"], (3, -1)), expected["logits"], atol=1e-5)


def test_kserve_says_what_there_is(client):
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/model/ready", "/livez", "/readyz"):
        assert client.get(path).status_code == 200, path
    said = client.get("/v2/models/model").json()
    assert said["inputs"][0] == {"name": "pixel_values", "datatype": "FP32", "shape": [-1, 3, IMAGE_SIZE, IMAGE_SIZE]}
    assert {each["name"] for each in said["outputs"]} >= {"logits", "exit_index", "exit_layer", "exit_score"}
    for path in ("/v2/models/other", "/v2/models/model/versions/9"):
        assert client.get(path).status_code == 404 and "error" in client.get(path).json()


GOOD = {"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, IMAGE_SIZE, IMAGE_SIZE]}


@pytest.mark.parametrize(
    "said",
    [
        [],
        {"inputs": None},
        {"inputs": [{}]},
        {"inputs": [{**GOOD, "name": "x", "data": [1]}]},
        {"inputs": [{**GOOD, "data": [1]}]},
        {"inputs": [{**GOOD, "data": [{}] * 768}]},
        {"inputs": [{**GOOD, "datatype": "FP64", "data": [1]}]},
        {"inputs": [{**GOOD, "shape": [-1, 3, 16, 16], "data": [1]}]},
        {"inputs": [{**GOOD, "parameters": {"binary_data_size": 10**9}}]},
        {"inputs": [{**GOOD, "data": [0] * 768}], "outputs": [{"name": "x"}]},
        {"inputs": [{**GOOD, "data": [1e999] * 768}]},
    ],
)
def test_kserve_refuses_what_is_none(client, said):
    text = json.dumps(said)
    reply = client.post("/v2/models/model/infer", content=text)
    assert reply.status_code == 400 and reply.json()["error"], reply.text


def test_a_public_client_reads_it(home):
    triton = pytest.importorskip("tritonclient.http", reason='pip install "tritonclient[http]"')
    from tests.test_serving import Running

    with Running(make_app(RemoteHighway(open_any(home[0])), workers=1)) as running:
        with triton.InferenceServerClient(f"127.0.0.1:{running.port}") as client:
            assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("model")
            given = triton.InferInput("pixel_values", list(home[1].shape), "FP32")
            for binary in (True, False):
                given.set_data_from_numpy(home[1], binary_data=binary)
                found = client.infer("model", [given], request_id="1")
                np.testing.assert_allclose(found.as_numpy("logits"), home[2]["logits"], atol=1e-5)


# -- deadlines --------------------------------------------------------------------------------------------------


class Slow:
    """A part that is told when to go on, and fails at batches of more than one where it is told to."""

    def __init__(self, part):
        self.part, self.info, self.folder, self.sizes = part, part.info, part.folder, []
        self.begun, self.go_on, self.fails = threading.Event(), threading.Event(), False

    def __call__(self, inputs):
        self.sizes.append(len(inputs["pixel_values"]))
        self.begun.set()
        assert self.go_on.wait(60)
        if self.fails and self.sizes[-1] > 1:
            raise RuntimeError("too much for me")
        return self.part(inputs)

    def pixels(self, image):
        return self.part.pixels(image)


def test_cancelled_and_expired_requests_are_not_computed(home):
    slow, metrics = Slow(open_any(home[0])), Metrics()
    batcher = Batcher(RemoteHighway(slow), max_wait=0, observer=metrics)
    one = {"pixel_values": home[1][:1]}
    running = batcher.submit(one)
    assert slow.begun.wait(60)
    left, late, good = batcher.submit(one), batcher.submit(one, 1e-6), batcher.submit(one)
    assert left.cancel() and batcher.waiting == 2
    slow.go_on.set()
    with pytest.raises(Expired):
        late.result(60)
    assert len(good.result(60)["logits"]) == len(running.result(60)["logits"]) == 1
    batcher.close()
    assert slow.sizes == [1, 1]
    text = metrics.text({})
    assert 'lgvit_samples_dropped_total{reason="cancelled"} 1' in text
    assert 'lgvit_samples_dropped_total{reason="expired"} 1' in text


def test_requests_of_a_failed_batch_run_singly(home):
    slow = Slow(open_any(home[0]))
    slow.fails = True
    batcher = Batcher(RemoteHighway(slow), max_wait=0)
    first = batcher.submit({"pixel_values": home[1][:1]})
    assert slow.begun.wait(60)
    futures = [batcher.submit({"pixel_values": home[1][number : number + 1]}) for number in range(3)]
    slow.go_on.set()
    for number, future in enumerate(futures):
        np.testing.assert_allclose(future.result(60)["logits"][0], home[2]["logits"][number], atol=1e-5)
    first.result(60)
    batcher.close()
    assert slow.sizes == [1, 3, 1, 1, 1]


def test_what_waits_too_long_at_the_end_is_told_so(home):
    slow = Slow(open_any(home[0]))
    batcher = Batcher(RemoteHighway(slow), max_wait=0)
    running = batcher.submit({"pixel_values": home[1][:1]})
    assert slow.begun.wait(60)
    waiting = batcher.submit({"pixel_values": home[1][:1]})
    batcher.refuse_waiting()
    with pytest.raises(Busy, match="shutting down"):
        waiting.result(60)
    slow.go_on.set()
    assert len(running.result(60)["logits"]) == 1
    batcher.close()


def test_a_client_that_leaves_is_not_computed_and_one_in_a_hurry_is_told(home):
    from tests.test_serving import Running

    slow = Slow(open_any(home[0]))
    with Running(make_app(RemoteHighway(slow), workers=1)) as running:
        body = as_png(random_image(9, 9))
        head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
        connections = [socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(4)]
        connections[0].sendall(head.encode() + b"\r\n" + body)
        assert slow.begun.wait(60)
        connections[1].sendall(head.encode() + b"x-lgvit-timeout: 0.05\r\n\r\n" + body)
        reply = connections[1].recv(4096)
        assert reply.startswith(b"HTTP/1.1 503") and b"retry-after" in reply
        for connection in connections[2:]:
            connection.sendall(head.encode() + b"\r\n" + body)
        batcher = running.server.config.app.state.service.served.batcher
        until(lambda: batcher.waiting == 2)
        for connection in connections[2:]:
            connection.close()
        until(lambda: batcher.waiting == 0)
        slow.go_on.set()
        assert connections[0].recv(4096).startswith(b"HTTP/1.1 200")
        for connection in connections[:2]:
            connection.close()
    assert slow.sizes == [1]


# -- connections, bodies, versions ------------------------------------------------------------------------------


def closed_or_late(connection):
    try:
        reply = connection.recv(100)
    except ConnectionError:
        return True
    return reply == b"" or reply.startswith(b"HTTP/1.1 408")


def test_idle_connections_make_room_and_late_headers_are_refused(home):
    from tests.test_serving import Running

    limits = Limits(connections=3, header_seconds=0.3)
    app = make_app(RemoteHighway(open_any(home[0])), workers=1, limits=limits)
    with Running(app, http=protocol(limits)) as running:
        idle = [socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(3)]
        idle[0].sendall(b"GET /health HTTP/1.1\r\nx-slow: ")
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as last:
            last.sendall(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
            assert last.recv(4096).startswith(b"HTTP/1.1 200")
            # one was closed at once, and all are in the end, with a reason
            assert all(closed_or_late(connection) for connection in idle)
        for connection in idle:
            connection.close()


def whole_answer(connection):
    """What is read until the other side closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_is_too_long_is_refused_before_it_has_come(home, chunked):
    from tests.test_serving import Running

    limits = Limits(body_bytes=100_000)
    app = make_app(RemoteHighway(open_any(home[0])), workers=1, limits=limits)
    piece = bytes(150_000)
    with Running(app) as running, socket.create_connection(("127.0.0.1", running.port), timeout=60) as sender:
        # nothing of the first is sent, and half of the second, before the answer is there
        head = b"transfer-encoding: chunked" if chunked else b"content-length: 3000000"
        begun = b"%x\r\n" % 3_000_000 + piece if chunked else b""
        sender.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n" + begun)
        answer = sender.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
        held = running.server.config.app.state.service._admission
        assert held._held == 0
        # who sends all before it reads finds no connection that was reset
        for _ in range(19 if chunked else 20):
            sender.sendall(piece)
        if chunked:
            sender.sendall(b"\r\n0\r\n\r\n")
        assert b"more than 100000 bytes" in answer + whole_answer(sender)


def test_the_largest_upload_makes_way(home):
    from tests.test_serving import Running

    limits = Limits(body_bytes=100_000, total_bytes=100_000)
    with Running(make_app(RemoteHighway(open_any(home[0])), workers=1, limits=limits)) as running:
        small, large = (socket.create_connection(("127.0.0.1", running.port), timeout=60) for _ in range(2))
        large.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 95000\r\n\r\n" + bytes(90_000))
        held = running.server.config.app.state.service._admission
        until(lambda: held._held == 90_000)
        small.sendall(b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: 30000\r\n\r\n" + bytes(30_000))
        assert large.recv(4096).startswith(b"HTTP/1.1 503")
        assert small.recv(4096).startswith(b"HTTP/1.1 400")
        until(lambda: held._held == 0)
        small.close()
        large.close()


def test_a_request_that_is_sent_again_is_not_computed_again(home):
    slow = Slow(open_any(home[0]))
    slow.go_on.set()
    files = [as_png(random_image(9, 9, number)) for number in range(2)]
    with TestClient(make_app(RemoteHighway(slow), workers=1)) as client:
        found = [
            client.post("/predict", content=file, headers=headers)
            for headers in ({"x-request-id": "a"}, {})
            for file in (files[0], files[0], files[1])
        ]
    assert [reply.headers.get("x-request-id") for reply in found] == ["a"] * 3 + [None] * 3
    assert [reply.json() for reply in found[:3]] == [reply.json() for reply in found[3:]]
    # the second of those with an id is the first again; another body under that id is not
    assert len(slow.sizes) == 5


def test_spans_are_made_where_a_provider_is(home, monkeypatch):
    trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")
    names = []

    class Provider(trace.NoOpTracerProvider):
        def get_tracer(self, *arguments, **options):
            return Tracer()

    class Tracer(trace.NoOpTracer):
        def start_as_current_span(self, name, context=None, **options):
            parent = trace.get_current_span(context).get_span_context().trace_id
            names.append((name, parent if context is not None else None))
            return super().start_as_current_span(name, context, **options)

    monkeypatch.setattr(trace, "get_tracer_provider", Provider)
    monkeypatch.setattr(trace, "get_tracer", lambda name: Tracer())
    headers = {"traceparent": f"00-{7:032x}-{1:016x}-01"}
    with TestClient(make_app(RemoteHighway(open_any(home[0])), workers=1)) as client:
        assert client.post("/predict", content=as_png(random_image(9, 9)), headers=headers).status_code == 200
    assert names == [("lgvit.request", 7), ("lgvit.decode", None), ("lgvit.answer", None)]


def test_settings_of_limits_are_checked():
    with pytest.raises(ValueError, match="connections=0 must be positive"):
        Limits(connections=0)
    with pytest.raises(ValueError, match="total_bytes=5 must hold one body"):
        Limits(total_bytes=5)


def test_a_model_is_opened_again_without_dropping_a_request(home):
    opened = [Slow(open_any(home[0]))]

    def reopen():
        if len(opened) > 1:
            raise OSError("it is gone")
        opened.append(Slow(open_any(home[0])))
        opened[1].go_on.set()
        return RemoteHighway(opened[1])

    with TestClient(make_app(RemoteHighway(opened[0]), workers=1, reopen=reopen)) as client:
        service, body, found = client.app.state.service, as_png(random_image(9, 9)), []
        asking = threading.Thread(target=lambda: found.append(client.post("/predict", content=body).status_code))
        asking.start()
        assert opened[0].begun.wait(60)
        reloading = client.portal.start_task_soon(service.reload)
        until(lambda: service.served.version == 2)
        assert client.post("/predict", content=body).status_code == 200 and opened[1].sizes == [1]
        opened[0].go_on.set()
        assert reloading.result(60) is True
        asking.join(60)
        assert found == [200] and opened[0].sizes == [1]
        # what cannot be opened changes nothing
        assert client.portal.call(service.reload) is False
        assert client.get("/health").json()["version"] == 2
        counted = client.get("/metrics").text
        assert "lgvit_batches_total 2" in counted and "lgvit_model_version 2" in counted


@pytest.mark.parametrize("loops", ["asyncio", "uvloop"])
def test_time_that_is_over_is_said_whenever_the_timer_comes(loops):
    """uvloop's timers come early by its clock: then, too, it is no request that was cancelled."""
    run = pytest.importorskip(loops).run

    async def answer(wait):
        with pytest.raises(Expired, match="waited longer"):
            await _answer(Future(), wait)

    async def several():
        for number in range(100):
            await answer(5e-4 + 1e-4 * (number % 17))

    run(several())


def test_a_request_that_is_cancelled_does_not_expire():
    async def cancelled():
        task = asyncio.ensure_future(_answer(Future(), 60.0))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())

"""`lgvit serve --engine ray`: the answers of the local service, by replicas of Ray Serve; one may be killed."""

import asyncio
import importlib.util
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from lgvit_hf import Predictor
from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from tests.clear import clear_model
from tests.processes import ROOT
from tests.seeds import rng
from tests.tiny import IMAGE_SIZE

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')
from starlette.testclient import TestClient  # noqa: E402

from lgvit_hf.serving import ray_app, ray_serve  # noqa: E402
from lgvit_hf.serving.open_service import ServiceSettings  # noqa: E402

pytestmark = pytest.mark.version_independent
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='pip install "lgvit-hf[ray]"')
KEEP = {"policy": {"name": "never"}}


@pytest.fixture
def folder(tmp_path):
    """A highway whose samples exit everywhere."""
    model, _ = clear_model("vit", 10)
    model.save_pretrained(tmp_path / "model")
    make_processor(IMAGE_SIZE).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def some_images(number):
    pixels = rng().integers(0, 256, (number, IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.uint8)
    return list(map(Image.fromarray, pixels))


def as_png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_without_ray(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    assert main(["serve", str(folder), "--engine", "ray"]) == 2
    assert "--engine ray needs Ray" in (said := capsys.readouterr().err) and 'pip install "lgvit-hf[ray]"' in said
    with pytest.raises(ImportError, match=r"lgvit-hf\[ray\]"):
        ray_app(str(folder))


@pytest.mark.parametrize(
    "words, said",
    [
        (["--replicas", "2"], "--replicas 2 goes with --engine ray"),
        (["--engine", "ray", "--max-connections", "5"], "connections are those of its proxy"),
        (["--engine", "ray", "--max-per-address", "5"], "connections are those of its proxy"),
        (["--engine", "ray", "--replicas", "0"], "--replicas"),
        (["--engine", "spark"], "--engine"),
        (["--engine", "ray", "--max-queue-ms", "5"], "--max-queue-ms 5 goes with --ladder"),
    ],
)
def test_options_that_do_not_go_together(words, said, folder, capsys):
    assert main(["serve", str(folder), *words]) == 2
    assert said in capsys.readouterr().err


def test_what_replicas_are_not_for(tmp_path, folder):
    assert main(["split", str(folder), str(tmp_path / "parts"), "--at", "2"]) == 0
    for settings, said in (
        ({"path": str(tmp_path / "parts" / "part1")}, "holds the whole model"),
        ({"path": str(folder), "next": "http://edge:8000"}, "holds the whole model"),
        ({"path": str(folder), "drift": "calibration.json"}, "is for one process"),
    ):
        with pytest.raises(ValueError, match=said):
            ray_serve._of_a_replica(ServiceSettings(**settings))
    with pytest.raises(ValueError, match="model is missing"):
        ray_serve.build_app({"replicas": 2})


def test_settings_that_there_are_not(folder):
    with pytest.raises(ValueError, match="unknown settings nonsense; known: policy, runtime, threads"):
        ray_app(str(folder), nonsense=1)
    with pytest.raises(ValueError, match="unknown settings threads; known: none beside yours"):
        ray_app(ServiceSettings(path=str(folder)), threads=4)
    with pytest.raises(TypeError, match="bytes"):
        ray_serve.build_app({"model": str(folder), "limits": {"bytes": 5}})


def test_a_cluster_that_serves_already(monkeypatch):
    """Ray ignores another address then, and another application of the same name would replace the first."""
    applications = dict.fromkeys(["other"])
    serve = SimpleNamespace(status=lambda: SimpleNamespace(applications=applications))
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        for host in ("127.0.0.1", "0.0.0.0"):
            ray_serve._check_proxy(host, port)
        applications["lgvit"] = None
        with pytest.raises(ValueError, match="serves 'lgvit' already"):
            ray_serve._check_proxy("127.0.0.1", port)
    del applications["lgvit"]
    with pytest.raises(ValueError, match=rf"--port {port}: Ray Serve runs .* does not listen there"):
        ray_serve._check_proxy("127.0.0.1", port)


def test_what_a_replica_does(folder, caplog):
    """Its routes are the local service's; another policy takes no restart, and a bad one leaves what there was."""
    images = some_images(6)
    expected = Predictor(folder).images(images)
    settings = ray_serve._of_a_replica(ServiceSettings(path=str(folder)))
    assert (settings.threads, settings.decoders) == (1, 1)
    replica = ray_serve._Replica()
    replica.app = ray_serve._service(settings)

    def exits():
        replies = [client.post("/predict", content=as_png(image)) for image in images]
        assert all(reply.status_code == 200 for reply in replies)
        return [reply.json()["answers"][0]["exit_index"] for reply in replies]

    bad_ones = (
        ({"policy": {"name": "confidence", "threshold": "high"}}, "threshold"),
        ({"policy": {"name": "nothing"}}, "nothing"),
        ({"policy": "never"}, "a policy and nothing else"),
        ({"threshold": 0.5}, "a policy and nothing else"),
    )
    with TestClient(replica.app) as client:
        change = client.portal.call
        for bad, said in bad_ones:
            with pytest.raises(ValueError, match=said):
                change(replica.reconfigure, bad)
        replica.check_health()
        assert exits() == expected["exit_index"].tolist()
        change(replica.reconfigure, KEEP)
        last = len(Predictor(folder).opened.depths) - 1
        assert exits() == [last] * len(images)
        version = replica.app.state.service.served.version
        change(replica.reconfigure, KEEP)
        assert replica.app.state.service.served.version == version == 2
        for bad, said in bad_ones:
            caplog.clear()
            change(replica.reconfigure, bad)
            assert "the policy before it stays" in caplog.text and said in caplog.text
            assert exits() == [last] * len(images)
        change(replica.app.state.service.reload)
        assert exits() == [last] * len(images)
    with pytest.raises(RuntimeError, match="no thread computes"):
        replica.check_health()


def test_counts_of_all_replicas(folder, monkeypatch):
    """`/metrics` holds those of each that answers, under the names of the local service."""
    replica = ray_serve._Replica()
    replica.app = ray_serve._service(ray_serve._of_a_replica(ServiceSettings(path=str(folder))))

    class Handle:
        def broadcast(self, method):
            assert method == "metrics"
            return self

        async def results_async(self, timeout_s, return_exceptions):
            assert timeout_s > 0 and return_exceptions
            await asyncio.sleep(0)
            own = replica.app.state.service.metrics_text
            return [("a", own), ("b", own), RuntimeError("it died")]

    context = SimpleNamespace(deployment="highway", app_name="lgvit")
    serve = SimpleNamespace(get_replica_context=lambda: context, get_deployment_handle=lambda *names: Handle())
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(serve=serve))
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    with TestClient(replica.app) as client:
        assert client.post("/predict", content=as_png(some_images(1)[0])).status_code == 200
        found = client.get("/metrics").text
        local = replica.app.state.service.metrics_text
    assert 'lgvit_requests_total{path="/predict",replica="b",status="200"} 1.0' in found
    kept = {line for line in local.splitlines() if line.startswith("# TYPE")}
    assert kept <= set(found.splitlines())


def test_the_manifest_for_kubernetes():
    """It is YAML, its application can be imported, and takes the arguments that it is given."""
    manifest = yaml.safe_load((ROOT / "docs/kuberay.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    groups = [manifest["spec"]["rayClusterConfig"]["headGroupSpec"]]
    groups += manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {each["name"] for each in pod["containers"][0]["volumeMounts"]}
        assert mounted == {each["name"] for each in pod["volumes"]}
    config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    module, name = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), name) is ray_serve.build_app
    arguments = dict(application["args"])
    taken = inspect.signature(ray_serve.ray_app).bind(**arguments)
    settings = ServiceSettings(path=arguments["model"], **taken.arguments["settings"])
    (deployment,) = application["deployments"]
    assert deployment["name"] == ray_serve.DEPLOYMENT
    assert ray_serve._policy_of(deployment["user_config"], settings) == {"name": "confidence", "threshold": 0.8}
    assert arguments["autoscaling"]["max_replicas"] > arguments["autoscaling"]["min_replicas"]
    assert manifest["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"] is True
    if importlib.util.find_spec("ray") is not None:
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(config)


# -- with Ray itself --------------------------------------------------------------------------------------------------


def ask(url, body):
    """The answer of a service, asked once more where it did not give one."""
    for attempt in range(2):
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{url}/predict", body), timeout=60) as reply:
                return json.loads(reply.read())["answers"][0]
        except OSError:
            if attempt:
                raise
            time.sleep(0.5)


def replicas_of(process):
    import psutil

    children = psutil.Process(process.pid).children(recursive=True)
    return [each for each in children if each.name().startswith("ray::ServeRep") and each.status() != "zombie"]


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_two_replicas_one_killed_under_load(runtime, folder, tmp_path):
    images = some_images(32)
    expected, bodies = Predictor(folder).images(images), list(map(as_png, images))
    model = [str(folder)]
    if runtime != "torch":
        assert main(["export", str(folder), str(tmp_path / "onnx"), "--thresholds", "input"]) == 0
        model = [str(tmp_path / "onnx"), "--runtime", runtime]
    command = [sys.executable, "-m", "lgvit_hf.cli", "serve", *model, "--port", "0", "--engine", "ray"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([*command, "--replicas", "2"], env=environment, cwd=tmp_path, **pipes) as process:
        try:
            said = process.stdout.readline()
            assert "a whole highway in 2 replicas at http://127.0.0.1:" in said
            url = said.split()[-1]
            numbers = rng().integers(len(images), size=300).tolist()
            with ThreadPoolExecutor(8) as clients:
                answers = [clients.submit(ask, url, bodies[number]) for number in numbers]
                answers[50].result()
                os.kill(replicas_of(process)[0].pid, signal.SIGKILL)
                found = [answer.result() for answer in answers]
            for number, answer in zip(numbers, found, strict=True):
                assert answer["exit_index"] == expected["exit_index"][number]
                np.testing.assert_allclose(answer["exit_score"], expected["exit_score"][number], atol=1e-5)
            with pytest.raises(urllib.error.HTTPError, match="400"):
                urllib.request.urlopen(urllib.request.Request(f"{url}/predict", b"no image"), timeout=60)
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port)), timeout=60) as late:
                body = bodies[0]
                late.sendall(f"POST /predict HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode())
                late.sendall(body[:10])
                time.sleep(2)
                process.send_signal(signal.SIGTERM)
                time.sleep(2)
                late.sendall(body[10:])
                assert late.recv(1000).startswith(b"HTTP/1.1 200")
            assert process.wait(90) == 0
        finally:
            process.kill()

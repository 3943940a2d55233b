"""A service with a ladder that looks for drift: rungs by load, refusals, marks, audits, restarts; what is refused."""

import json
import logging
import re
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lgvit_hf.cli import main
from lgvit_hf.data.processing import make_processor
from lgvit_hf.evaluation.exit_table import weights_digest
from lgvit_hf.files import locked
from lgvit_hf.serving.batching import Batcher
from lgvit_hf.serving.device.message import CONTENT_TYPE, pack
from lgvit_hf.serving.device.remote import RemoteHighway
from lgvit_hf.serving.predictor import THRESHOLDS, Predictor
from lgvit_hf.serving.whole_model import Whole
from tests.clear import clear_model
from tests.test_split import SMALL
from tests.tiny import IMAGE_SIZE
from tests.waiting import until

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')
import uvicorn  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from lgvit_hf.serving import batching  # noqa: E402
from lgvit_hf.serving.certified import Certified  # noqa: E402
from lgvit_hf.serving.server import make_app  # noqa: E402

pytestmark = pytest.mark.version_independent
TENSORS = {"content-type": CONTENT_TYPE}
MINUTE_MS = 60_000.0
SAFEST, MIDDLE, FASTEST = 0, 1, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A checkpoint with a ladder of three rungs, four images for each exit of the middle one, and their answers."""
    folder = tmp_path_factory.mktemp("ladder") / "model"
    model, images = clear_model("vit", 4, **SMALL)
    own = model.exit_policy.to_dict()
    # nothing exits early by the first, and everything at the first exit by the last
    policies = [{**own, "threshold": each} for each in ([0.995] * 3, own["threshold"], [0.05] * 3)]
    exits = ([0, 0, 0, 1000], [250] * 4, [1000, 0, 0, 0])
    labels = [1000 // model.config.num_labels] * model.config.num_labels
    baseline = {"samples": 1000, "labels": labels, "harm": 10}
    report = {
        "ladder": [
            {"policy": each, "baseline": {**baseline, "exits": found}}
            for each, found in zip(policies, exits, strict=True)
        ],
        "policy": own,
        "baseline": {**baseline, "exits": exits[MIDDLE]},
        "delta": 0.05,
        "bound": "drop",
        "max_accuracy_drop": 0.01,
        "weights": weights_digest(model),
        "ensemble": None,
    }
    model.save_pretrained(folder)
    make_processor(IMAGE_SIZE).save_pretrained(folder)
    pixels = images.numpy()
    return SimpleNamespace(
        folder=folder,
        model=model,
        pixels=pixels,
        report=report,
        answers=[Predictor(folder, each)({"pixel_values": pixels}) for each in policies],
    )


def written(tmp_path, report):
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(report))
    return file


class Gated(Whole):
    """A whole model that is told when to go on."""

    def __init__(self, folder):
        self.begun, self.go_on, self.seen = threading.Event(), threading.Event(), []
        self.go_on.set()
        super().__init__(folder)

    def __call__(self, inputs):
        self.seen.append(inputs)
        self.begun.set()
        assert self.go_on.wait(60)
        return super().__call__(inputs)

    def close(self):
        self.begun.clear()
        self.go_on.clear()
        self.seen.clear()


def served(part, certified, **options):
    return TestClient(make_app(RemoteHighway(certified.fitted(part)), certified=certified, workers=1, **options))


def ask(client, pixels, **headers):
    return client.post("/predict", content=pack({"pixel_values": pixels}), headers={**TENSORS, **headers})


def exits_of(reply):
    return [answer["exit_index"] for answer in reply.json()["answers"]]


# -- rungs by load ----------------------------------------------------------------------------------------------


def test_rungs_climb_with_the_queue_and_stay_with_their_samples(home, tmp_path, monkeypatch):
    """Requests come at ages of the queue that a clock of the batcher's own says; all of them run as one batch."""
    late = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(batching, "time", clock)
    part = Gated(home.folder)
    certified = Certified(part, ladder=written(tmp_path, home.report), max_queue_ms=MINUTE_MS)
    with served(part, certified) as client:
        batcher, replies = client.app.state.service.served.batcher, {}
        part.close()

        def post(name, images):
            replies[name] = ask(client, home.pixels[images])

        threads = [threading.Thread(target=post, args=("running", [0]))]
        threads[0].start()
        assert part.begun.wait(60)
        # before one and two thirds of the time, and after them; each is the oldest only to those behind it
        for number, (name, seconds) in enumerate((("first", 0), ("safest", 15), ("middle", 25), ("fastest", 45))):
            late[0] = seconds
            threads.append(threading.Thread(target=post, args=(name, [1, 2, 3])))
            threads[-1].start()
            until(lambda wanted=3 * (number + 1): batcher.waiting == wanted)
        late[0] = 61
        refused = ask(client, home.pixels[:1])
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "60000 ms" in refused.json()["error"]
        late[0] = 50
        part.go_on.set()
        for thread in threads:
            thread.join(60)
        after = ask(client, home.pixels[:1])
        text, health = client.get("/metrics").text, client.get("/health").json()
    rungs = {"running": SAFEST, "first": SAFEST, "safest": SAFEST, "middle": MIDDLE, "fastest": FASTEST}
    for name, rung in rungs.items():
        images = [0] if name == "running" else [1, 2, 3]
        answers = replies[name].json()["answers"]
        assert [answer["rung"] for answer in answers] == [rung] * len(images), name
        # as each sample alone by the thresholds of that rung
        assert exits_of(replies[name]) == home.answers[rung]["exit_index"][images].tolist()
        assert [answer["label"] for answer in answers] == [
            home.model.config.id2label[label] for label in home.answers[rung]["label"][images].tolist()
        ]
        assert "alarm" not in answers[0]
    assert [len(inputs["pixel_values"]) for inputs in part.seen] == [1, 12, 1]
    assert after.json()["answers"][0]["rung"] == SAFEST
    for line in (
        'lgvit_rung_samples_total{rung="0"} 8',
        'lgvit_rung_samples_total{rung="1"} 3',
        'lgvit_rung_samples_total{rung="2"} 3',
        "lgvit_ladder_refused_total 1",
        "lgvit_rung 0",
    ):
        assert line in text
    assert health["ladder"]["rungs"] == 3 and "if samples arrive independently" in health["ladder"]["promise"]


@pytest.mark.parametrize("scheduler", ["segments", "batch"])
def test_either_scheduler_answers_by_the_rung(home, tmp_path, monkeypatch, scheduler):
    """As each sample alone by the thresholds of the rung for that age of the queue; beyond the last one 503."""
    certified, age = Certified(Whole(home.folder), ladder=written(tmp_path, home.report), max_queue_ms=MINUTE_MS), [0]
    with served(Whole(home.folder), certified, scheduler=scheduler) as client:
        batcher = client.app.state.service.served.batcher
        assert isinstance(batcher, Batcher) == (scheduler == "batch")
        # of segments a timeout is for the answer, not for the time in the queue alone
        assert (batcher.pass_seconds > 0) == (scheduler == "segments")
        monkeypatch.setattr(type(batcher), "queue_age", property(lambda self: age[0]))
        for rung, seconds in ((SAFEST, 0), (MIDDLE, 25), (FASTEST, 45)):
            age[0] = seconds
            reply = ask(client, home.pixels)
            assert [answer["rung"] for answer in reply.json()["answers"]] == [rung] * len(home.pixels)
            assert exits_of(reply) == home.answers[rung]["exit_index"].tolist()
        age[0] = 61
        assert ask(client, home.pixels).status_code == 503


def test_what_would_begin_too_late_is_refused(home, tmp_path):
    """The model does not go on until the one that waits has its 503; it is not computed, nor is one in a hurry."""
    part = Gated(home.folder)
    certified = Certified(part, ladder=written(tmp_path, home.report), max_queue_ms=50.0)
    with served(part, certified) as client:
        batcher = client.app.state.service.served.batcher
        part.close()
        # without a time in which it must begin
        running = batcher.submit({"pixel_values": home.pixels[:1], THRESHOLDS: certified._rows[:1]})
        assert part.begun.wait(60)
        for headers in ({"x-lgvit-timeout": "0.01"}, {}):
            reply = ask(client, home.pixels[:1], **headers)
            assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
        # the first of them is in the queue still, though given up: at its age nothing is let in
        until(lambda: batcher.queue_age > 0.05)
        assert "have waited for 50 ms already" in ask(client, home.pixels[:1]).json()["error"]
        part.go_on.set()
        running.result(60)
    assert len(part.seen) == 1


def test_what_was_given_up_takes_no_place_in_a_batch(home):
    part = Gated(home.folder)
    batcher = Batcher(RemoteHighway(part), max_samples=2, max_wait=0)
    part.close()
    one = {"pixel_values": home.pixels[:1]}
    running = batcher.submit(one)
    assert part.begun.wait(60)
    given_up, *others = (batcher.submit(one) for _ in range(3))
    assert given_up.cancel()
    part.go_on.set()
    for future in (running, *others):
        future.result(60)
    batcher.close()
    assert [len(inputs["pixel_values"]) for inputs in part.seen] == [1, 2]


def test_a_queue_is_as_old_as_its_first():
    class Never:
        info = SimpleNamespace(gives={})

    batcher = Batcher(RemoteHighway(Never()))
    assert batcher.queue_age == 0.0
    batcher.close()


def test_kserve_and_messages_say_the_rung(home, tmp_path):
    part = Whole(home.folder)
    file = written(tmp_path, home.report)
    certified = Certified(part, ladder=file, max_queue_ms=MINUTE_MS, drift=file)
    with served(part, certified) as client:
        entry = {"name": "pixel_values", "datatype": "FP32", "shape": list(home.pixels.shape)}
        entry["data"] = home.pixels.ravel().tolist()
        said = client.post("/v2/models/model/infer", json={"inputs": [entry]}).json()
        outputs = {each["name"]: each["data"] for each in said["outputs"]}
        assert outputs["rung"] == [SAFEST] * 16 and outputs["alarm"] == [0] * 16
        names = {each["name"]: each["datatype"] for each in client.get("/v2/models/model").json()["outputs"]}
        assert names["rung"] == "INT64" and names["alarm"] == "UINT8"
        # thresholds are the server's to choose
        entry = {"name": THRESHOLDS, "datatype": "FP32", "shape": [1, 3], "data": [0.0] * 3}
        assert client.post("/v2/models/model/infer", json={"inputs": [entry]}).status_code == 400
        body = pack({"pixel_values": home.pixels[:1], THRESHOLDS: np.zeros((1, 3), np.float32)})
        assert client.post("/predict", content=body, headers=TENSORS).status_code == 400
        reply = client.post(
            "/predict", content=pack({"pixel_values": home.pixels}), headers={**TENSORS, "accept": CONTENT_TYPE}
        )
        assert b'"rung"' in reply.content and reply.status_code == 200


@pytest.fixture(scope="module")
def single(home, tmp_path_factory):
    """The same model as one ONNX file."""
    pytest.importorskip("onnxruntime")
    from lgvit_hf.export.segment_graphs import export_parts
    from lgvit_hf.export.writing import manifest_of, write_parts

    folder = tmp_path_factory.mktemp("single") / "model"
    folder.mkdir()
    files = write_parts(home.model, export_parts(home.model, range(4)), folder, "single")
    home.model.config.save_pretrained(folder)
    manifest_of(home.model, folder, files).save(folder)
    return folder


def test_one_file_answers_by_the_ladder_of_its_checkpoint(home, single, tmp_path):
    part = Whole(single)
    certified = Certified(part, ladder=written(tmp_path, home.report), max_queue_ms=MINUTE_MS)
    fitted = certified.fitted(part)
    rungs = np.arange(16) % 3
    rows = np.array(certified.ladder.thresholds, np.float32)[rungs]
    answers, _, _ = fitted({"pixel_values": home.pixels, THRESHOLDS: rows})
    expected = [home.answers[rung]["exit_index"][number] for number, rung in enumerate(rungs)]
    assert answers["exit_index"].tolist() == expected and len(set(expected)) > 2


def test_a_file_whose_thresholds_are_fixed_is_refused(home, single, tmp_path):
    pytest.importorskip("openvino")
    part = Whole(single, runtime="openvino")
    certified = Certified(part, ladder=written(tmp_path, home.report), max_queue_ms=MINUTE_MS)
    with pytest.raises(ValueError, match="takes none for each sample"):
        certified.fitted(part)


# -- drift ------------------------------------------------------------------------------------------------------

WRONG_EXITS = [0, 0, 1000, 0]


def with_exits(report, exits):
    """The report, as if samples had exited elsewhere when it was calibrated, by whatever rung."""
    rungs = [{**rung, "baseline": {**rung["baseline"], "exits": exits}} for rung in report["ladder"]]
    return {**report, "ladder": rungs, "baseline": {**report["baseline"], "exits": exits}}


def alarms(caplog):
    return [record.message for record in caplog.records if "drift alarm" in record.message]


@pytest.mark.parametrize("has_ladder", [True, False], ids=["ladder", "policy"])
def test_an_alarm_is_told_once_and_outlives_the_service(home, tmp_path, caplog, has_ladder):
    caplog.set_level(logging.WARNING)
    file = written(tmp_path, with_exits(home.report, WRONG_EXITS))
    given = {"ladder": file, "max_queue_ms": MINUTE_MS} if has_ladder else {}
    part = Whole(home.folder)
    certified = Certified(part, drift=file, audit=0.0, **given)
    with served(part, certified) as client:
        for _ in range(20):
            assert [answer["alarm"] for answer in ask(client, home.pixels).json()["answers"]] == [False] * 16
        client.portal.call(certified._look)
        client.portal.call(certified._look)
        answers = ask(client, home.pixels).json()["answers"]
        assert [answer["alarm"] for answer in answers] == [True] * 16
        assert "lgvit_drift_alarm 1.0" in client.get("/metrics").text
        said = client.get("/health").json()["drift"]
        assert said["alarm"] is True and said["samples"] == 320
    assert len(alarms(caplog)) == 1 and str(tmp_path / "calibration.drift.json") in alarms(caplog)[0]
    caplog.clear()
    again = Certified(Whole(home.folder), drift=file, **given)
    assert again.watch.alarm and sum(monitor.samples for monitor in again.watch.monitors) == 336
    assert len(alarms(caplog)) == 1
    if has_ladder:
        # however old the queue is, only the safest
        busy = SimpleNamespace(batcher=SimpleNamespace(queue_age=0.9 * MINUTE_MS / 1e3))
        assert again._rung(busy) == SAFEST


def test_nothing_is_told_while_nothing_changes(home, tmp_path, caplog):
    exits = np.bincount(home.answers[MIDDLE]["exit_index"], minlength=4)
    labels = np.bincount(home.answers[MIDDLE]["label"], minlength=home.model.config.num_labels)
    baseline = {"samples": 1600, "exits": (100 * exits).tolist(), "labels": (100 * labels).tolist(), "harm": 0}
    part = Whole(home.folder)
    certified = Certified(part, drift=written(tmp_path, {**home.report, "baseline": baseline}))
    with served(part, certified) as client:
        for _ in range(20):
            ask(client, home.pixels)
    assert not certified.watch.alarm and not alarms(caplog)
    assert certified.watch.monitors[0].samples == 320


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_an_audit_counts_what_the_full_model_answers_otherwise(home, tmp_path, share):
    part = Gated(home.folder)
    certified = Certified(part, drift=written(tmp_path, home.report), audit=share)
    with served(part, certified) as client:
        part.seen.clear()
        for _ in range(3):
            found = exits_of(ask(client, home.pixels))
            until(lambda: not certified._audits)  # an audit shares a run with the next request where they meet
        assert found == home.answers[MIDDLE]["exit_index"].tolist()
    harm = int((home.answers[MIDDLE]["label"] != home.answers[SAFEST]["label"]).sum())
    counts = certified.watch.monitors[0].state()["all"]
    assert (counts["samples"], counts["audited"]) == (48, 48 * share)
    assert counts["harm"] == 3 * harm * share
    # those that reached the end are not run again
    assert [len(inputs["pixel_values"]) for inputs in part.seen] == ([16, 12] * 3 if share else [16] * 3)
    said = certified.metrics()
    if share:
        same = float(48 - 3 * harm)
        assert f'lgvit_audited_samples_total{{outcome="same"}} {same}' in said


def test_about_the_share_that_was_asked_for_is_audited(home, tmp_path):
    certified = Certified(Whole(home.folder), drift=written(tmp_path, home.report), audit=0.25)
    picked = certified.watch.picked(40_000)
    # ten standard deviations
    assert abs(picked.mean() - 0.25) < 10 * (0.25 * 0.75 / 40_000) ** 0.5
    assert (certified.watch.picked(40_000) != picked).any()


def test_an_audit_that_fails_changes_no_answer(home, tmp_path, caplog):
    class Failing(Whole):
        def __call__(self, inputs):
            if np.isinf(inputs.get(THRESHOLDS, 0)).all() and len(inputs["pixel_values"]) > 1:
                raise RuntimeError("no memory")
            return super().__call__(inputs)

    part = Failing(home.folder)
    certified = Certified(part, drift=written(tmp_path, home.report), audit=1.0)
    with served(part, certified) as client:
        assert ask(client, home.pixels).status_code == 200
    assert 'lgvit_audited_samples_total{outcome="dropped"} 12' in certified.metrics()
    assert certified.watch.monitors[0].state()["all"]["audited"] == 4
    assert "an audit failed" in caplog.text


def test_another_model_is_not_taken_at_a_reload(home, tmp_path):
    part = Whole(home.folder)
    certified = Certified(part, ladder=written(tmp_path, home.report), max_queue_ms=MINUTE_MS)
    certified.fitted(part)
    assert certified.fitted(Whole(home.folder)).info.answers["rung"] == {"dtype": "int64", "shape": []}
    with pytest.raises(ValueError, match="it is another model, or has another policy"):
        certified.fitted(Whole(home.folder, {"name": "never"}))


def test_one_state_is_of_one_service(home, tmp_path):
    certified = Certified(Whole(home.folder), drift=written(tmp_path, home.report))
    with certified.held():
        assert json.loads(certified.watch.file.read_text())["monitors"][0]["p_value"] == 1.0
    with locked(certified.watch.file):
        pass


def test_the_command_serves_by_a_ladder_and_holds_what_it_knows(home, tmp_path, monkeypatch, capsys):
    before, held = signal.getsignal(signal.SIGTERM), []
    lock = tmp_path / ".drift.json.lock"

    def run(self, sockets):
        held.append(lock.exists())
        sockets[0].close()

    monkeypatch.setattr(uvicorn.Server, "run", run)
    file = str(written(tmp_path, home.report))
    words = ["--ladder", file, "--max-queue-ms", "100", "--drift", file, "--audit", "0.01"]
    try:
        assert (
            main(["serve", str(home.folder), "--port", "0", *words, "--drift-state", str(tmp_path / "drift.json")])
            == 0
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    assert held == [True] and not lock.exists() and (tmp_path / "drift.json").is_file()
    assert "of each of 3 rungs" in capsys.readouterr().out


# -- what is refused --------------------------------------------------------------------------------------------


def changed(report, **changes):
    return {**report, **changes}


def of_rungs(change):
    return lambda report: {**report, "ladder": [change(rung) for rung in report["ladder"]]}


LADDER = ["--ladder", "FILE", "--max-queue-ms", "100"]
DRIFT = ["--drift", "FILE"]


@pytest.mark.parametrize(
    ("words", "change", "reason"),
    [
        (LADDER, lambda report: {**report, "ladder": []}, "the ladder is empty"),
        (LADDER, lambda report: {**report, "delta": None}, "not certified"),
        (LADDER, lambda report: {**report, "weights": "0" * 64}, "of a model with other weights"),
        (LADDER, of_rungs(lambda rung: {**rung, "policy": {**rung["policy"], "name": "margin"}}), "of another policy"),
        (LADDER, of_rungs(lambda rung: {"policy": {**rung["policy"], "threshold": [0.9] * 2}}), "has 2 thresholds"),
        (
            LADDER,
            of_rungs(lambda rung: {"policy": {**rung["policy"], "threshold": [0.9, 1.0, 0.9]}}),
            "evaluates exits",
        ),
        (LADDER, lambda report: 3, "is not what `lgvit calibrate` writes"),
        (["--ladder", "FILE"], dict, "--ladder needs --max-queue-ms"),
        (["--max-queue-ms", "100"], dict, "goes with --ladder"),
        (["--ladder", "FILE", "--max-queue-ms", "0"], dict, "max_queue_ms"),
        (["--ladder", "NOWHERE", "--max-queue-ms", "100"], dict, "NOWHERE"),
        (["--audit", "0.1"], dict, "--audit 0.1 goes with --drift"),
        (["--drift-state", "x.json"], dict, "--drift-state x.json goes with --drift"),
        ([*DRIFT, "--audit", "1.5"], dict, "from 0 to 1"),
        ([*DRIFT, "--audit", "-0.1"], dict, "from 0 to 1"),
        ([*DRIFT, "--audit", "0.1"], lambda report: {**report, "ensemble": {"weights": []}}, "answers by an ensemble"),
        (DRIFT, lambda report: {**report, "baseline": None}, "the baseline has no 'samples'"),
        (
            DRIFT,
            lambda report: {**report, "baseline": {**report["baseline"], "labels": None}},
            "the baseline has no 'labels'",
        ),
        (
            DRIFT,
            lambda report: {**report, "baseline": {**report["baseline"], "labels": [500, 500]}},
            "a baseline of 2 labels, but the model has 5",
        ),
        (DRIFT, lambda report: {**report, "policy": {"name": "never"}}, "of another policy"),
        (DRIFT, lambda report: {**report, "weights": "0" * 64}, "of a model with other weights"),
        (
            [*LADDER, *DRIFT],
            of_rungs(lambda rung: {**rung, "baseline": {**rung["baseline"], "labels": None}}),
            "the baseline has no 'labels'",
        ),
        ([*DRIFT, "--drift-state", "FILE"], dict, "is damaged or of another calibration"),
    ],
)
def test_what_is_no_ladder_or_baseline_of_this_model(home, tmp_path, capsys, words, change, reason):
    file = written(tmp_path, change(home.report))
    words = [str(file) if word == "FILE" else word for word in words]
    assert main(["serve", str(home.folder), "--port", "0", *words]) == 2
    said = capsys.readouterr().err
    assert reason in said and "Traceback" not in said


def test_files_of_two_calibrations_are_refused(home, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**home.report, "ladder": home.report["ladder"][:2]}))
    file = written(tmp_path, home.report)
    with pytest.raises(ValueError, match="not those of the ladder"):
        Certified(Whole(home.folder), ladder=file, max_queue_ms=100.0, drift=other)


def test_a_policy_without_thresholds_is_watched_but_not_audited(home, tmp_path):
    policy = {"name": "patience", "patience": 2}
    file = written(tmp_path, {**home.report, "policy": policy})
    assert not Certified(Whole(home.folder, policy), drift=file).watch.alarm
    with pytest.raises(ValueError, match=re.escape("--audit: the policy 'patience' has no thresholds")):
        Certified(Whole(home.folder, policy), drift=file, audit=0.1)


def test_a_part_has_no_rungs(home, tmp_path, capsys):
    home.model.split([2], tmp_path / "parts", processor=make_processor(IMAGE_SIZE))
    file = written(tmp_path, home.report)
    words = ["--ladder", str(file), "--max-queue-ms", "100"]
    assert main(["serve", str(tmp_path / "parts" / "part0"), "--port", "0", *words]) == 2
    assert "serve the checkpoint, or a single file" in capsys.readouterr().err

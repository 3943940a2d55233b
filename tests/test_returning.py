"""`Returning`, and batches of clients that ask again as soon as they are answered."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lgvit_hf.serving import batching
from lgvit_hf.serving.batching import Batcher, Expired
from lgvit_hf.serving.returning import Returning


def awaited(returning, size, come, batches=400, seconds=0.02):
    """Of so many batches of `size` requests, after how many others are awaited; `come` gives when they ask again."""
    found = 0
    for number in range(batches):
        now = seconds * number
        returning.answered(size, seconds, now)
        found += returning.awaited > 0
        for after in sorted(come()):
            returning.asked(now + after)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 8])
def test_requests_at_times_of_their_own_are_seldom_awaited_and_who_asks_again_at_once_nearly_always(size, seed):
    rng = random.Random(seed)
    any_time = awaited(Returning(0.002), size, lambda: [rng.uniform(0, 0.02) for _ in range(size)])
    at_once = awaited(Returning(0.002), size, lambda: [rng.uniform(0, 0.0015) for _ in range(size)])
    assert any_time <= 40 and at_once >= 390


def test_who_asks_again_is_awaited_until_the_last_has_come():
    returning = Returning(max_wait=0.002)
    awaited(returning, 8, lambda: [0.001] * 8, batches=10)
    returning.answered(3, 0.02, 1.0)
    assert returning.awaited == 3 and returning.until == pytest.approx(1.006)
    for number, (now, until) in enumerate(((1.005, 1.007), (1.0065, 1.0085), (1.0084, 1.01), (1.0095, 1.01)), 1):
        returning.asked(now)
        # each makes time for another, but for half of a batch at most
        assert returning.until == pytest.approx(until) and returning.awaited == max(0, 3 - number)


def test_who_comes_after_a_pause_does_not_count_and_makes_no_time():
    returning = Returning(max_wait=0.002)
    assert not awaited(returning, 2, lambda: [0.0045] * 2, batches=20)
    returning.arrives(0.38 + 0.0045)
    assert returning.until == pytest.approx(0.384)


def test_what_turns_out_to_be_no_request_makes_nobody_awaited():
    returning = Returning(max_wait=0.002)
    for number in range(20):
        returning.answered(8, 0.02, 0.02 * number)
        for each in range(8):
            returning.arrives(0.02 * number + 0.001 * each)
    assert returning.awaited == 0


def test_a_max_wait_of_nothing_is_no_wait():
    returning = Returning(max_wait=0.0)
    assert not awaited(returning, 8, lambda: [0.001] * 8, batches=10)


class Part:
    """Takes some time for a batch; says how many samples each had."""

    def __init__(self, seconds=0.05):
        self.sizes, self._seconds = [], seconds

    def part(self, inputs):
        time.sleep(self._seconds)
        self.sizes.append(len(inputs["pixel_values"]))
        return {"logits": inputs["pixel_values"]}, np.zeros(0, np.int64), {}

    def finish(self, answers, further, state, timeout=None):
        return answers


def closed_loop(batcher, until, asked=200):
    """Two clients; the second comes while the first is computed."""
    over = threading.Event()

    def client(number):
        for each in range(asked):
            if over.is_set():
                return
            with batcher.coming():
                future = batcher.submit({"pixel_values": np.full((1, 1), number + each)})
            assert future.result(60)["logits"] == number + each
            if until():
                over.set()

    with ThreadPoolExecutor(2) as clients:
        first = clients.submit(client, 0)
        time.sleep(0.02)
        second = clients.submit(client, 1000)
        first.result(), second.result()


def test_two_clients_that_ask_again_at_once_come_to_share_their_batches():
    part = Part()
    batcher = Batcher(part, max_wait=0.02)
    closed_loop(batcher, lambda: part.sizes[-10:] == [2] * 10)
    # then they stay away, and who comes alone is not made to wait for them
    start = time.monotonic()
    batcher.submit({"pixel_values": np.ones((1, 1))}).result(60)
    alone = time.monotonic() - start
    batcher.close()
    assert part.sizes[-11:] == [2] * 10 + [1] and alone < 30


def test_a_full_batch_does_not_wait_for_others():
    batcher = Batcher(Part(), max_samples=2, max_wait=60.0)
    with batcher.coming():  # another, that does not come
        start = time.monotonic()
        assert len(batcher.submit({"pixel_values": np.ones((2, 1))}).result(60)["logits"]) == 2
        assert time.monotonic() - start < 30
    batcher.close()


def test_what_waits_for_others_while_nothing_runs_is_not_old():
    batcher = Batcher(Part(), max_wait=60.0)
    with batcher.coming():
        future = batcher.submit({"pixel_values": np.ones((1, 1))})
        time.sleep(0.5)
        assert batcher.queue_age < 0.4
    assert future.result(60)["logits"] == 1
    batcher.close()


def test_who_is_not_answered_yet_is_not_awaited(monkeypatch):
    answered = []

    class Recorded(Returning):
        def answered(self, requests, seconds, now):
            answered.append(requests)
            super().answered(requests, seconds, now)

    class FirstPart(Part):
        def part(self, inputs):
            answers, _, _ = super().part(inputs)
            return answers, np.flatnonzero(inputs["pixel_values"][:, 0] > 0), {}

    monkeypatch.setattr(batching, "Returning", Recorded)
    batcher = Batcher(FirstPart(), max_wait=60.0)
    with batcher.coming():
        futures = [batcher.submit({"pixel_values": np.full((1, 1), number)}) for number in (0, 1, 0)]
    assert [future.result(60)["logits"] for future in futures] == [0, 1, 0]
    batcher.close()
    assert answered == [2]


def test_a_request_waits_for_who_asks_again_for_half_of_its_time_and_the_late_keep_nobody_from_waiting(monkeypatch):
    class Always(Returning):
        awaited = 1

        def arrives(self, now):
            self.until = now + 60

    monkeypatch.setattr(batching, "Returning", Always)
    part = Part()
    batcher = Batcher(part, max_wait=60.0)
    start = time.monotonic()
    future = batcher.submit({"pixel_values": np.ones((1, 1))}, timeout=3.0)
    late = batcher.submit({"pixel_values": np.ones((1, 1))}, timeout=1e-6)
    assert future.result(60)["logits"] == 1 and time.monotonic() - start > 1.0
    with pytest.raises(Expired):
        late.result(60)
    batcher.close()

"""`Returning`, and batches of clients that ask again as soon as they are answered."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lgvit_hf.serving.batching import Batcher
from lgvit_hf.serving.returning import MOST, Returning


def served(returning, batches, come, rng):
    """Batches of 8 requests, 20 ms each; `come` gives after how many seconds requests arrive."""
    now = 0.0
    for _ in range(batches):
        returning.answered(8, 0.02, now)
        for after in sorted(come(rng)):
            if after < 0.02:
                returning.asked(now + after)
        now += 0.02
    returning.answered(8, 0.02, now)
    return now


@pytest.mark.parametrize("seed", range(5))
def test_clients_that_ask_again_at_once_are_awaited_until_the_last_has_come(seed):
    returning, rng = Returning(max_wait=0.002), random.Random(seed)
    now = served(returning, 10, lambda rng: [rng.uniform(0, 0.004) for _ in range(8)], rng)
    assert returning.awaited == 8 and returning.until == pytest.approx(now + 0.002)
    for number in range(8):
        returning.asked(now + 0.001 * (number + 1))
        # each makes time for another, but for half of a batch at most
        assert returning.until == pytest.approx(now + min(0.001 * (number + 1) + 0.002, 0.01))
        assert returning.awaited == 7 - number
    returning.asked(now + 0.009)
    assert returning.awaited == 0


def test_what_turns_out_to_be_no_request_makes_nobody_awaited():
    returning = Returning(max_wait=0.002)
    for number in range(20):
        returning.answered(8, 0.02, 0.02 * number)
        for each in range(8):
            returning.arrives(0.02 * number + 0.001 * each)
    assert returning.awaited == 0


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("load", [0.5, 0.8, 1.0])
def test_requests_at_times_of_their_own_are_seldom_awaited(load, seed):
    returning, rng = Returning(max_wait=0.002), random.Random(seed)
    awaited = 0
    for _ in range(500):
        served(returning, 1, lambda rng: [rng.uniform(0, 0.02) for _ in range(8) if rng.random() < load], rng)
        awaited += returning.awaited > 0
    assert awaited <= 50 and MOST > 0.5


def test_who_did_not_come_back_is_not_awaited_for_long():
    returning = Returning(max_wait=0.002)
    now = served(returning, 10, lambda rng: [0.001] * 8, None)
    for number in range(1, 10):
        returning.answered(8, 0.02, now + 0.02 * number)
    assert returning.awaited == 0


def test_a_max_wait_of_nothing_is_no_wait():
    returning = Returning(max_wait=0.0)
    now = served(returning, 10, lambda rng: [0.001] * 8, None)
    assert returning.until == now


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
    closed_loop(batcher, lambda: part.sizes[-3:] == [2, 2, 2])
    batcher.close()
    assert part.sizes[-3:] == [2, 2, 2]


def test_a_request_does_not_wait_for_others_so_long_that_it_is_late():
    batcher = Batcher(Part(0.5), max_wait=60.0)
    batcher.submit({"pixel_values": np.zeros((1, 1))}).result(60)
    with batcher.coming():  # another, that does not come
        start = time.monotonic()
        answer = batcher.submit({"pixel_values": np.ones((1, 1))}, timeout=1.5).result(60)
        assert answer["logits"] == 1 and time.monotonic() - start < 30
    batcher.close()

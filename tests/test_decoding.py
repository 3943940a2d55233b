"""Image files decoded in worker processes, and made what a model takes."""

import asyncio
import io
import os
import signal

import numpy as np
import pytest
from PIL import Image

from lgvit_hf.serving.device.pixels import pixel_settings, prepare
from lgvit_hf.serving.device.rgb import MAX_SCANNED
from lgvit_hf.serving.resized import ResizedImages
from tests.test_split import random_image

pytest.importorskip("starlette", reason='pip install "lgvit-hf[serve]"')

from lgvit_hf.serving import decoding  # noqa: E402
from lgvit_hf.serving.decoding import Decoder, Resize, Undecodable, check_json  # noqa: E402

pytestmark = pytest.mark.version_independent


def as_png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def jpeg_of_scans(side, scans):
    """A flat progressive JPEG whose last scan is repeated."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side)).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def decoded(*bodies, is_json=False):
    """What a decoder says to bodies, one after another: arrays, or the error."""

    async def ask():
        decoder, said = Decoder(1), []
        try:
            for body in bodies:
                try:
                    said.append(await decoder(body, is_json, Resize(8, 6, 2, 3), 4))
                except Undecodable as error:
                    said.append(error)
        finally:
            decoder.close()
        return said

    return asyncio.run(ask())


def test_large_images_go_to_the_other_lane_and_too_large_ones_nowhere():
    side = int(decoding.QUICK_PIXELS**0.5) + 10
    large, many = decoded(as_png(Image.new("L", (side, side))), jpeg_of_scans(3500, 60))
    assert large[0].shape == (8, 6, 3)
    assert many.status == 413 and "scans" in str(many)


def test_many_scans_of_a_small_image_are_no_quick_work():
    small = jpeg_of_scans(500, 30)
    assert decoding.decode([small], None, decoding.PIXELS, MAX_SCANNED)[0].shape == (500, 500, 3)
    with pytest.raises(Undecodable, match="scans") as refused:
        decoding.decode([small], None, decoding.QUICK_PIXELS, decoding.QUICK_PIXELS)
    assert refused.value.status == 413  # which the other lane tries again


def test_large_images_that_wait_keep_out_no_small_ones():
    async def ask():
        decoder = Decoder(1, max_waiting=2)
        decoder._slow.waiting = 2
        try:
            side = int(decoding.QUICK_PIXELS**0.5) + 10
            with pytest.raises(Undecodable, match="2 large images wait") as refused:
                await decoder(as_png(Image.new("L", (side, side))), False, None, 1)
            assert refused.value.status == 503 and not decoder.full
            return await decoder(as_png(random_image(9, 9)), False, None, 1)
        finally:
            decoder.close()

    assert np.array_equal(asyncio.run(ask())[0], np.asarray(random_image(9, 9)))


def test_a_worker_that_dies_or_is_too_slow_costs_its_own_request_alone():
    good, side = as_png(random_image(9, 9)), int(decoding.QUICK_PIXELS**0.5) + 10
    large = as_png(Image.new("L", (side, side)))

    async def ask():
        decoder = Decoder(1)
        lanes = decoder._quick, decoder._slow
        try:
            await decoder.start()
            # each is killed while it has the request
            workers = [lane._idle[0] for lane in lanes]
            for worker in workers:
                os.kill(worker._process.pid, signal.SIGSTOP)
            asked = asyncio.create_task(decoder(good, False, None, 1))
            for worker in workers:
                while worker._answer is None:
                    await asyncio.sleep(0.01)
                worker._process.kill()
            with pytest.raises(Undecodable, match="ended the process") as ended:
                await asked
            for lane in lanes:
                lane._seconds = 0.0
            with pytest.raises(Undecodable, match="took too long") as late:
                await decoder(large, False, None, 1)
            assert ended.value.status == late.value.status == 413
            for lane in lanes:
                lane._seconds = 60.0
            return await decoder(good, False, None, 1)
        finally:
            decoder.close()

    assert np.array_equal(asyncio.run(ask())[0], np.asarray(random_image(9, 9)))


def test_a_client_that_leaves_early_costs_the_worker_nothing_but_its_answer(monkeypatch):
    monkeypatch.setattr(decoding, "GRACE", 60.0)  # as long as this machine needs

    async def ask():
        decoder = Decoder(1)
        try:
            await decoder.start()
            (worker,) = decoder._quick._all
            for _ in range(3):
                asked = asyncio.create_task(decoder(as_png(random_image(9, 9)), False, None, 1))
                while worker._answer is None:
                    await asyncio.sleep(0)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
                while worker._answer is not None:
                    await asyncio.sleep(0.01)
            found = await decoder(as_png(random_image(7, 5)), False, None, 1)
            assert decoder._quick._all == {worker}
            return found
        finally:
            decoder.close()

    assert np.array_equal(asyncio.run(ask())[0], np.asarray(random_image(7, 5)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [None, {"height": 3, "width": 5}])
def test_resized_images_are_what_the_image_processor_gives(channels, crop):
    settings = pixel_settings(
        {
            "do_resize": True, "size": {"height": 8, "width": 6}, "resample": 2, "do_rescale": True,
            "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6][:channels],
            "image_std": [0.2, 0.3, 0.7][:channels], "do_center_crop": crop is not None, "crop_size": crop,
        },
        channels,
    )  # fmt: skip
    arrays = decoding.decode([as_png(random_image(8, 6)), as_png(random_image(6, 8))], Resize.of(settings), 1000, 1000)
    found = ResizedImages(settings, lambda image: prepare(image, settings))(arrays)
    for array, pixels in zip(arrays, found, strict=True):
        assert np.array_equal(pixels, prepare(Image.fromarray(array), settings))
    with pytest.raises(ValueError, match="more than its own value"):
        ResizedImages(settings, lambda image: prepare(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), settings))


def test_json_is_measured_before_it_is_read():
    check_json(b'{"images":[' + b'"aGk=",' * 255 + b'"aGk="]}', 256)
    with pytest.raises(Undecodable, match="at most 256 images") as refused:
        check_json(b'{"images":[' + b"{}," * 1000 + b"{}]}", 256)
    assert refused.value.status == 413

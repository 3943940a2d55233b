"""Random crops and flips: their distributions, their edges, what they refuse."""

import itertools
import math
import random

import numpy as np
import pytest
from PIL import Image

from lgvit_hf.data.augmentation import Augmentation, random_box
from tests.seeds import rng, seed

version_independent = pytest.mark.version_independent


def boxes(width, height, scale, count=12_000):
    """As many as keep every quantile six standard deviations away from its bound."""
    numbers = rng()
    return np.array([random_box(width, height, scale, numbers) for _ in range(count)])


def gradient(width, height):
    """Red tells the column, green the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def quantiles_are_uniform(values, low, high, tolerance):
    expected = np.linspace(low, high, 11)[1:-1]
    return np.allclose(np.quantile(values, np.linspace(0, 1, 11)[1:-1]), expected, atol=tolerance * (high - low))


# -- random_resized --------------------------------------------------------------------------------------------


@version_independent
def test_areas_are_uniform_and_ratios_log_uniform():
    # up to half of a square, every box fits: nothing is drawn twice
    left, top, right, bottom = boxes(1000, 1000, (0.08, 0.5)).T
    assert (left >= 0).all() and (top >= 0).all() and (right <= 1000).all() and (bottom <= 1000).all()
    area, ratio = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    assert quantiles_are_uniform(area, 0.08, 0.5, 0.03)
    assert quantiles_are_uniform(np.log(ratio), math.log(3 / 4), math.log(4 / 3), 0.03)
    assert quantiles_are_uniform(left / (1000 - (right - left)), 0, 1, 0.03), "anywhere, evenly"
    assert quantiles_are_uniform(top / (1000 - (bottom - top)), 0, 1, 0.03)


@version_independent
@pytest.mark.parametrize(("width", "height"), [(1000, 1000), (1000, 600), (400, 1000)])
def test_boxes_of_the_whole_range_are_those_of_rejection_sampling(width, height):
    numbers = rng(1)
    area = width * height * numbers.uniform(0.08, 1, 40_000)
    ratio = np.exp(numbers.uniform(math.log(3 / 4), math.log(4 / 3), 40_000))
    w, h = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (w <= width) & (h <= height)
    left, top, right, bottom = boxes(width, height, (0.08, 1.0)).T
    for ours, theirs, side in ((right - left, w[fits], width), (bottom - top, h[fits], height)):
        levels = np.linspace(0.05, 0.95, 19)
        assert np.allclose(np.quantile(ours, levels), np.quantile(theirs, levels), atol=0.03 * side)


@version_independent
@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493, 0, 506, 10)),  # 4:3 in the middle
        ((10, 1000), (0, 493, 10, 506)),  # 3:4 in the middle
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_an_image_too_long_for_any_box_is_cut_in_the_middle(size, box):
    assert {tuple(found) for found in boxes(*size, (0.9, 1.0), count=20).tolist()} == {box}


@version_independent
def test_the_image_is_cut_at_the_box_and_resized():
    image = gradient(200, 150)
    augment = Augmentation(scale=(0.1, 0.3), flip=False)
    for number in range(20):
        left, top, right, bottom = random_box(200, 150, (0.1, 0.3), rng(number))
        pixels = np.asarray(augment(image, (20, 30), rng(number))).astype(float)
        assert pixels.shape == (20, 30, 3)
        # the centre of each new column lies at its share of the box
        columns = left + (np.arange(30) + 0.5) * (right - left) / 30 - 0.5
        rows = top + (np.arange(20) + 0.5) * (bottom - top) / 20 - 0.5
        assert abs(pixels[5, 2:-2, 0] - columns[2:-2]).max() <= 1 and abs(pixels[2:-2, 5, 1] - rows[2:-2]).max() <= 1


# -- pad, none, flip -------------------------------------------------------------------------------------------


@version_independent
def test_padded_crops_are_all_shifts_by_up_to_an_eighth_over_black():
    pixels = np.asarray(gradient(24, 16)) + np.uint8(1)
    padded = np.pad(pixels, ((2, 2), (3, 3), (0, 0)))
    shifts = {padded[top : top + 16, left : left + 24].tobytes(): (left, top) for left in range(7) for top in range(5)}
    augment, numbers, image = Augmentation(crop="pad", flip=False), rng(), Image.fromarray(pixels)
    found = [shifts[augment(image, (16, 24), numbers).tobytes()] for _ in range(14_000)]
    counts = np.unique(found, axis=0, return_counts=True)[1]
    assert len(counts) == 35 and counts.min() > 240 and counts.max() < 580, "each about 400 times"


@pytest.mark.parametrize("crop", ["random_resized", "pad", "none"])
def test_the_result_has_the_size_asked_for(crop):
    sizes, sources = [(8, 8), (7, 20), (40, 30)], [(1, 1), (30, 8), (31, 65)]
    for size, source, mode in itertools.product(sizes, sources, ("RGB", "L")):
        for numbers in (rng(), random.Random(seed())):
            image = Augmentation(crop=crop)(Image.new(mode, source), size, numbers)
            assert image.size == size[::-1] and image.mode == mode


@version_independent
def test_no_crop_is_a_resize():
    image, augment = gradient(30, 20), Augmentation(crop="none", flip=False)
    assert augment(image, (20, 30), random.Random(seed())) == image
    assert augment(image, (8, 9), random.Random(seed())) == image.resize((9, 8), Image.Resampling.BILINEAR)


@version_independent
def test_half_of_the_images_are_flipped():
    image = gradient(12, 9)
    flipped, numbers = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), rng()
    results = [Augmentation(crop="none")(image, (9, 12), numbers) for _ in range(2000)]
    assert all(result in (image, flipped) for result in results)
    # five standard deviations
    assert abs(sum(result == flipped for result in results) - 1000) < 5 * math.sqrt(2000) / 2


@version_independent
def test_the_source_of_randomness_decides_alone():
    image, augment = gradient(40, 40), Augmentation()
    once, again, *others = (augment(image, (8, 8), rng(number)) for number in (3, 3, *range(4, 14)))
    assert once == again and any(once != other for other in others)


# -- what is wrong ---------------------------------------------------------------------------------------------


@version_independent
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "center"}, "crop is 'center'; it must be one of random_resized, pad, none"),
        ({"scale": (0.5, 0.1)}, r"scale is \(0.5, 0.1\)"),
        ({"scale": (0.0, 1.0)}, "smallest"),
        ({"scale": (0.5, 1.5)}, "largest <= 1"),
        ({"scale": (0.5,)}, "two numbers"),
        ({"scale": 0.5}, "two numbers"),
        ({"crop": "pad", "scale": (0.5, 1.0)}, "'pad' does not use it"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**settings)

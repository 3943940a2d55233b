"""Each loss against its formula, with sums written out."""

import math

import pytest
import torch

from lgvit_hf.losses import (
    align_map,
    check_labels,
    distillation_loss,
    global_homogeneous_loss,
    heterogeneous_loss,
    lgvit_feature_losses,
    local_homogeneous_loss,
    loss_weights,
    map_grid,
    task_loss,
    weighted_loss,
)

pytestmark = pytest.mark.version_independent

BATCH, NUM_LABELS = 4, 5


def log_softmax(row):
    largest = max(row)
    total = sum(math.exp(value - largest) for value in row)
    return [value - largest - math.log(total) for value in row]


def kl(student_row, teacher_row):
    """KL(teacher || student) of two rows of logits."""
    student, teacher = log_softmax(student_row), log_softmax(teacher_row)
    return sum(math.exp(t) * (t - s) for s, t in zip(student, teacher, strict=True))


def cross_entropy(logits, labels):
    rows = zip(logits.tolist(), labels.tolist(), strict=True)
    return sum(-log_softmax(row)[label] for row, label in rows) / len(logits)


@pytest.fixture
def logits():
    return torch.randn(BATCH, NUM_LABELS)


@pytest.fixture
def labels():
    return torch.tensor([0, 4, 2, 2])


# -- labels ----------------------------------------------------------------------------------------------------


def test_task_loss_of_classes(logits, labels):
    expected = cross_entropy(logits, labels)
    assert task_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)
    assert task_loss(logits, labels, "single_label_classification").item() == pytest.approx(expected, rel=1e-5)
    assert task_loss(logits, labels[:, None]).item() == pytest.approx(expected, rel=1e-5)


def test_samples_labelled_minus_100_do_not_count(logits, labels):
    labels[1] = -100
    kept = torch.tensor([0, 2, 3])
    assert task_loss(logits, labels).item() == pytest.approx(cross_entropy(logits[kept], labels[kept]), rel=1e-5)


def test_task_loss_of_several_labels_per_row(logits):
    labels = (torch.rand(BATCH, NUM_LABELS) < 0.5).float()
    expected = 0.0
    for row, truth in zip(logits.flatten().tolist(), labels.flatten().tolist(), strict=True):
        probability = 1 / (1 + math.exp(-row))
        expected -= math.log(probability if truth else 1 - probability) / labels.numel()
    assert task_loss(logits, labels, "multi_label_classification").item() == pytest.approx(expected, rel=1e-4)
    assert task_loss(logits, labels).item() == pytest.approx(expected, rel=1e-4)


def test_task_loss_of_regression(logits):
    values = torch.randn(BATCH)
    expected = sum((a - b) ** 2 for a, b in zip(logits[:, 0].tolist(), values.tolist(), strict=True)) / BATCH
    for answer in (task_loss(logits[:, :1], values), task_loss(logits[:, :1], values[:, None], "regression")):
        assert answer.item() == pytest.approx(expected, rel=1e-5)
    several = torch.randn(BATCH, NUM_LABELS)
    assert task_loss(logits, several, "regression").item() == pytest.approx(((logits - several) ** 2).mean().item())


def test_floats_are_classes_where_the_problem_says_so(logits, labels):
    one_column = task_loss(logits[:, :1], torch.zeros(BATCH, 1, dtype=torch.long), "single_label_classification")
    assert one_column.item() == 0  # the only class there is
    with pytest.raises((RuntimeError, ValueError)):
        task_loss(logits, labels, "multi_label_classification")


def test_labels_that_are_no_classes_are_named():
    for label in (5, -1, -99, -101, 99):
        with pytest.raises(ValueError, match=rf"labels: {label} is outside 0\.\.4 \(num_labels=5\)"):
            check_labels(torch.tensor([4, 0, label, -100]), NUM_LABELS)
    with pytest.raises(ValueError, match=r"labels: 2 is outside 0\.\.1"):
        check_labels(torch.tensor([2]), 2)
    check_labels(torch.tensor([0, 4, -100]), NUM_LABELS)
    # what are no class numbers: floats, several labels per sample, a single output; and what cannot be read
    check_labels(torch.tensor([9.5]), NUM_LABELS)
    check_labels(torch.tensor([[9, 9]]), NUM_LABELS)
    check_labels(torch.tensor([9]), 1)
    check_labels(torch.tensor([9], device="meta"), NUM_LABELS)


def test_half_precision_is_summed_in_float32(logits, labels):
    half = logits.bfloat16()
    assert task_loss(half, labels).dtype == torch.float32
    assert task_loss(half, labels).item() == pytest.approx(cross_entropy(half.float(), labels), rel=1e-5)
    assert distillation_loss(half, half.flip(0)).dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("depth", [2.0, 3.0, 6.0]), ("uniform", [1.0, 1.0, 1.0]), ([0.3, 0.3, 1], [0.3, 0.3, 1.0])],
)
def test_loss_weights(weights, expected):
    assert loss_weights(weights, [2, 3], 6) == expected


def test_weighted_loss(logits, labels):
    exits = [logits, logits.flip(0), logits.flip(1)]
    each = [cross_entropy(exit_logits, labels) for exit_logits in exits]
    expected = (2 * each[0] + 3 * each[1] + 6 * each[2]) / 11
    assert weighted_loss(exits, labels, [2.0, 3.0, 6.0]).item() == pytest.approx(expected, rel=1e-5)


def test_an_exit_of_weight_zero_does_not_touch_the_loss(logits, labels):
    nan = torch.full_like(logits, math.nan, requires_grad=True)
    loss = weighted_loss([nan, logits], labels, [0.0, 2.0])
    assert loss.item() == pytest.approx(cross_entropy(logits, labels), rel=1e-5)


def test_as_many_weights_as_exits(logits, labels):
    with pytest.raises(ValueError, match="shorter|longer"):
        weighted_loss([logits, logits], labels, [1.0, 1.0, 1.0])


# -- distillation ----------------------------------------------------------------------------------------------


def test_distillation_loss(logits):
    teacher = torch.randn(BATCH, NUM_LABELS)
    for temperature in (1.0, 2.0, 5.0):
        softened = zip((logits / temperature).tolist(), (teacher / temperature).tolist(), strict=True)
        expected = sum(kl(s, t) for s, t in softened) * temperature**2 / (BATCH * NUM_LABELS)
        assert distillation_loss(logits, teacher, temperature).item() == pytest.approx(expected, rel=1e-4)
    assert torch.equal(distillation_loss(logits, teacher), distillation_loss(logits, teacher, 2.0))


def random_map(num_patches, width=6, batch=BATCH):
    return torch.randn(batch, num_patches, width)


def by_hand_heterogeneous(student, teacher):
    pairs = zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), strict=True)
    return sum(kl(s, t) for s, t in pairs) / len(student)


def by_hand_local(student, teacher):
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return sum((s - t) ** 2 for s, t in pairs) / student.numel()


def by_hand_global(student, teacher):
    """Gram matrices, entry by entry."""
    width, total = student.shape[-1], 0.0
    for s, t in zip(student, teacher, strict=True):
        for i in range(width):
            for j in range(width):
                total += ((s[:, i] * s[:, j]).sum().item() - (t[:, i] * t[:, j]).sum().item()) ** 2
    return total / (len(student) * width * width)


def test_heterogeneous_loss():
    student, teacher = random_map(9), random_map(9)
    expected = by_hand_heterogeneous(student, teacher)
    assert heterogeneous_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)


def test_local_homogeneous_loss():
    student, teacher = random_map(9), random_map(9)
    assert local_homogeneous_loss(student, teacher).item() == pytest.approx(by_hand_local(student, teacher), rel=1e-5)


def test_global_homogeneous_loss_of_maps_of_different_sizes():
    student, teacher = random_map(9), random_map(4)
    assert global_homogeneous_loss(student, teacher).item() == pytest.approx(
        by_hand_global(student, teacher), rel=1e-4
    )


@pytest.mark.parametrize(
    ("loss", "make"),
    [
        (distillation_loss, lambda: torch.randn(BATCH, NUM_LABELS)),
        (heterogeneous_loss, lambda: random_map(4)),
        (local_homogeneous_loss, lambda: random_map(4)),
        (global_homogeneous_loss, lambda: random_map(4)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_teacher_is_detached_and_agreeing_costs_nothing(loss, make):
    student, teacher = make().requires_grad_(), make().requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.abs().max() > 0 and teacher.grad is None
    assert loss(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)


# -- maps of different sizes -----------------------------------------------------------------------------------


def map_of_places(grid, width=1):
    """Each patch holds 10 * row + column."""
    places = [[10.0 * row + column for column in range(grid[1])] for row in range(grid[0])]
    return torch.tensor(places).flatten()[None, :, None].expand(1, -1, width)


@pytest.mark.parametrize(
    ("grid", "target", "places"),
    [
        ((2, 2), (2, 2), [0, 1, 10, 11]),
        # coarser: every second, every third
        ((4, 4), (2, 2), [0, 2, 20, 22]),
        ((5, 3), (3, 2), [0, 2, 20, 22, 40, 42]),
        ((5, 5), (2, 2), [0, 3, 30, 33]),
        ((1, 7), (1, 3), [0, 3, 6]),
        # finer: the nearest
        ((2, 1), (4, 2), [0, 0, 0, 0, 10, 10, 10, 10]),
        ((2, 2), (3, 3), [0, 0, 1, 0, 0, 1, 10, 10, 11]),
    ],
)
def test_align_map_picks_patches(grid, target, places):
    assert align_map(map_of_places(grid), grid, target, 1).flatten().tolist() == places


def test_align_map_takes_every_rth_patch_as_the_heads_do():
    grid = (7, 5)
    for ratio in (1, 2, 3):
        target = (math.ceil(grid[0] / ratio), math.ceil(grid[1] / ratio))
        patches = random_map(35)
        expected = patches.view(BATCH, 7, 5, 6)[:, ::ratio, ::ratio].reshape(BATCH, -1, 6)
        assert torch.equal(align_map(patches, grid, target, 6), expected)


def test_align_map_averages_neighbouring_channels():
    patches = random_map(4, width=6)
    pairs = torch.stack([patches[..., 0:2].mean(-1), patches[..., 2:4].mean(-1), patches[..., 4:6].mean(-1)], dim=-1)
    torch.testing.assert_close(align_map(patches, (2, 2), (2, 2), 3), pairs)
    # as many patches as channels are wanted
    four = random_map(4, width=8)
    torch.testing.assert_close(align_map(four, (2, 2), (2, 2), 4), four.unflatten(-1, (4, 2)).mean(-1))
    repeated = align_map(patches, (2, 2), (2, 2), 12)
    torch.testing.assert_close(repeated, patches.repeat_interleave(2, dim=-1))


def test_map_grid_is_the_grid_of_a_subsampled_map():
    for grid in ((4, 4), (14, 14), (5, 3), (7, 1), (8, 2)):
        for ratio in (1, 2, 3, 4, max(grid)):
            expected = (len(range(0, grid[0], ratio)), len(range(0, grid[1], ratio)))
            assert map_grid(expected[0] * expected[1], grid) == expected


def test_map_grid_of_an_impossible_map():
    with pytest.raises(ValueError, match="map of 7 tokens.*grid"):
        map_grid(7, (4, 4))
    with pytest.raises(ValueError, match="map of 0 tokens"):
        map_grid(0, (4, 4))


# -- LGViT's two sums ------------------------------------------------------------------------------------------

GRID = (6, 6)


def exit_maps(kinds):
    """Local maps keep all 36 patches, global maps every second of every second row."""
    sizes = {"local": 36, "global": 9, None: 36}
    return [random_map(sizes[kind], batch=2) if kind else torch.randn(2, 6) for kind in kinds]


def by_hand_sums(maps, kinds, teacher):
    coarse = teacher.view(2, 6, 6, -1)[:, ::2, ::2].reshape(2, 9, -1)
    heterogeneous = homogeneous = 0.0
    local = [features for features, kind in zip(maps, kinds, strict=True) if kind == "local"]
    far = [features for features, kind in zip(maps, kinds, strict=True) if kind == "global"]
    for group, target, pair in ((local, teacher, by_hand_local), (far, coarse, by_hand_global)):
        if group:
            students = [group[0]] if len(group) == 1 else [group[0], group[-1]]
            heterogeneous += sum(by_hand_heterogeneous(student, target) for student in students)
            homogeneous += sum(pair(student, group[-1]) for student in group[:-1])
    return heterogeneous, homogeneous


@pytest.mark.parametrize(
    "kinds",
    [
        ["local"],
        ["global"],
        [None],
        ["local", "local"],
        ["local", None, "global"],
        ["global", "global", "global"],
        [None, "local", "local", "global", None],
        ["local"] * 3 + ["global"] * 4,
    ],
    ids=lambda kinds: "-".join(str(kind) for kind in kinds),
)
def test_feature_losses_of_any_exits(kinds):
    maps, teacher = exit_maps(kinds), random_map(36, batch=2)
    ours = lgvit_feature_losses(maps, [GRID] * len(kinds), kinds, teacher, GRID)
    expected = by_hand_sums(maps, kinds, teacher)
    assert [value.item() for value in ours] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert all(value.shape == () and value.dtype == torch.float32 for value in ours)


def test_feature_losses_reach_students_and_not_teachers():
    kinds = ["local", "local", "local", "global", "global"]
    maps = [features.requires_grad_() for features in exit_maps(kinds)]
    teacher = random_map(36, batch=2).requires_grad_()
    heterogeneous, homogeneous = lgvit_feature_losses(maps, [GRID] * 5, kinds, teacher, GRID)
    grads = torch.autograd.grad(homogeneous, maps, allow_unused=True)
    assert [grad is not None for grad in grads] == [True, True, False, True, False]
    grads = torch.autograd.grad(heterogeneous, [*maps, teacher], allow_unused=True)
    assert [grad is not None for grad in grads] == [True, False, True, True, True, False]


def test_feature_losses_between_stages_of_different_width():
    """As on Swin: the deepest local exit and the teacher are coarser and wider than the first exit."""
    shallow, deep, teacher = random_map(36, 4), random_map(9, 8), random_map(9, 8)
    halved = deep.view(BATCH, 9, 4, 2).mean(-1)
    nearest = torch.tensor([3 * (row // 2) + column // 2 for row in range(6) for column in range(6)])
    heterogeneous, homogeneous = lgvit_feature_losses(
        [shallow, deep], [(6, 6), (3, 3)], ["local", "local"], teacher, (3, 3)
    )
    assert homogeneous.item() == pytest.approx(by_hand_local(shallow, halved[:, nearest]), rel=1e-4)
    narrow = teacher.view(BATCH, 9, 4, 2).mean(-1)[:, nearest]
    expected = by_hand_heterogeneous(shallow, narrow) + by_hand_heterogeneous(deep, teacher)
    assert heterogeneous.item() == pytest.approx(expected, rel=1e-4)


def test_feature_losses_want_a_kind_and_a_grid_for_each_exit():
    maps, teacher = exit_maps(["local", "local"]), random_map(36, batch=2)
    for grids, kinds in ([GRID], ["local", "local"]), ([GRID, GRID], ["local"]):
        with pytest.raises(ValueError, match="shorter|longer"):
            lgvit_feature_losses(maps, grids, kinds, teacher, GRID)


def test_gram_loss_is_exact_under_autocast():
    student = torch.randn(2, 9, 16)
    teacher = 1.1 * student
    expected = global_homogeneous_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(global_homogeneous_loss(student, teacher), expected)

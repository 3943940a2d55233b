"""Classifiers on vectors that do not change: distilled to the optimum of a convex loss, not by steps of AdamW."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..heads import ExitHead
from ..losses import distillation_loss

# penalties of the squared weights that are tried, from the strongest, and steps of L-BFGS for each
PENALTIES, STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4), 25
# added to the variances of standardised vectors: directions that hardly vary are not blown up
RIDGE = 5e-3
# of the samples, by which the penalty is chosen
JUDGED_SHARE = 1 / 8


def whitening(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and scale `[F]`, and matrix `[F, F]` by which `(vectors - mean) / scale` becomes uncorrelated, of one size.

    On whitened vectors L-BFGS converges in tens of steps, on standardised ones it is far from it after thousands.

    Example:

        >>> vectors = torch.randn(500, 3) @ torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
        >>> mean, scale, matrix = whitening(vectors)
        >>> (((vectors - mean) / scale @ matrix).T.cov() - torch.eye(3)).abs().max() < 0.1
        tensor(True)
    """
    mean, scale = vectors.mean(0), vectors.std(0) + 1e-6
    standard = (vectors - mean) / scale
    variances, directions = torch.linalg.eigh(standard.T @ standard / len(standard))
    return mean, scale, directions * (variances.clamp_min(0) + RIDGE).rsqrt()


def fit_linear(
    vectors: Tensor, teacher: Tensor, temperature: float, penalties: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight `[C, F]` and bias `[C]` that give the teacher's answers from vectors, as closely as new samples allow.

    The squared weights of the standardised vectors are penalised. Of the penalties, the one is taken with which the
    last eighth of the samples is predicted best.

    Args:
        vectors (`Tensor`): `[N, F]`, in random order.
        teacher (`Tensor`): `[N, C]`, logits.
        temperature (`float`): Softens both predictions.
        penalties (`Sequence[float]`, *optional*): Those that are tried, from the strongest; by default `PENALTIES`.
    """
    mean, scale, matrix = whitening(vectors)
    white, num_fitted = (vectors - mean) / scale @ matrix, len(vectors) - int(len(vectors) * JUDGED_SHARE)
    weight = white.new_zeros(white.shape[1], teacher.shape[1], requires_grad=True)
    bias = white.new_zeros(teacher.shape[1], requires_grad=True)

    def loss(samples: slice) -> Tensor:
        # a sum over the classes, so that a penalty means the same for any number of them
        return distillation_loss(white[samples] @ weight + bias, teacher[samples], temperature) * teacher.shape[1]

    def fit(penalty: float, samples: slice) -> None:
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

        def penalised() -> Tensor:
            optimizer.zero_grad()
            value = loss(samples) + penalty * (matrix @ weight).square().sum()
            value.backward()
            return value.detach()

        optimizer.step(penalised)

    judged: dict[float, float] = {}
    for penalty in penalties or PENALTIES:
        fit(penalty, slice(num_fitted))
        with torch.no_grad():
            judged[penalty] = loss(slice(num_fitted, None)).item()
        if judged[penalty] > min(judged.values()):
            break
    fit(min(judged, key=judged.__getitem__), slice(None))
    with torch.no_grad():
        found = ((matrix @ weight) / scale[:, None]).T
        return found, bias - found @ mean


def is_linear(head: ExitHead) -> bool:
    """Whether a head that reads a few vectors is linear in them: nothing but classifiers after layer norms is trained.

    Example:

        >>> from lgvit_hf.heads import HeadShape, build_head
        >>> shape = HeadShape(width=8, num_prefix=1, num_labels=3)
        >>> [is_linear(build_head(name, shape)) for name in ("concat", "average", "conv1_1")]
        [True, True, False]
    """
    trained = (module for module in head.modules() if any(True for _ in module.parameters(recurse=False)))
    return all(isinstance(module, nn.LayerNorm) or module in head.classifiers for module in trained)


def fit_head(head: ExitHead, reduced: Tensor, teacher: Tensor, temperature: float) -> None:
    """Fit the classifiers of a head that reads a few vectors, in place; its norm stays as it began.

    Norm and classifier together are one linear map of these vectors, so that nothing is lost.

    Args:
        head (`ExitHead`): In single precision.
        reduced (`Tensor`): `[N, V, D]`, as `ExitHead.reduce` gives them, in random order.
        teacher (`Tensor`): `[N, C]`, the full model's logits.
        temperature (`float`): See `fit_linear`.
    """
    device = next(head.parameters()).device
    head.eval()
    with torch.no_grad():
        # the logits are the mean of the classifiers'
        vectors = [vector / len(head.classifiers) for vector in head.read_reduced(reduced.to(device).float())[0]]
    weight, bias = fit_linear(torch.cat(vectors, 1), teacher.to(device).float(), temperature)
    classifiers = cast(Iterable[nn.Linear], head.classifiers)
    with torch.no_grad():
        for classifier, part in zip(classifiers, weight.split([len(v[0]) for v in vectors], 1), strict=True):
            classifier.weight.copy_(part)
            classifier.bias.copy_(bias)

"""Highways in Optimum: `optimum-cli export onnx`, `main_export` and `ORTModel` give the file of `export_onnx`.

Imported by `auto.py` as soon as Optimum's own configs are; needs the extra `optimum`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from optimum.exporters.onnx.model_configs import ViTOnnxConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils.input_generators import DEFAULT_DUMMY_SHAPES
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..hub.loading import HIGHWAYS, example_image
from ..modeling_highway import HighwayMixin
from ..pretrained import PretrainedHighway
from ..runtimes.manifest import MANIFEST
from .onnx_export import verified, write_onnx
from .segment_graphs import OPSET

TASK = "image-classification"
register = TasksManager.create_register("onnx")


class HighwayOnnxConfig(ViTOnnxConfig):
    """How Optimum exports a highway: what it traces itself is replaced by the layout `single` of `export_onnx`.

    A trace would hold one path for all images, that of the example. It is replaced where Optimum mends the axes of a
    trace, which it does in every way of exporting; `post_process_exported_models` is left out by `ORTModel`.

    Args:
        config (`PretrainedConfig`): Of the highway.
        task (`str`): `"image-classification"`.
        float_dtype (`str`, *optional*, defaults to `"fp32"`): The only one; `lgvit export` has others.

    Raises:
        ValueError: Another `float_dtype`; or, when it exports, what a highway's file cannot do: another opset, a fixed
            batch, other sizes than the model's, arguments of the model's call.
    """

    ATOL_FOR_VALIDATION = 1e-4
    DEFAULT_ONNX_OPSET = OPSET

    def __init__(self, config: PretrainedConfig, task: str, *, float_dtype: str = "fp32", **settings: Any):
        if float_dtype != "fp32":
            raise ValueError(
                f"dtype {float_dtype!r}: Optimum exports a highway in 'fp32'; for others, `lgvit export --quantize` "
                "also says what they cost in accuracy"
            )
        super().__init__(config, task, float_dtype=float_dtype, **settings)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """The axes that vary, as the file calls them: the batch alone."""
        return {"pixel_values": {0: "batch"}}

    @property
    def outputs(self) -> dict[str, dict[int, str]]:
        """As `inputs`."""
        return {name: {0: "batch"} for name in ("logits", "exit_layer", "exit_index", "exit_score")}

    @contextmanager
    def patch_model_for_export(
        self, model: HighwayMixin, model_kwargs: dict[str, Any] | None = None
    ) -> Iterator[None]:
        """Keep the model for `fix_dynamic_axes`, and give what is traced nothing to do.

        Raises:
            ValueError: There are `model_kwargs`.
        """
        if model_kwargs:
            raise ValueError(
                f"model_kwargs={model_kwargs}: a highway's file takes pixel_values and the policy's numbers alone; "
                "leave --model-kwargs out"
            )
        self._model = model
        with super().patch_model_for_export(model, model_kwargs):
            answer = model.forward

            @functools.wraps(answer)
            def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
                if torch.jit.is_tracing():
                    # were the trace ever taken for the model, its answers would tell
                    return dict.fromkeys(self.outputs, pixel_values.flatten(1).sum(1) * torch.nan)
                return answer(pixel_values, *args, **kwargs)

            vars(model)["forward"] = forward
            yield

    def fix_dynamic_axes(
        self, model_path: Path, *args: Any, input_shapes: dict[str, int] | None = None, **kwargs: Any
    ) -> None:
        """Write the highway in the place of what was traced, which only says what was asked for.

        Raises:
            ValueError: A highway's file cannot be that.
        """
        traced = onnx.load(model_path, load_external_data=False)
        # no model rather than a wrong one, if this fails
        model_path.unlink()
        _check_requested(traced, input_shapes or {}, self._model)
        write_onnx(self._model.cpu(), model_path.parent, file=model_path.name)

    def post_process_exported_models(
        self, path: Path, models_and_onnx_configs: dict[str, tuple], onnx_files_subpaths: list[str]
    ) -> tuple[dict[str, tuple], list[str]]:
        """Run the file against PyTorch, and write the manifest by which `ORTHighway` opens the folder.

        Raises:
            ValueError: It does not answer as the model does; it is removed.
        """
        try:
            verified(self._model, path, onnx_files_subpaths)
        except ValueError:
            for name in (*onnx_files_subpaths, MANIFEST):
                (path / name).unlink()
            raise
        if "optimum.commands.optimum_cli" in sys.modules:
            # Optimum opens the file next, and ONNX Runtime would advise against thresholds that are inputs; the level
            # holds for the whole process, which is here the command's own
            onnxruntime.set_default_logger_severity(3)
        return models_and_onnx_configs, onnx_files_subpaths


def _check_requested(traced: Any, shapes: dict[str, int], model: HighwayMixin) -> None:
    """Raise `ValueError` for an argument of Optimum's that a highway's file cannot follow."""
    opset = next(entry.version for entry in traced.opset_import if not entry.domain)
    if opset != OPSET:
        raise ValueError(f"opset={opset}: a highway is written in opset {OPSET}; leave --opset out")
    if not traced.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise ValueError(
            "no_dynamic_axes=True: samples exit inside a highway's file, which takes any batch; leave "
            "--no-dynamic-axes out"
        )
    sizes = dict(zip(("num_channels", "height", "width"), example_image(model).shape[1:], strict=True))
    for name, size in sizes.items():
        # what was not asked for is there too, by a default of Optimum's
        if shapes.get(name, size) not in (size, DEFAULT_DUMMY_SHAPES[name]):
            raise ValueError(f"{name}={shapes[name]}: the model takes {size}; leave --{name} out")


_infer_library = TasksManager._infer_library_from_model_or_model_class


def _infer_library_of_highways(model: PreTrainedModel | None = None, model_class: type | None = None) -> str:
    """Optimum goes by the name of the module, and a highway's does not begin with `transformers`."""
    kind = type(model) if model_class is None else model_class
    return "transformers" if issubclass(kind, PretrainedHighway) else _infer_library(model, model_class)


TasksManager._infer_library_from_model_or_model_class = staticmethod(_infer_library_of_highways)


for model_type in HIGHWAYS:
    register(model_type, TASK)(HighwayOnnxConfig)

"""Libraries that look a model up by its type learn of highways, without importing any before they are used."""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
AUTO_MODEL_MODULE = "transformers.models.auto.modeling_auto"
ONNX_CONFIG_MODULE = "optimum.exporters.onnx.model_configs"

# the names of what is registered, by the file that has it
CONFIGS: dict[str, tuple[str, ...]] = {
    "configuration_sequence": (
        "ViTHighwayConfig",
        "DeiTHighwayConfig",
        "Dinov2HighwayConfig",
        "Dinov2WithRegistersHighwayConfig",
        "Dinov3ViTHighwayConfig",
        "SiglipHighwayConfig",
        "CLIPHighwayConfig",
        "BeitHighwayConfig",
    ),
    "configuration_swin": ("SwinHighwayConfig",),
    "configuration_avit": ("AViTConfig",),
    "configuration_wrapper": ("HighwayWrapperConfig",),
}
MODELS: dict[str, tuple[str, ...]] = {
    "modeling_vit": ("ViTHighway",),
    "modeling_deit": ("DeiTHighway",),
    "modeling_dinov2": ("Dinov2Highway",),
    "modeling_dinov2_with_registers": ("Dinov2WithRegistersHighway",),
    "modeling_dinov3_vit": ("Dinov3ViTHighway",),
    "modeling_siglip": ("SiglipHighway",),
    "modeling_clip": ("CLIPHighway",),
    "modeling_beit": ("BeitHighway",),
    "modeling_swin": ("SwinHighway",),
    "modeling_avit": ("AViT",),
    "wrapper": ("HighwayWrapper",),
}


def register() -> None:
    """Do what `AFTER_IMPORT` says: now, where a module has been imported, and otherwise as soon as it has.

    Importing `transformers.models` takes a third of a second, Optimum's exporters take several; whoever only imports
    this package does not pay for them.
    """
    for name, action in AFTER_IMPORT.items():
        if name in sys.modules:
            action()
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


@cache
def register_configs() -> None:
    """Make `AutoConfig` know the configs of `CONFIGS`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    for config in _named(CONFIGS):
        AutoConfig.register(config.model_type, config, exist_ok=True)


@cache
def register_models() -> None:
    """Make `AutoModel` and `AutoModelForImageClassification` know the models of `MODELS`."""
    from transformers import AutoModel, AutoModelForImageClassification

    register_configs()
    for model in _named(MODELS):
        for auto in (AutoModel, AutoModelForImageClassification):
            auto.register(model.config_class, model, exist_ok=True)


def _named(names: dict[str, tuple[str, ...]]) -> Iterator[Any]:
    for module, classes in names.items():
        for name in classes:
            yield getattr(import_module(f"{__package__}.{module}"), name)


@cache
def register_onnx_configs() -> None:
    """Make Optimum export highways as `export_onnx` does."""
    try:
        # by its name: packages do not travel with a checkpoint, as the files beside this one do
        import_module(f"{__package__}.export.optimum_config")
    except (ImportError, AttributeError) as error:
        # Optimum is used for other models too, and must go on whatever becomes of ours
        warnings.warn(
            f'this version of Optimum does not export highways ({error}); pip install "lgvit-hf[optimum]", or use '
            "`lgvit export`",
            stacklevel=2,
        )


def _register_configs_alone() -> None:
    # transformers 5 needs the Auto models to define a config: wait for them where they are being imported
    if AUTO_MODEL_MODULE not in sys.modules:
        register_configs()


AFTER_IMPORT: dict[str, Callable[[], None]] = {
    AUTO_CONFIG_MODULE: _register_configs_alone,
    AUTO_MODEL_MODULE: register_configs,
    ONNX_CONFIG_MODULE: register_onnx_configs,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the modules of `AFTER_IMPORT` as Python does, and appends what is to be done after their own code."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with the action after it; nothing for other modules."""
        action = AFTER_IMPORT.get(name)
        spec = PathFinder.find_spec(name, path, target) if action else None
        if action is None or spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            action()

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]  # of this one loader
        return spec

"""Libraries that look a model up by its type learn of highways, without importing any before they are used."""

from __future__ import annotations

import importlib.abc
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
AUTO_MODEL_MODULE = "transformers.models.auto.modeling_auto"
ONNX_CONFIG_MODULE = "optimum.exporters.onnx.model_configs"

# those of transformers' whose configs ours derive from
BACKBONES = (
    "vit",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "siglip",
    "clip",
    "beit",
    "vit_msn",
    "ijepa",
    "swin",
)
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
        "ViTMSNHighwayConfig",
        "IJepaHighwayConfig",
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
    "modeling_vit_msn": ("ViTMSNHighway",),
    "modeling_ijepa": ("IJepaHighway",),
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


def register_configs(imported: str = "") -> None:
    """Make `AutoConfig` know the configs of `CONFIGS`, or wait while what they need is half imported.

    transformers 5 needs the Auto models to define a config, and imports them in the middle of it.

    Args:
        imported (`str`, *optional*): The module that has just been imported, of which Python says so a little later.
    """
    _waiting.clear()
    for name in NEEDED - {imported}:
        if name in sys.modules and getattr(sys.modules[name].__spec__, "_initializing", False):
            _waiting.add(name)
    if not _waiting:
        from transformers.models.auto.configuration_auto import AutoConfig

        for config in _named(CONFIGS):
            AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_where_waited_for(name: str) -> None:
    if name in _waiting:
        register_configs(name)


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


NEEDED = frozenset(
    [
        *(f"transformers.models.{kind}.configuration_{kind}" for kind in BACKBONES),
        *(f"{__package__}.{name}" for name in ("configuration", *CONFIGS)),
        *(AUTO_CONFIG_MODULE, AUTO_MODEL_MODULE),
    ]
)
# of these, those that were half imported when configs were to be registered
_waiting: set[str] = set()

AFTER_IMPORT: dict[str, Callable[[], None]] = {
    **{name: partial(_register_where_waited_for, name) for name in sorted(NEEDED)},
    AUTO_CONFIG_MODULE: partial(register_configs, AUTO_CONFIG_MODULE),
    AUTO_MODEL_MODULE: partial(register_configs, AUTO_MODEL_MODULE),
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

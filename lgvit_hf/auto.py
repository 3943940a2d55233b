"""The Auto classes learn the highway model types, without importing any model before one is asked for."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from functools import cache
from types import ModuleType

AUTO_CONFIG_MODULE = "transformers.models.auto.configuration_auto"
AUTO_MODEL_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Register the configs with `AutoConfig`: now, or as soon as `AutoConfig` exists.

    Importing `transformers.models` takes a third of a second; whoever only imports this package does not pay it.
    """
    if AUTO_CONFIG_MODULE in sys.modules:
        register_configs()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


@cache
def register_configs() -> None:
    """Make `AutoConfig` know `vit_highway`, `deit_highway` and `swin_highway`."""
    from transformers.models.auto.configuration_auto import AutoConfig

    from .configuration import DeiTHighwayConfig, SwinHighwayConfig, ViTHighwayConfig

    for config in (ViTHighwayConfig, DeiTHighwayConfig, SwinHighwayConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)


@cache
def register_models() -> None:
    """Make `AutoModel` and `AutoModelForImageClassification` know the three models."""
    from transformers import AutoModel, AutoModelForImageClassification

    from .modeling_deit import DeiTHighway
    from .modeling_swin import SwinHighway
    from .modeling_vit import ViTHighway

    register_configs()
    for model in (ViTHighway, DeiTHighway, SwinHighway):
        for auto in (AutoModel, AutoModelForImageClassification):
            auto.register(model.config_class, model, exist_ok=True)


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Lets transformers import its Auto classes, then registers the configs, once."""

    def find_spec(self, name: str, path=None, target: ModuleType | None = None):
        """The module's own spec, with the registration behind it; nothing for other modules."""
        if name not in (AUTO_CONFIG_MODULE, AUTO_MODEL_MODULE):
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            # transformers 5 needs the Auto models to define a config: wait for them where they are being imported
            if name == AUTO_MODEL_MODULE or AUTO_MODEL_MODULE not in sys.modules:
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                register_configs()

        spec.loader.exec_module = execute_and_register
        return spec

"""Configs whose every wrong setting is an error with its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig as _Config
    from typing_extensions import Self
else:
    _Config = object

MOST_LABELS = 1_000_000


class SafeConfig(_Config):
    """Reading a `config.json` that anybody may have written, mixed into one of transformers' configs."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As upstream's, without the attention code that a file asks for; what it cannot read is a `ValueError`."""
        with _strange_settings(cls):
            return super().from_dict(without_attention_code(config_dict), **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        """As upstream's, but a folder without `config.json` raises `OSError` instead of giving the defaults."""
        with _strange_settings(cls):
            config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if not config_dict:
            raise OSError(f"no config.json in {str(pretrained_model_name_or_path)!r}: not a saved model")
        return config_dict, kwargs


@contextmanager
def _strange_settings(config_class: type) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, OSError):
        raise
    # a field of another kind than it takes shows as any error, in transformers 5 one of its own
    except Exception as error:
        raise ValueError(f"{config_class.__name__}: a setting is not what it can be: {error}") from error


def check_num_labels(num_labels: Any) -> None:
    """Raise `ValueError` for no number of labels, or a huge one: each label gets a name, which takes memory."""
    if num_labels is not None and (type(num_labels) is not int or not 0 <= num_labels <= MOST_LABELS):
        raise ValueError(f"num_labels: {num_labels!r} must be an integer from 0 to {MOST_LABELS}")


def without_attention_code(config_dict: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json` without what would choose the attention code.

    At any depth: a config may hold others. Transformers before 5.3 fetches and runs code from a Hub repository that is
    named there (CVE-2026-4372). The caller of `from_pretrained` may still choose with `attn_implementation=`.
    """
    return {
        key: without_attention_code(value) if isinstance(value, dict) else value
        for key, value in config_dict.items()
        if not (isinstance(key, str) and "attn_implementation" in key)
    }

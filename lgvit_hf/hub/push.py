"""To the Hub: weights, config and code of a model, its image processor, its reports and its card, in one commit."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import PreTrainedModel

from .card import MARK, card, has_card, is_own, reports_beside, write_card
from .loading import read_config
from .lora import has_lora, merged
from .strict import PROCESSOR

logger = logging.getLogger(__name__)

CARD = "README.md"
# fields of a config on which the figures of reports depend
DECIDING = ("exit_policy", "exit_ensemble")


def publish_folder(
    model: PreTrainedModel,
    folder: Path,
    name: str,
    tags: Sequence[str],
    max_shard_size: int | str | None,
    adapters_only: bool = False,
) -> None:
    """Save a model as it is pushed: with what lies in the folder that it was loaded from.

    That is its image processor, the reports of `lgvit evaluate`, `calibrate` and `benchmark`, and its card with the
    pictures beside it. Where there is no card, one is made. Where the model has another exit policy by now, what was
    reported of the old one is left out.

    Args:
        model (`PreTrainedModel`): A highway or an `AViT`.
        folder (`Path`): A new one.
        name (`str`): The Hub id, which the card's snippet loads.
        tags (`Sequence[str]`): Of a card that is made.
        max_shard_size (`int` or `str`, *optional*): Of a file of weights, by default upstream's.
        adapters_only (`bool`, *optional*, defaults to `False`): Save LoRA adapters, exits and classifier alone.
    """
    if adapters_only:
        model.save_pretrained(folder, adapters_only=True)
        made = f"{type(model).__name__}.from_backbone({getattr(model, 'grown_from', '')!r}, lora={name!r})"
        text = f"---\n{{}}\n---\n{MARK}\nLoRA adapters and early exits:\n\n```python\n{made}\n```\n"
        (folder / CARD).write_text(text, encoding="utf-8")
        return
    if has_lora(model):
        model = merged(model)
    source = Path(model.name_or_path or "")
    files: list[Path] = []
    reports: list[Path] = []
    sizes: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, **sizes)
    if model.name_or_path and (source / "config.json").is_file():
        files = [source / PROCESSOR]
        before = read_config(str(source))
        if all(getattr(before, each, None) == getattr(model.config, each, None) for each in DECIDING):
            reports = reports_beside(source)
            files += [*reports, *source.glob("*.png"), source / CARD, *source.glob(".eval_results/*.yaml")]
        else:
            logger.warning(
                "the ensemble or the exit policy has changed since %s was saved: reports and card of it stay there",
                source,
            )
            files += [source / CARD] if is_own(source / CARD) else []
    for file in files:
        if file.is_file():
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    if has_card(model.config) and not (folder / CARD).is_file():
        write_card(card(model, reports, name=name, tags=tags), folder / CARD)


def push(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = None,
    tags: str | Sequence[str] | None = None,
    safe_serialization: bool = True,
    use_temp_dir: bool | None = None,
    adapters_only: bool = False,
) -> CommitInfo:
    """Push what `publish_folder` saves; a README that somebody wrote in the repository stays, but for `tags`.

    Args:
        model (`PreTrainedModel`): A highway or an `AViT`.
        repo_id (`str`): `owner/name`, made where it is not there.
        revision (`str`, *optional*): A branch, made where it is not there.
        commit_message, commit_description, private, token, create_pr, max_shard_size, tags: See `PreTrainedModel`.
        safe_serialization, use_temp_dir: See transformers 4; `True` is all there is.
        adapters_only (`bool`, *optional*, defaults to `False`): Push LoRA adapters, exits and classifier alone.

    Raises:
        ValueError: Pickles, or a folder that is no temporary one, are asked for.
    """
    if not safe_serialization:
        raise ValueError("safe_serialization: False would push pickles, which can run code; leave it out")
    if use_temp_dir is False:
        raise ValueError("use_temp_dir: False is not possible: save_pretrained(folder) leaves a copy on the disk")
    tags = [tags] if isinstance(tags, str) else list(tags or ())
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        readme = Path(folder) / CARD
        publish_folder(model, Path(folder), repo_id, tags, max_shard_size, adapters_only)
        if (theirs := _own_card(repo_id, revision, token)) is not None:
            readme.unlink(missing_ok=True)
            if tags:
                shutil.copyfile(theirs, readme)
        if tags:
            _add_tags(readme, tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or f"Upload {type(model).__name__}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _own_card(repo_id: str, revision: str | None, token: Any) -> str | None:
    """The README that somebody wrote in a repository, if there is one."""
    try:
        file = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    return file if is_own(file) else None


def _add_tags(readme: Path, tags: Sequence[str]) -> None:
    """Add tags to a README, which is made where there is none."""
    made = ModelCard.load(readme) if readme.is_file() else ModelCard("---\n{}\n---\n")
    held = made.data.get("tags") or []
    if missing := [tag for tag in tags if tag not in held]:
        made.data["tags"] = [*held, *missing]
        made.save(readme)

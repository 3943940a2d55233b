"""A-ViT beside models with exits: its answers as a table of one exit, and its times, which depend on the images."""

import statistics
import time

import torch
from transformers import AutoConfig

from lgvit_hf import AViT, ExitTable
from lgvit_hf.data.batches import in_batches
from lgvit_hf.evaluation.cost_table import CostTable
from lgvit_hf.evaluation.costs import Costs
from lgvit_hf.token_halting import token_macs


def halting_model(folder):
    """The A-ViT that is saved there, or nothing where another model is."""
    if AutoConfig.from_pretrained(folder).model_type != "avit":
        return None
    return AViT.from_pretrained(folder).float().eval()


@torch.no_grad()
def answers_of(model, samples):
    """Its answers; MACs are those of the tokens that did not halt, the mean over the samples."""
    found = [(model(batch["pixel_values"]), batch["labels"]) for batch in in_batches(samples, 64)]
    macs = token_macs(model.config, torch.cat([out.token_depth for out, _ in found])).mean().item()
    logits, labels = torch.cat([out.logits for out, _ in found]), torch.cat([labels for _, labels in found])
    return ExitTable(logits.float()[None], labels, [model.config.num_hidden_layers], Costs([macs], [0.0]))


@torch.no_grad()
def time_batches(found, model, batches):
    """Add the mean seconds of these batches."""
    start = time.perf_counter()
    for pixels in batches:
        model(pixels)
    found.append((time.perf_counter() - start) / len(batches))


def costs_of(found):
    """The cost table of times by batch size."""
    medians = [statistics.median(times) for times in found.values()]
    none = [[0.0] * len(medians)]
    return CostTable(list(found), [medians], none, none, torch.get_num_threads(), "cpu", "A-ViT")

"""What two processes do with one tiny highway, over gloo: sharded (FSDP2), and a copy each (DDP)."""

import copy
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.tiny import MODELS, NUM_LABELS, tiny_images, tiny_model

# without batch norm, whose statistics are of each process's own samples
HEADS = {"exit_positions": [2, 3, 5], "exit_types": ["attention_r2", "mlp", "vit"]}
IMAGES = tiny_images(16, seed=1)
WHOLE = StateDictOptions(full_state_dict=True)


def highway(kind):
    # every process would drop other paths
    return tiny_model(kind, **HEADS, **({"drop_path_rate": 0.0} if kind == "swin" else {}))


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def step(model, optimizer, rows):
    """One step on some of 8 samples."""
    images, labels = tiny_images(8)[rows], torch.arange(8)[rows] % NUM_LABELS
    model.train()(images, labels, early_exit=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def steps_of_one_process(kind):
    """The weights behind each of two steps on all samples, and the answers between them."""
    model = highway(kind)
    optimizer, weights = optimizer_of(model), []
    for _ in range(2):
        step(model, optimizer, slice(None))
        weights.append(copy.deepcopy(model.state_dict()))
        if len(weights) == 1:
            with torch.no_grad():
                exit_logits = model.eval()(IMAGES, early_exit=False).exit_logits[:-1]
                # some leave at every exit, the same in both processes: what one runs, all must run
                model.set_exit_policy("confidence", threshold=[between(logits) for logits in exit_logits])
                out = model(IMAGES)
    return weights, out, model.config.exit_policy


def between(logits):
    """A threshold that some samples pass and others do not, as far from all of them as can be."""
    scores = logits.softmax(-1).amax(-1).sort().values[3:-3]
    widest = scores.diff().argmax()
    return scores[widest : widest + 2].mean().item()


def assert_answers(out, expected):
    assert out.exit_index.tolist() == expected.exit_index.tolist() and len(expected.exit_index.unique()) > 1
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-4)


def sharded(kind, folder, mesh):
    """Every block and head is a unit of its own, which is whole only while it runs."""
    rows = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    weights, expected, policy = steps_of_one_process(kind)

    def make():
        model = highway(kind)
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    model = make()
    optimizer = optimizer_of(model)
    step(model, optimizer, rows)
    assert all(isinstance(weight, DTensor) for weight in model.exits.parameters())
    assert_close(get_model_state_dict(model, options=WHOLE), weights[0])
    model.set_exit_policy(policy)
    with torch.no_grad():
        assert_answers(model.eval()(IMAGES), expected)
    parts, states = get_state_dict(model, optimizer)
    dcp.save({"model": parts, "optimizer": states}, checkpoint_id=folder / f"sharded-{kind}")
    step(model, optimizer, rows)
    assert_close(get_model_state_dict(model, options=WHOLE), weights[1])

    again = make()
    with torch.no_grad():
        for weight in again.parameters():
            weight.zero_()  # everything comes from the checkpoint
    optimizer = optimizer_of(again)
    parts, states = get_state_dict(again, optimizer)
    stored = {"model": parts, "optimizer": states}
    dcp.load(stored, checkpoint_id=folder / f"sharded-{kind}")
    set_state_dict(again, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
    step(again, optimizer, rows)
    assert_close(get_model_state_dict(again, options=WHOLE), weights[1])


def replicated(kind, folder):
    """A copy in each process, whose gradients are averaged."""
    rows = slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)
    weights, expected, policy = steps_of_one_process(kind)
    model = DistributedDataParallel(highway(kind))
    optimizer = optimizer_of(model)
    step(model, optimizer, rows)
    assert_close(model.module.state_dict(), weights[0])
    model.module.set_exit_policy(policy)
    with torch.no_grad():
        assert_answers(model.eval()(IMAGES), expected)
    saved = folder / f"replicated-{kind}"
    if dist.get_rank() == 0:
        model.module.save_pretrained(saved)
        torch.save(optimizer.state_dict(), saved / "optimizer.pt")
    dist.barrier()
    again = DistributedDataParallel(MODELS[kind].from_pretrained(saved))
    optimizer = optimizer_of(again)
    optimizer.load_state_dict(torch.load(saved / "optimizer.pt", weights_only=True))
    step(again, optimizer, rows)
    assert_close(again.module.state_dict(), weights[1])


def run(folder, kinds):
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for kind in kinds:
        sharded(kind, Path(folder), mesh)
        replicated(kind, Path(folder))

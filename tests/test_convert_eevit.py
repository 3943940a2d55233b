"""EEVIT's checkpoints against its formulas, written out here; and against LGViT's, whose weights it runs on."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from lgvit_hf.cli import main
from lgvit_hf.hub.convert import convert_eevit, convert_lgvit, eevit_config
from tests.seeds import generator

WIDTH, HEADS, INNER, PATCH, IMAGE, LABELS = 16, 2, 24, 4, 16, 5
# EEVIT counts blocks from 0
EXITS = [[0, "dummy_mlp"], [1, "conv1_1", {}], [2, "conv2_1"], [3, "attention", {"sr_ratio": 2}]]
BLOCKS = 5


def settings(**changes):
    exits = {
        "enabled": True,
        "exit_strategy": "confidence",
        "confidence_threshold": 0.7,
        "embed_depth": WIDTH,
        "num_classes": LABELS,
        "num_attn_heads": 8,
        "general_dropout": 0.0,
        "exits": EXITS,
        **changes.pop("exits", {}),
    }
    model = {
        "channels_num": 3,
        "image_size": IMAGE,
        "num_classes": LABELS,
        "pool": "cls",
        "embed_depth": WIDTH,
        "patch_size": PATCH,
        "num_attn_heads": HEADS,
        "general_dropout": 0.0,
        "transformer_dropout": 0.0,
        "mlp_dim": INNER,
        "dim_head": WIDTH // HEADS,
        "num_layers_transformer": BLOCKS,
        "enable_export": False,
        "early_exit_config": exits,
        **changes,
    }
    return {"dataset": {"channels_num": 3, "image_size": IMAGE, "num_classes": LABELS}, "model": model}


def weights():
    """A state dict with EEVIT's names. Tokens are small, so that the eps of the norms matters."""
    numbers = generator()

    def random(*shape, scale=1.0):
        return torch.randn(*shape, generator=numbers) * scale

    state = {}

    def linear(name, rows, columns, *kernel, bias=True, scale=1.0):
        fan = columns * math.prod(kernel)
        state[f"{name}.weight"] = random(rows, columns, *kernel, scale=scale * fan**-0.5)
        if bias:
            state[f"{name}.bias"] = random(rows, scale=0.2 * scale)

    def norm(name, running=False):
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + random(WIDTH, scale=0.2), random(WIDTH, scale=0.2)
        if running:
            state[f"{name}.running_mean"] = random(WIDTH, scale=0.3)
            state[f"{name}.running_var"] = 0.01 + random(WIDTH) ** 2
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    linear("patch_embedding.projection", WIDTH, 3, PATCH, PATCH, scale=5e-3)
    state["patch_embedding.cls_token"] = random(1, 1, WIDTH, scale=5e-3)
    state["patch_embedding.pos_embedding"] = random(1, (IMAGE // PATCH) ** 2 + 1, WIDTH, scale=5e-3)
    for block in range(BLOCKS):
        name = f"transformer.layers.{block}"
        norm(f"{name}.norm_1")
        linear(f"{name}.W_QKV", 3 * WIDTH, WIDTH)
        linear(f"{name}.attention_output.0", WIDTH, WIDTH)
        norm(f"{name}.mlps.norm_2")
        linear(f"{name}.mlps.mlp_intermediate.0", INNER, WIDTH)
        linear(f"{name}.mlps.mlp_output.0", WIDTH, INNER)
    for block, kind, *_ in EXITS:
        head = f"transformer.layers.{block}.highway.highway_head"
        if kind == "dummy_mlp":
            linear(f"{head}.layer1", 10, WIDTH)
            linear(f"{head}.layer2", WIDTH, 10)
        elif kind == "attention":
            linear(f"{head}.qkv", 3 * WIDTH, WIDTH, bias=False)
            linear(f"{head}.proj", WIDTH, WIDTH)
        else:
            linear(f"{head}.conv1.0", WIDTH, WIDTH, 1, 1)
            norm(f"{head}.conv1.2", running=True)
            if kind == "conv1_1":
                linear(f"{head}.proj", WIDTH, 1, 3, 3)
                norm(f"{head}.proj_bn", running=True)
            linear(f"{head}.conv2.0", WIDTH, WIDTH, 1, 1)
            norm(f"{head}.conv2.1", running=True)
        linear(f"transformer.layers.{block}.highway.classifier.classifier", LABELS, WIDTH)
    norm("transformer.norm_post_layers")
    linear("last_exit", LABELS, WIDTH)
    return state


def eevit(state, images):
    """Logits of every exit and of the last classifier, by EEVIT's formulas."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def batch_norm(x, name):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-5)

    def convolve(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def attend(x, fused, heads):
        split = linear(x, fused).reshape(*x.shape[:2], 3, heads, WIDTH // heads).permute(2, 0, 3, 1, 4)
        scores = split[0] @ split[1].transpose(-1, -2) * (WIDTH // heads) ** -0.5
        return (scores.softmax(-1) @ split[2]).transpose(1, 2).flatten(2)

    def head(x, kind, name, ratio=1):
        side = math.isqrt(x.shape[1])
        if kind == "dummy_mlp":
            return linear(linear(x, f"{name}.layer1").relu(), f"{name}.layer2")
        image = x.transpose(1, 2).unflatten(2, (side, side))
        if kind == "attention":
            kept = F.avg_pool2d(image, 1, ratio).flatten(2).transpose(1, 2)
            return linear(attend(kept, f"{name}.qkv", 8), f"{name}.proj")
        made = batch_norm(F.gelu(convolve(image, f"{name}.conv1.0")), f"{name}.conv1.2")
        if kind == "conv1_1":
            made = batch_norm(F.gelu(convolve(made, f"{name}.proj", padding=1, groups=WIDTH)), f"{name}.proj_bn")
        made = batch_norm(convolve(made, f"{name}.conv2.0"), f"{name}.conv2.1")
        return made.flatten(2).transpose(1, 2) + x

    kinds = {block: (kind, (given or [{}])[0].get("sr_ratio", 1)) for block, kind, *given in EXITS}
    x = convolve(images, "patch_embedding.projection", stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["patch_embedding.cls_token"].expand(len(x), 1, WIDTH), x], dim=1)
    x = x + state["patch_embedding.pos_embedding"]
    answers = []
    for block in range(BLOCKS):
        name = f"transformer.layers.{block}"
        mixed = attend(norm(x, f"{name}.norm_1"), f"{name}.W_QKV", HEADS)
        x = linear(mixed, f"{name}.attention_output.0") + x
        inner = F.gelu(linear(norm(x, f"{name}.mlps.norm_2"), f"{name}.mlps.mlp_intermediate.0"))
        x = linear(inner, f"{name}.mlps.mlp_output.0") + x
        if block in kinds:
            kind, ratio = kinds[block]
            made = head(x[:, 1:], kind, f"{name}.highway.highway_head", ratio).mean(1)
            answers.append(linear(made + x[:, 0], f"{name}.highway.classifier.classifier"))
    return [*answers, linear(norm(x, "transformer.norm_post_layers")[:, 0], "last_exit")]


@pytest.fixture
def source(tmp_path):
    def write(state=None, suffix=".pth", **changes):
        folder = tmp_path / "eevit"
        folder.mkdir(exist_ok=True)
        (folder / "run_args.yaml").write_text(yaml.safe_dump(settings(**changes)))
        torch.save(weights() if state is None else state, folder / f"eevit{suffix}")
        return folder

    return write


@torch.no_grad()
def test_same_logits_at_every_exit(source, tmp_path, capsys):
    folder = source()
    assert main(["convert", "--from", "eevit", str(folder), str(tmp_path / "ours")]) == 0
    assert "exits after 1 mlp, 2 conv1_1, 3 conv2_1, 4 attention_r2" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "ours").eval()
    images = torch.randn(4, 3, IMAGE, IMAGE)
    ours, theirs = model(images, early_exit=False).exit_logits, eevit(weights(), images)
    assert len(ours) == len(theirs) == len(EXITS) + 1
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()
    assert model.config.exit_policy == {"name": "confidence", "threshold": 0.7}


def eevit_name(name):
    """EEVIT's own table from LGViT's names (its utils/model_utils.py), but for query, key and value."""
    parts = {
        "deit.embeddings.position_embeddings": "patch_embedding.pos_embedding",
        "deit.embeddings.cls_token": "patch_embedding.cls_token",
        "deit.embeddings.patch_embeddings.projection": "patch_embedding.projection",
        "deit.layernorm": "transformer.norm_post_layers",
        "deit.encoder.layer": "transformer.layers",
        "layernorm_before": "norm_1",
        "layernorm_after": "mlps.norm_2",
        "attention.output.dense": "attention_output.0",
        "intermediate.dense": "mlps.mlp_intermediate.0",
        "output.dense": "mlps.mlp_output.0",
    }
    for theirs, ours in parts.items():
        name = name.replace(theirs, ours)
    return f"last_exit.{name.removeprefix('classifier.')}" if name.startswith("classifier.") else name


def test_the_weights_of_lgvit(shared, tmp_path):
    """LGViT's reference checkpoint as EEVIT loads it, converted, has the tensors of the one that was not."""
    case = next(c for c in json.loads((shared / "reference" / "vit.json").read_text()) if "LGViT_8" in c["file"])
    tensors = load_file(shared / "reference" / case["file"])
    state = {n.removeprefix("param."): t for n, t in tensors.items() if n.startswith("param.")}
    (tmp_path / "lgvit").mkdir()
    save_file(state, tmp_path / "lgvit" / "model.safetensors")
    (tmp_path / "lgvit" / "config.json").write_text(json.dumps(case["config"]))
    convert_lgvit(tmp_path / "lgvit", tmp_path / "straight")

    fused, positions = {}, case["positions"]
    for name, tensor in state.items():
        if "pooler" in name:
            continue
        if ".attention.attention." in name and ".encoder.layer." in name:
            if ".query." in name:
                whole = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
                fused[eevit_name(name).replace("attention.attention.query", "W_QKV")] = whole
        elif name.startswith("deit.encoder.highway."):
            _, _, _, exit, rest = name.split(".", 4)
            inside = rest.replace("mlp.", "highway_head.") if rest.startswith("mlp.") else f"classifier.{rest}"
            fused[f"transformer.layers.{positions[int(exit)] - 1}.highway.{inside}"] = tensor
        else:
            fused[eevit_name(name)] = tensor
    sizes = case["config"]
    kinds = ["conv1_1", "conv1_1", "conv2_1", "conv2_1", *["attention"] * 4]
    exits = [
        [p - 1, kind, {"sr_ratio": 2 + (i > 5)}] for i, (p, kind) in enumerate(zip(positions, kinds, strict=True))
    ]
    for exit in exits[:4]:
        exit.pop()
    model = {
        "image_size": sizes["image_size"],
        "patch_size": sizes["patch_size"],
        "embed_depth": sizes["hidden_size"],
        "num_attn_heads": sizes["num_attention_heads"],
        "dim_head": sizes["hidden_size"] // sizes["num_attention_heads"],
        "mlp_dim": sizes["intermediate_size"],
        "num_layers_transformer": sizes["num_hidden_layers"],
        "early_exit_config": {"exits": exits, "num_attn_heads": 8, "confidence_threshold": 0.8},
    }
    (tmp_path / "eevit").mkdir()
    save_file(fused, tmp_path / "eevit" / "eevit.safetensors")
    (tmp_path / "eevit" / "run_args.yml").write_text(yaml.safe_dump({"model": model}))
    convert_eevit(tmp_path / "eevit", tmp_path / "through")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "through"))
    assert len(one) > 100 and one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.version_independent
def test_every_tensor_has_a_place(source, tmp_path):
    state = weights()
    for name, tensor, message in (
        (
            "transformer.layers.9.norm_1.weight",
            torch.zeros(WIDTH),
            r"1 tensors have no place in the model \(tr.*layers.9",
        ),
        ("last_exit.bias", None, r"1 tensors are missing \(classifier.bias\)"),
        (
            "transformer.layers.3.highway.highway_head.qkv.bias",
            torch.zeros(48),
            "have no place.*highway_head.qkv.bias",
        ),
        ("transformer.layers.0.norm_1.bias", torch.zeros(3), r"another shape \(transformer.*\[3\], not \[16\]"),
        ("transformer.layers.0.norm_2.weight", torch.zeros(WIDTH), "from before its second norm moved"),
        ("last_exit.weight", None, "not a checkpoint of EEVIT"),
    ):
        changed = {key: value for key, value in {**state, name: tensor}.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            convert_eevit(source(changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.version_independent
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "mean"}, "model.pool: 'mean' with exits"),
        ({"dim_head": 16}, "model.dim_head: 16 times 2 heads"),
        ({"exits": {"num_attn_heads": 4}}, "early_exits.num_attn_heads: 4 must be 8"),
        ({"exits": {"exits": [[1, "attention", {"qk_scale": 0.1}]]}}, "qk_scale of the exit at 1"),
        ({"exits": {"exits": [[BLOCKS - 1, "conv1_1"]]}}, "exit_positions.*5 is outside"),
        ({"exits": {"exits": [[1, "lstm"]]}}, "unknown head 'lstm'"),
        ({"colour": "red"}, "model.colour: no key of EEVIT's"),
        ({"exits": {"exit_strategy": "entropy"}}, "early_exits.exit_strategy: 'entropy' must be 'confidence'"),
    ],
)
def test_settings_that_ours_does_not_have(changes, message):
    with pytest.raises(ValueError, match=message):
        eevit_config(settings(**changes), LABELS)


@pytest.mark.version_independent
def test_the_settings_must_be_there(source, tmp_path, capsys):
    folder = source()
    (folder / "other.yml").write_text("a: 1")
    assert main(["convert", "--from", "eevit", str(folder), str(tmp_path / "out")]) == 2
    assert "2 .yaml files beside the weights; EEVIT's one is needed" in capsys.readouterr().err
    (folder / "other.yml").unlink()
    (folder / "run_args.yaml").write_text("model: {early_exits: {exits: 3}}")
    assert main(["convert", "--from", "eevit", str(folder), str(tmp_path / "out")]) == 2
    assert "run_args.yaml: no model can be built of these settings" in capsys.readouterr().err
    (folder / "run_args.yaml").write_text("a: 1")
    assert main(["convert", "--from", "eevit", str(folder), str(tmp_path / "out")]) == 2
    assert "no EEVIT configuration" in capsys.readouterr().err

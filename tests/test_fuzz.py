"""Folders that somebody else wrote: a promised error, soon, and nothing run or opened elsewhere."""

import json
import os
import pickle
import re
import struct
import sys
from contextlib import contextmanager

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification

from lgvit_hf import AViT, AViTConfig
from tests.seeds import THOROUGH, examples, rng
from tests.tiny import CONFIGS, MODELS, tiny_config, tiny_model

KINDS = ("vit", "deit", "swin", "avit")
ALL_MODELS, ALL_CONFIGS = {**MODELS, "avit": AViT}, {**CONFIGS, "avit": AViTConfig}
PROMISED = (ValueError, TypeError, OSError, SafetensorError)
every_kind = pytest.mark.parametrize("kind", KINDS)


def small_config(kind):
    if kind == "avit":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "image_size": 16}
        return AViTConfig(**sizes, patch_size=4, num_hidden_layers=2, num_labels=5)
    depth = {"depths": [1, 1], "num_heads": [2, 2]} if kind == "swin" else {"num_hidden_layers": 2}
    return tiny_config(kind, exit_positions=[1], exit_types="linear", **depth)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """Upstream prints all of a config that it cannot read, and a bar for each file."""
    transformers.logging.set_verbosity(transformers.logging.CRITICAL + 1)
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_progress_bar()


# -- what Python does meanwhile ------------------------------------------------------------------------------------

WATCHED = {"folder": None, "seen": []}
RUNS = (
    "exec",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.Popen",
    "ctypes.dlopen",
    "pickle.find_class",
)


def hook(event, arguments):
    if WATCHED["folder"] is None:
        return
    if event in RUNS or event.startswith("socket."):
        WATCHED["seen"].append((event, str(arguments)[:200]))
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        file = os.path.realpath(os.fsdecode(arguments[0]))
        # Python's own files, a line of source in a traceback, and how upstream knows a disk of the network
        own = file.startswith((WATCHED["folder"], sys.prefix, sys.base_prefix)) or file.endswith((".py", "/mounts"))
        if not own:
            WATCHED["seen"].append((event, file))


@pytest.fixture(scope="module", autouse=True)
def listening():
    sys.addaudithook(hook)  # it cannot be taken away again, only told not to look


@contextmanager
def nothing_but(folder):
    """Fails where code is run, a socket made, or a file outside `folder` opened."""
    WATCHED["folder"], WATCHED["seen"] = os.path.realpath(folder), []
    try:
        yield
    finally:
        WATCHED["folder"] = None
    assert not WATCHED["seen"], WATCHED["seen"]


# of functions, ours, upstream's and Python's: the model that takes the most needs 150,000, in transformers 5
MOST_CALLS = 1_000_000


@contextmanager
def few_calls():
    """Fails where more functions are called than a small file may ask for, however fast the machine is."""
    calls, before = 0, sys.getprofile()

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert calls < MOST_CALLS, f"{calls} calls"


def attempt(load, folder):
    """Whether it loads. Raises what is not promised, and fails where that is much work."""
    try:
        with nothing_but(folder), few_calls():
            load(folder)
        return True
    except PROMISED as error:
        assert str(error).strip()
        return False


def test_much_work_is_seen(folder):
    with pytest.raises(AssertionError, match="calls"):
        attempt(lambda folder: [len(folder) for _ in range(MOST_CALLS)], str(folder))


def test_the_watch_sees(tmp_path):
    for act in (
        lambda: exec("1"),
        lambda: os.system("true"),
        lambda: open("/etc/hostname", "rb").close(),
        lambda: pickle.loads(pickle.dumps(json.JSONDecoder)),
        lambda: __import__("socket").socket().close(),
    ):
        with pytest.raises(AssertionError, match="exec|system|open|pickle|socket"), nothing_but(tmp_path):
            act()
    with nothing_but(tmp_path):
        (tmp_path / "a").write_text("a")


# -- config.json ---------------------------------------------------------------------------------------------------

CODES = ("__import__('os').system('touch canary')", "eval('1')", "{{config}}", "somebody/code", "somebody/code--a.B")
STRINGS = (
    "lgvit",
    "linear",
    "cls",
    "never",
    "vit_highway",
    "deit",
    "performer",
    "sdpa",
    "float16",
    "../../etc/passwd",
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.sampled_from([2**31, 2**63, 10**30, -(10**30)])
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    | st.sampled_from(CODES + STRINGS)
)
keys = st.sampled_from(["name", "threshold", "temperature", "0", "AutoConfig", "vit"]) | st.text(
    st.characters(exclude_categories=["Cs"]), max_size=6
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
GOOD = {kind: small_config(kind).to_dict() for kind in KINDS}
MORE_FIELDS = (
    *("num_labels", "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "auto_map"),
    *("quantization_config", "torch_dtype", "gate", "exits", "exit_x", "num_blocks", "pools", "text_config"),
    *("pruned_heads", "use_return_dict", "return_dict", "name_or_path", "_commit_hash", "__class__", "__init__"),
    *("validate_exits", "to_dict", "from_dict", "position_exits", "custom_pipelines", "base_model_tp_plan"),
)
fields = st.sampled_from(sorted({name for good in GOOD.values() for name in good} | set(MORE_FIELDS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where every case is written; loading from it has been tried, so that nothing is imported any more."""
    folder = tmp_path_factory.mktemp("fuzz")
    for kind in KINDS:
        (folder / "config.json").write_text(json.dumps(GOOD[kind]))
        for config_class in (AutoConfig, ALL_CONFIGS[kind]):
            config_class.from_pretrained(folder)
    return folder


@pytest.mark.timeout(3600 if THOROUGH else 300)
def test_any_config(folder):
    @settings(max_examples=examples(200))
    @given(st.sampled_from(KINDS), st.dictionaries(fields, values, min_size=1, max_size=3), st.booleans())
    def check(kind, changes, auto):
        (folder / "config.json").write_text(json.dumps({**GOOD[kind], **changes}))
        config_class = AutoConfig if auto else ALL_CONFIGS[kind]
        attempt(config_class.from_pretrained, folder)

    check()


@every_kind
def test_a_config_of_each_sort(kind, folder):
    """The two ends between which the random ones lie: all of it good, and a field of ours that is not."""
    for changes in ({}, {"id2label": {"0": "a", "1": "b"}}, {"image_size": 32}, {"colour": "red"}):
        (folder / "config.json").write_text(json.dumps({**GOOD[kind], **changes}))
        assert attempt(ALL_CONFIGS[kind].from_pretrained, folder), changes
    for name in {"exit_policy", "exit_types", "exit_positions", "gate"} & GOOD[kind].keys():
        (folder / "config.json").write_text(json.dumps({**GOOD[kind], name: {"a": "b"}}))
        assert not attempt(ALL_CONFIGS[kind].from_pretrained, folder), name


@every_kind
def test_any_text_for_a_config(kind, folder):
    """Whole files damaged: none is read as something else."""
    text = json.dumps(GOOD[kind]).encode()
    broken = [text[:end] for end in rng().integers(1, len(text), 20)]
    broken += [b"", b"[]", b"null", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, bytes(100)]
    for content in broken:
        (folder / "config.json").write_bytes(content)
        assert not attempt(ALL_CONFIGS[kind].from_pretrained, folder), content[:80]


@every_kind
def test_a_folder_without_a_config_has_no_defaults(kind, tmp_path):
    for load in (ALL_CONFIGS[kind].from_pretrained, ALL_MODELS[kind].from_pretrained):
        with pytest.raises(OSError, match="no config.json|does not appear to have a file named config.json"):
            load(tmp_path)


@every_kind
def test_a_huge_number_of_labels_is_refused_at_once(kind, folder):
    settings = {name: value for name, value in GOOD[kind].items() if name not in ("id2label", "label2id")}
    for wrong in (10**9, -1, 2.5, "5", True, [5]):
        (folder / "config.json").write_text(json.dumps({**settings, "num_labels": wrong}))
        with pytest.raises(ValueError, match="num_labels: .* must be an integer from 0 to 1000000"):
            ALL_CONFIGS[kind].from_pretrained(folder)


# -- model.safetensors ---------------------------------------------------------------------------------------------


def packed(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def unpacked(content):
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def attacks(content):
    """The classes of safetensors' own list of abuse, and of what ours adds to it."""
    header, data = unpacked(content)
    name, entry = next((name, entry) for name, entry in header.items() if name != "__metadata__")
    start, end = entry["data_offsets"]
    changed = lambda **changes: packed({**header, name: {**entry, **changes}}, data)  # noqa: E731
    yield struct.pack("<Q", len(content) * 2) + content[8:]  # a header larger than the file
    yield struct.pack("<Q", 2**63 - 1) + content[8:]  # or than any memory
    yield packed(b'{"a":' * 50_000, data)
    yield packed(b"\xff" + json.dumps(header).encode(), data)
    yield changed(data_offsets=[start, end + 4])  # overlaps the next
    yield changed(data_offsets=[start + 4, end])  # leaves a hole
    yield changed(data_offsets=[0, 2**62])
    yield changed(data_offsets=[end, start])
    yield changed(shape=[2**40, 2**40])
    yield changed(shape=[-1])
    yield changed(dtype="PICKLE")
    yield packed({**header, "__metadata__": {"format": {"not": "text"}}}, data)
    yield packed({f"../{key}": value for key, value in header.items()}, data)
    yield content + b"\0" * 8  # data that no tensor has
    yield pickle.dumps(content)
    yield b""


def layout(content):
    """What a file of weights says of its tensors: which, of what dtype and shape; and where their bytes lie."""
    header, data = unpacked(content)
    header.pop("__metadata__", None)
    tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}
    return tensors, sorted(entry["data_offsets"] for entry in header.values()), len(data)


def mutated(content, rng):
    """One of six ways to damage a file at random."""
    header, data = unpacked(content)
    names = sorted(set(header) - {"__metadata__"})
    name = names[rng.integers(len(names))]
    way = rng.integers(6)
    if way == 0:  # a bit of the header
        flipped = bytearray(content)
        flipped[rng.integers(8, len(content) - len(data))] ^= 1 << rng.integers(8)
        return bytes(flipped)
    if way == 1:
        return content[: rng.integers(len(content))]
    if way == 2:
        return struct.pack("<Q", rng.integers(2 ** int(rng.integers(1, 63)))) + content[8:]
    if way == 3:  # two tensors change places
        other = names[rng.integers(len(names))]
        return packed({**header, name: header[other], other: header[name]}, data)
    if way == 4:
        return packed({f"{key}{'x' * (key == name)}": value for key, value in header.items()}, data)
    wrong = {
        "shape": rng.integers(-1, 40, rng.integers(5)).tolist(),
        "dtype": ["F16", "F64", "I64", "BOOL", "U8", "BF16", "F8_E4M3", "X", ""][rng.integers(9)],
        "data_offsets": rng.integers(0, len(content) + 50, 2).tolist(),
    }
    field = list(wrong)[rng.integers(3)]
    return packed({**header, name: {**header[name], field: wrong[field]}}, data)


@every_kind
@pytest.mark.timeout(3600 if THOROUGH else 300)
def test_any_weights(kind, tmp_path):
    model_class = ALL_MODELS[kind]
    model_class(small_config(kind)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    content, numbers = file.read_bytes(), rng()
    for load in (model_class.from_pretrained, AutoModelForImageClassification.from_pretrained):
        load(tmp_path)
    for number, attack in enumerate(attacks(content)):
        file.write_bytes(attack)
        assert not attempt(model_class.from_pretrained, tmp_path), f"attack {number}"
    for number in range(examples(30)):
        mutant = mutated(content, numbers)
        file.write_bytes(mutant)
        load = AutoModelForImageClassification if number % 4 == 0 else model_class
        if attempt(load.from_pretrained, tmp_path):
            # nothing but tensors of one shape that have changed places, or Swin's index, which is computed anew
            (before, *places), (after, *others) = layout(content), layout(mutant)
            lost = [name for name, entry in before.items() if after.get(name) != entry]
            # transformers 5 renames by patterns, in which a dot stands for any character
            strange = [name for name in after if name not in before]
            lost = [name for name in lost if not any(re.fullmatch(name, other) for other in strange)]
            assert all(name.endswith(".relative_position_index") for name in lost), f"mutant {number}"
            assert len(after) == len(before) and places == others, f"mutant {number}"
    file.write_bytes(content)
    assert attempt(model_class.from_pretrained, tmp_path)


# -- other files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A saved model in several files, and a tensor that lies outside."""
    model = tiny_model("vit", exit_positions=[2], exit_types="linear")
    model.save_pretrained(tmp_path / "saved", max_shard_size="50KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    shard = sorted(index["weight_map"].values())[0]
    (tmp_path / "outside.safetensors").write_bytes((tmp_path / "saved" / shard).read_bytes())
    return tmp_path / "saved", index, shard


def test_an_index_does_not_lead_out(sharded, tmp_path):
    folder, index, shard = sharded
    assert attempt(MODELS["vit"].from_pretrained, folder)
    outside = str(tmp_path / "outside.safetensors")
    for stray in (
        "../outside.safetensors",
        outside,
        f"./{shard}",
        "sub/../../outside.safetensors",
        ".",
        "..",
        "",
        "a/b",
        "pytorch_model.bin",
        "config.json",
    ):
        names = {name: stray if old == shard else old for name, old in index["weight_map"].items()}
        (folder / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": names}))
        with pytest.raises(ValueError, match="must be the name of a .safetensors file"), nothing_but(folder):
            MODELS["vit"].from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / shard).unlink()
    with pytest.raises(OSError), nothing_but(folder):
        MODELS["vit"].from_pretrained(folder)
    (folder / shard).symlink_to(outside)
    with pytest.raises(ValueError, match="and no link out of it"), nothing_but(folder):
        MODELS["vit"].from_pretrained(folder)


def test_an_index_that_is_none(sharded):
    folder, _, _ = sharded
    maps = ('{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}')
    for text in ("", "{", "[]", "3", "{}", *maps, "[" * 100_000):
        (folder / "model.safetensors.index.json").write_text(text)
        wrong = pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of weights")
        with wrong, nothing_but(folder):
            MODELS["vit"].from_pretrained(folder)


@every_kind
def test_a_pickle_beside_the_weights_is_not_opened(kind, tmp_path):
    """Upstream looks for one where safetensors fail."""
    model_class = ALL_MODELS[kind]
    model_class(small_config(kind)).save_pretrained(tmp_path)
    canary = tmp_path.parent / f"{tmp_path.name}-canary"

    class Bomb:
        def __reduce__(self):
            return exec, (f"open({str(canary)!r}, 'w').close()",)

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert attempt(model_class.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert not attempt(model_class.from_pretrained, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert not attempt(model_class.from_pretrained, tmp_path)
    assert not canary.exists()

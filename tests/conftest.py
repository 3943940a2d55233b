import gc
import os
import signal
import sys

# nothing in the tests may reach a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from functools import cache, wraps
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.seeds import seeded

SHARED = Path(__file__).resolve().parents[2] / "shared"
BENCHMARKS = Path(__file__).resolve().parents[1] / "recipes" / "benchmarks"

# no deadline: how long an example takes says more about the machine than about the code
settings.register_profile("lgvit", deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.load_profile("lgvit")


@pytest.hookimpl(trylast=True)  # once pytest-randomly knows the seed
def pytest_configure(config):
    # a job in the background of a script starts with Ctrl-C ignored, and so would all that the tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["LGVIT_TEST_SEED"] = str(config.getoption("randomly_seed", 0) % 2**31)


@pytest.fixture(autouse=True)
def seeds_of_this_run():
    seeded()


@pytest.fixture(scope="module")
def benchmark():
    """Opens a script of `recipes/benchmarks`; they import each other by name, as when they are run."""
    sys.path.insert(0, str(BENCHMARKS))
    yield import_module
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="session")
def modules_seen():
    return set()


@pytest.fixture(autouse=True)
def imports_are_no_garbage(modules_seen):
    """Every run of `Trainer` collects garbage, which takes half a second where it looks at all that was imported."""
    if len(sys.modules) > len(modules_seen) + 50:
        modules_seen.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def arguments_of_one_test():
    """`TrainingArguments` write precision and compiler into the environment, where the next trainer finds them."""
    yield
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_DYNAMO_", "ACCELERATE_MIXED_PRECISION"))]:
        del os.environ[name]
    accelerate = sys.modules.get("accelerate.state")
    if accelerate and accelerate.AcceleratorState._shared_state.get("_mixed_precision", "no") != "no":
        accelerate.AcceleratorState._reset_state()


@pytest.fixture(scope="session", autouse=True)
def equal_steps_are_translated_once():
    """To ONNX, in all the tests of a process; each export is still traced, and has its own weights."""
    from lgvit_hf.export import segment_graphs

    exported, translated = segment_graphs._exported, {}

    @wraps(exported)
    def with_what_is_known(*arguments):
        if not translated:
            # the exporter reads its whole library of operators every time
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        *before, _, called = arguments
        return exported(*before, translated, called)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_graphs, "_exported", with_what_is_known)
        yield


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip(f"the reference numbers and real images of the project are not at {SHARED}")
    return SHARED

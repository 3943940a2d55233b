"""transformers' own tests on our models, and no more of them skipped than on its own models.

`make test-upstream` downloads them; the variable `TRANSFORMERS_TESTS` says where they are, and without it nothing here
is collected. A test of upstream's own model is run only where one of ours has skipped it.
"""

import os
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from unittest import TestResult, TestSuite

import pytest
import transformers

# whose tests are whose reference
UPSTREAM_OF = {
    "ViTHighwayTest": "ViTTest",
    "DeiTHighwayTest": "DeiTTest",
    "SwinHighwayTest": "SwinTest",
    "Dinov2HighwayTest": "Dinov2Test",
    "Dinov2WithRegistersHighwayTest": "Dinov2WithRegistersTest",
    "Dinov3ViTHighwayTest": "Dinov3ViTTest",
    "SiglipHighwayTest": "SiglipTest",
    "CLIPHighwayTest": "CLIPTest",
    "BeitHighwayTest": "BeitTest",
    "ViTMSNHighwayTest": "ViTMSNTest",
    "IJepaHighwayTest": "IJepaTest",
    "AViTTest": "ViTTest",
}
# what is skipped by the year in the licence at the head of a file, and of configs that hold no others
NOT_OURS = {"test_can_init_all_missing_weights", "test_internal_model_config_and_subconfig_are_same"}
FOLDER = os.environ.get("TRANSFORMERS_TESTS")
# the tests and `download.py`, whose name no test has
collect_ignore_glob = [] if FOLDER else ["*"]

if FOLDER:
    sys.path.insert(0, str(Path(FOLDER).resolve()))
    import transformers_tests

    if transformers_tests.__version__ != transformers.__version__:
        raise pytest.UsageError(
            f"{FOLDER}: tests of transformers {transformers_tests.__version__}, but {transformers.__version__} is "
            "installed; run tests/upstream/download.py again"
        )


def pytest_configure(config):
    if not FOLDER:
        return
    testing = Path(transformers.__file__).with_name("testing_utils.py")
    for file in (testing, *Path(transformers_tests.__file__).parent.glob("*.py")):
        for marker in set(re.findall(r"mark\.(\w+)", file.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{marker}: of transformers' tests")


# outcomes of the tests of a class, and of the parts of those that have some
whole, parts = defaultdict(set), defaultdict(set)
references = {}


def pytest_collection_modifyitems(items):
    for item in list(items):
        if getattr(item, "cls", None) and item.cls.__name__ in UPSTREAM_OF.values():
            references[item.cls.__name__] = item.cls
            items.remove(item)


def pytest_runtest_logreport(report):
    if FOLDER and report.nodeid.count("::") == 2 and (report.when == "call" or report.skipped):
        outcomes = parts if hasattr(report, "context") else whole
        outcomes[report.nodeid].add(report.outcome)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Fail where one of our models skips what upstream's passes, or a part of it."""
    ran = yield
    if "skipped" in (parts[item.nodeid] or whole[item.nodeid]):
        reference = references.get(UPSTREAM_OF.get(item.cls.__name__ if getattr(item, "cls", None) else None))
        if item.name not in NOT_OURS and hasattr(reference, item.name) and passes(reference, item.name):
            reason = f"skipped, though {reference.__name__} passes it"
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", reason, "call")
            item.ihook.pytest_runtest_logreport(report=report)
    return ran


@cache
def passes(reference, name):
    """Whether a test of upstream's model passes, or a part of it; unittest runs it, so that nobody is told of it."""
    found = Passed()
    TestSuite([reference(name)]).run(found)
    return found.passed


class Passed(TestResult):
    passed = False

    def addSuccess(self, test):
        self.passed = True

    def addSubTest(self, test, part, error):
        super().addSubTest(test, part, error)
        self.passed |= error is None

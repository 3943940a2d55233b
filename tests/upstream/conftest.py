"""transformers' own tests on our models, and no more of them skipped than on its own models.

`make test-upstream` downloads them; the variable `TRANSFORMERS_TESTS` says where they are, and without it nothing here
is collected.
"""

import os
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import transformers

# whose tests are whose reference
UPSTREAM_OF = {
    "ViTHighwayTest": "ViTTest",
    "DeiTHighwayTest": "DeiTTest",
    "SwinHighwayTest": "SwinTest",
    "AViTTest": "ViTTest",
}
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


def pytest_runtest_logreport(report):
    if FOLDER and report.nodeid.count("::") == 2 and (report.when == "call" or report.skipped):
        _, model_test, name = report.nodeid.split("::")
        outcomes = parts if hasattr(report, "context") else whole
        outcomes[model_test, name].add(report.outcome)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    """Fail where one of our models skips what upstream's passes."""
    if hasattr(session.config, "workerinput"):
        return
    seen = {test: parts[test] or outcomes for test, outcomes in whole.items()}
    extra = [
        f"{ours}::{name}"
        for (ours, name), outcomes in sorted(seen.items())
        if "skipped" in outcomes and "passed" in seen.get((UPSTREAM_OF.get(ours), name), ())
    ]
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    for test in extra:
        terminal.write_line(f"\nskipped, though {UPSTREAM_OF[test.split('::')[0]]} passes it: {test}", red=True)
    if extra and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED

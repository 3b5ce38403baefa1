"""The order of files in a run: long ones first, by what the last whole run took."""

import pathlib
import re
import types

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parents[1]


def items(*names):
    return [types.SimpleNamespace(nodeid=name) for name in names]


class Cache(dict):
    def set(self, name, value):
        self[name] = value


def ordered(known, *names):
    cache = Cache({conftest.SECONDS: known})
    tests = items(*names)
    conftest.pytest_collection_modifyitems(types.SimpleNamespace(cache=cache), tests)
    return [test.nodeid for test in tests]


NAMES = ("a.py::one", "a.py::two", "b.py::one", "c.py::z[::]", "c.py::y", "c.py::x")


def test_long_files_come_first_and_stay_whole():
    known = {"a.py": 2.0, "b.py": 70.5, "c.py": 3.0}
    assert ordered(known, *NAMES) == [*NAMES[2:3], *NAMES[3:], *NAMES[:2]]
    assert ordered({"b.py": 2.5}, *NAMES) == [*NAMES[3:], *NAMES[2:3], *NAMES[:2]]  # a second a test


def test_a_fresh_tree_has_the_files_with_many_tests_first():
    assert ordered({}, *NAMES) == [*NAMES[3:], *NAMES[:2], *NAMES[2:3]]
    tests = items(*NAMES)
    conftest.pytest_collection_modifyitems(types.SimpleNamespace(), tests)  # with -p no:cacheprovider
    assert [test.nodeid for test in tests] == [*NAMES[3:], *NAMES[:2], *NAMES[2:3]]


SOURCE = pytest.Config.ArgsSource


@pytest.mark.parametrize(
    ("source", "keyword", "status", "kept"),
    [(SOURCE.TESTPATHS, "", 0, True), (SOURCE.TESTPATHS, "", 1, True), (SOURCE.TESTPATHS, "", 2, False)]
    + [(SOURCE.ARGS, "", 0, False), (SOURCE.TESTPATHS, "races", 0, False)],
)
def test_only_whole_runs_are_remembered(monkeypatch, source, keyword, status, kept):
    monkeypatch.setattr(conftest, "_seconds", type(conftest._seconds)(float))
    for nodeid, seconds in (("a.py::one", 1.0), ("a.py::two", 0.5), ("b.py::one", 4.0)):
        conftest.pytest_runtest_logreport(types.SimpleNamespace(nodeid=nodeid, duration=seconds))
    config = types.SimpleNamespace(
        args_source=source, option=types.SimpleNamespace(keyword=keyword), cache=Cache()
    )
    conftest.pytest_sessionfinish(types.SimpleNamespace(config=config), status)
    assert config.cache == ({conftest.SECONDS: {"a.py": 1.5, "b.py": 4.0}} if kept else {})
    config.workerinput = {}
    config.cache.clear()
    conftest.pytest_sessionfinish(types.SimpleNamespace(config=config), status)
    assert not config.cache  # a worker knows only its own files


@pytest.mark.parametrize("name", sorted(conftest.SLOW))
def test_every_slow_test_by_name_exists(name):
    """A line of `slow_tests.txt` that names nothing would leave its test in the default run."""
    file, *rest = name.split("[")[0].split("::")
    words = (ROOT / file).read_text()
    assert re.search(rf"\b{rest[0]}\b", words), name

"""Compiling is most of the time of a test run: one cache for all workers, and quick settings."""

import collections
import gc
import os
import pathlib

import pytest

# libtpu is there to compile for described chips; asking it for real ones costs seconds and prints errors.
# Subprocesses of tests inherit this; set the variable yourself to run the suite on another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_configure():
    """Eight devices in every process, for tests of meshes; a computation without one runs on the first."""
    import jax

    jax.config.update("jax_num_cpu_devices", 8)


SECONDS = "files/seconds"
"""In pytest's cache: how long each file took in the last whole run."""
_seconds: dict[str, float] = collections.defaultdict(float)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Files that take long come first, so that no worker is left alone with one at the end.

    A file of which nothing is known, as in a fresh tree, is taken for one of a second a test.
    """
    known = config.cache.get(SECONDS, {}) if hasattr(config, "cache") else {}
    tests = collections.Counter(file_of(item) for item in items)
    items.sort(key=lambda item: -known.get(file_of(item), tests[file_of(item)]))


SLOW = frozenset(
    line
    for line in pathlib.Path(__file__).with_name("slow_tests.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
"""Tests that get the mark `slow` by their names."""


def pytest_itemcollected(item):
    """Before pytest leaves out what `-m "not slow"` leaves out."""
    if item.nodeid in SLOW:
        item.add_marker(pytest.mark.slow)


def file_of(test):
    return test.nodeid.split("::")[0]


def pytest_runtest_logreport(report):
    _seconds[file_of(report)] += report.duration


def pytest_sessionfinish(session, exitstatus):
    """Only the whole default run is remembered: a part of a file says little about the file."""
    config = session.config
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    if whole and exitstatus in (0, 1) and not hasattr(config, "workerinput") and hasattr(config, "cache"):
        config.cache.set(SECONDS, {file: round(seconds, 1) for file, seconds in _seconds.items()})


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make much and free little: no pass over it until everything is there."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """Tracing allocates much and keeps it: fewer passes over what torch and transformers left behind."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


MOST_MAPPINGS = 30_000
"""Memory mappings of a test process before compiled programs are dropped. Each program of XLA:CPU takes some,
and Linux gives a process 65,530: the compiler then fails with a segmentation fault."""


def num_mappings():
    """Of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/maps", "rb") as mappings:
            return sum(1 for _ in mappings)
    except OSError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def few_compiled_programs():
    """Between files, where nothing counts on a program that was compiled before."""
    yield
    if num_mappings() > MOST_MAPPINGS:
        import jax

        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def shared_compilation_cache(tmp_path_factory):
    import jax

    # Workers of one run have sibling temporary folders.
    folder = tmp_path_factory.getbasetemp().parent / "jax_compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)


QUICK = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
"""The older code generator of XLA:CPU, and no threads beside two busy workers: a quarter less on kernels.

Not every version of JAX that is allowed has every option; a version that lacks one does without it.
"""


def exists(option: str, value: object) -> bool:
    """Whether this version's compiler knows the option; asking it is the only way to tell."""
    import jax

    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={option: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True


@pytest.fixture(scope="session", autouse=True)
def quick_options():
    """Compiler options for one module at a time: XLA_FLAGS, the public way, are read once a process."""
    import jax
    from jax._src import compiler

    known = {name: value for name, value in QUICK.items() if exists(name, value)}

    def options(*args, env_options_overrides=None, **more):
        quick = known if jax.config.read("jax_disable_most_optimizations") else {}
        return get(*args, env_options_overrides=quick | (env_options_overrides or {}), **more)

    get, compiler.get_compile_options = compiler.get_compile_options, options
    yield
    compiler.get_compile_options = get


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(request):
    """Little is spent on code that runs once; XLA's own passes, which decide what is copied, all run.

    Modules marked `as_users_compile` hold published numbers and keep the settings that users have.
    """
    import jax

    quick = request.node.get_closest_marker("as_users_compile") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

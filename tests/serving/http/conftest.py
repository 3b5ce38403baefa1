"""One engine and one server for all tests of a process: compiling is most of what they cost."""

import contextlib

import jax
import pytest

from tests.serving.http import served


@contextlib.contextmanager
def quickly_compiled():
    """As every module of tests is; this is made before any module is entered."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def model():
    """A real engine over a small random model."""
    with contextlib.ExitStack() as stack:
        with quickly_compiled():
            engine = stack.enter_context(served.engine_of(served.model_with_text(), most_waiting=64))
            model = served.model_of(engine)
        yield model


@pytest.fixture(scope="session")
def server(model):
    """A server over a real engine."""
    running = served.Served(model)
    yield running
    running.close()


@pytest.fixture(scope="session")
def acted_server():
    running = served.Served(served.acted_model())
    yield running
    running.close()


@pytest.fixture
def acted(acted_server):
    """A server whose engine answers as the test says, by `acted.engine.script`; everybody may ask."""
    acted_server.engine.reset()
    yield acted_server
    served.until(acted_server.idle)


@pytest.fixture(scope="session")
def hasty():
    """One that waits for nobody."""
    running = served.Served(served.acted_model(), limits=served.HASTY)
    yield running
    running.close()


@pytest.fixture(scope="session")
def locked():
    """The same behind keys."""
    running = served.Served(served.acted_model(), keys=(served.KEY, served.OTHER_KEY))
    yield running
    running.close()

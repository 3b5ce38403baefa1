"""One compilation cache for all workers of a test run: most of the suite's time is compiling."""

import os

import pytest

# libtpu is there to compile for described chips; asking it for real ones costs seconds and prints errors.
# Subprocesses of tests inherit this; set the variable yourself to run the suite on another platform.
os.environ.setdefault("JAX_PLATFORMS", "cpu")


@pytest.fixture(scope="session", autouse=True)
def shared_compilation_cache(tmp_path_factory):
    import jax

    # Workers of one run have sibling temporary folders.
    folder = tmp_path_factory.getbasetemp().parent / "jax_compilation_cache"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    yield
    jax.config.update("jax_compilation_cache_dir", None)

"""hf:// addresses with a fake hub: what is asked for, and what is refused. No network."""

import pathlib

import pytest

from dsv4_jax.command_line import hub
from dsv4_jax.errors import CheckpointError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Stands in for the two calls into huggingface_hub."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.asked: list[tuple[str, str]] = []
        self.downloads: list[dict[str, object]] = []

    def resolve(self, repository: str, revision: str) -> str:
        self.asked.append((repository, revision))
        return COMMIT

    def download(self, **arguments: object) -> str:
        self.downloads.append(arguments)
        return str(self.directory)


@pytest.fixture
def fake(tmp_path):
    return FakeHub(tmp_path)


def locate(fake, source, weights=True, **kwargs):
    return hub.locate(source, weights=weights, resolve=fake.resolve, download=fake.download, **kwargs)


def test_a_path_is_left_alone(fake):
    assert locate(fake, "some/folder") == pathlib.Path("some/folder")
    assert fake.asked == fake.downloads == []


def test_a_branch_is_pinned_to_a_commit_before_the_download(fake):
    said = []
    where = locate(fake, "hf://deepseek-ai/DeepSeek-V4-Flash@main", announce=said.append)
    assert where == fake.directory
    assert fake.asked == [("deepseek-ai/DeepSeek-V4-Flash", "main")]
    assert said == [f"hf://deepseek-ai/DeepSeek-V4-Flash@{COMMIT}"]
    (request,) = fake.downloads
    assert request["revision"] == COMMIT
    assert request["repo_id"] == "deepseek-ai/DeepSeek-V4-Flash"


def test_a_commit_needs_no_question(fake):
    locate(fake, f"hf://a/b@{COMMIT}")
    assert fake.asked == []
    assert fake.downloads[0]["revision"] == COMMIT


@pytest.mark.parametrize(("weights", "has_tensors"), [(True, True), (False, False)])
def test_only_tensors_and_json_of_the_top_folder(fake, weights, has_tensors):
    from huggingface_hub.utils import filter_repo_objects

    locate(fake, "hf://a/b@v1", weights=weights)
    request = fake.downloads[0]
    repository = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "modeling.py",
        "pytorch_model.bin",
        "model.pt",
        "README.md",
        "tokenizer.json",
        "encoding/encoding_dsv4.py",
        "inference/config.json",
        "sub/model.safetensors",
    ]
    fetched = list(
        filter_repo_objects(
            repository,
            allow_patterns=request["allow_patterns"],
            ignore_patterns=request["ignore_patterns"],
        )
    )
    wanted = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    if has_tensors:
        wanted.append("model-00001-of-00002.safetensors")
    assert sorted(fetched) == sorted(wanted)


def test_the_revision_is_required(fake):
    with pytest.raises(CheckpointError, match="the revision is missing: hf://a/b@<branch"):
        locate(fake, "hf://a/b")


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://a",
        "hf://a@main",
        "hf://a/b/c@main",
        "hf://a/b@",
        "hf://a/b@main@main",
        "hf://../b@main",
        "hf://a/b@../../x",
        "hf://a/b@-x",
        "hf://a/b@ma in",
        "hf://a/b@main\n",
        "hf://a\x00/b@main",
    ],
)
def test_malformed_addresses(fake, address):
    with pytest.raises(CheckpointError, match="must read hf://org/name@revision"):
        locate(fake, address)
    assert fake.asked == fake.downloads == []


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://a/b@v1.0", ("a/b", "v1.0")),
        ("hf://o-r.g/n_a.m-e@refs/pr/3", ("o-r.g/n_a.m-e", "refs/pr/3")),
    ],
)
def test_addresses(address, parts):
    assert hub.parse_address(address) == parts


@pytest.mark.parametrize("step", ["resolve", "download"])
def test_failures_are_one_sentence(fake, step):
    class HubError(Exception):
        """Unrelated to OSError, as the exceptions of HTTP libraries are."""

    def fail(*args, **kwargs):
        raise HubError("404 Client Error: no such revision")

    setattr(fake, step, fail)
    with pytest.raises(CheckpointError, match="no such revision") as caught:
        locate(fake, "hf://a/b@main")
    assert caught.value.what == "cannot fetch hf://a/b@main"


def test_ctrl_c_is_not_swallowed(fake):
    def interrupted(**arguments):
        raise KeyboardInterrupt

    fake.download = interrupted
    with pytest.raises(KeyboardInterrupt):
        locate(fake, "hf://a/b@main")


# offline: the hub's own cache decides, without any fake


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """A cache that fetched org/tiny@main once, and a client that must not use the network."""
    from huggingface_hub import constants

    repository = tmp_path / "models--org--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_offline_a_branch_is_what_the_cache_knows_of_it(offline_cache):
    said = []
    assert hub.locate("hf://org/tiny@main", weights=True, announce=said.append) == offline_cache
    assert said == [f"hf://org/tiny@{COMMIT} (offline: what the local cache holds)"]
    assert hub.locate(f"hf://org/tiny@{COMMIT}", weights=True) == offline_cache


@pytest.mark.parametrize("address", ["hf://org/tiny@dev", "hf://org/other@main", f"hf://org/tiny@{'0' * 40}"])
def test_offline_what_was_never_fetched_is_refused(offline_cache, address):
    with pytest.raises(CheckpointError, match="cannot fetch"):
        hub.locate(address, weights=True)


@pytest.mark.parametrize("noted", ["", "main", "0" * 39, "x" * 40])
def test_offline_a_damaged_note_is_no_commit(offline_cache, noted):
    (offline_cache.parents[1] / "refs" / "main").write_text(noted)
    with pytest.raises(CheckpointError, match="holds no commit"):
        hub.locate("hf://org/tiny@main", weights=True)

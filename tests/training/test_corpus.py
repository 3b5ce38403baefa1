"""The corpus: what is found, what is left out, and a split that never moves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4_jax.training.corpus import (
    MIN_CORPUS_BYTES,
    CorpusError,
    gather_corpus,
    is_validation,
    source_files,
)


def make_tree(root: Path, num_files: int, size: int = 6000) -> None:
    for index in range(num_files):
        path = root / f"pkg{index % 3}" / f"m{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {index}\n" + "x = 1\n" * (size // 6))


def test_standard_library_has_enough_text_and_leaves_out_what_it_should():
    corpus = gather_corpus()
    names = [document.name for document in corpus.train + corpus.validation]
    assert corpus.num_bytes > 2_000_000
    assert "argparse.py" in names and "json/decoder.py" in names
    forbidden = ("site-packages", "lib2to3", "idlelib", "encodings", "test", "tests")
    assert not [name for name in names if set(name.split("/")[:-1]) & set(forbidden)]
    assert len(set(names)) == len(names)
    validation_bytes = sum(len(document.text) for document in corpus.validation)
    assert 0.01 < validation_bytes / corpus.num_bytes < 0.15


def test_parts_are_disjoint_sorted_and_follow_the_name_alone(tmp_path):
    make_tree(tmp_path, 90)
    corpus = gather_corpus(root=tmp_path)
    train, validation = ([d.name for d in part] for part in (corpus.train, corpus.validation))
    assert train == sorted(train) and validation == sorted(validation)
    assert len(train) + len(validation) == 90 and validation
    assert all(is_validation(name) for name in validation)
    assert not any(is_validation(name) for name in train)


def test_split_is_the_same_under_another_hash_seed():
    names = [f"pkg/module_{i}.py" for i in range(200)]
    code = (
        "from dsv4_jax.training.corpus import is_validation;"
        "print(''.join(str(int(is_validation(f'pkg/module_{i}.py'))) for i in range(200)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "77"},
        cwd=Path(__file__).parents[2],
    )
    assert result.stdout.strip() == "".join(str(int(is_validation(name))) for name in names)
    assert is_validation("anything", fraction=1.0) and not is_validation("anything", fraction=0.0)


def test_cap_takes_whole_files_and_keeps_the_split(tmp_path):
    make_tree(tmp_path, 90)
    everything = gather_corpus(root=tmp_path)
    capped = gather_corpus(max_bytes=300_000, root=tmp_path)
    assert 290_000 < capped.num_bytes <= 300_000
    assert set(capped.train) < set(everything.train)
    assert set(capped.validation) <= set(everything.validation)


def test_unreadable_empty_linked_and_huge_files_are_skipped(tmp_path):
    make_tree(tmp_path, 60)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 10)
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "huge.py").write_bytes(b"x = 1\n" * 100_000)
    (tmp_path / "link.py").symlink_to(tmp_path / "pkg0" / "m0.py")
    (tmp_path / "note.txt").write_text("no")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.py").write_text("x = 1\n")
    corpus = gather_corpus(root=tmp_path)
    assert len(corpus.train) + len(corpus.validation) == 60


def test_windows_line_ends_become_plain_ones(tmp_path):
    make_tree(tmp_path, 60)
    (tmp_path / "dos.py").write_bytes(b"a = 1\r\nb = 2\r\n")
    corpus = gather_corpus(root=tmp_path)
    (text,) = [d.text for d in corpus.train + corpus.validation if d.name == "dos.py"]
    assert text == "a = 1\nb = 2\n"


def test_too_little_text_is_one_error_with_every_reason(tmp_path):
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(CorpusError) as error:
        gather_corpus(root=tmp_path)
    assert len(error.value.problems) == 2
    assert f"{MIN_CORPUS_BYTES:,}" in str(error.value) and str(tmp_path) in str(error.value)
    assert source_files(tmp_path / "missing") == []


def test_cap_leaves_both_parts_in_proportion(tmp_path):
    make_tree(tmp_path, 600, size=3000)
    whole, capped = gather_corpus(root=tmp_path), gather_corpus(max_bytes=600_000, root=tmp_path)
    share = [len(c.validation) / len(c.train + c.validation) for c in (whole, capped)]
    assert 0.03 < share[0] < 0.10 and 0.02 < share[1] < 0.12

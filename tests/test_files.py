import os

import pytest

from lgvit_hf.files import add_files, replace_folder, write_json


def entries(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.version_independent
def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise RuntimeError("stop")
    assert entries(tmp_path) == []


def test_overwriting_keeps_the_old_until_the_new_is_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError("stop")
    assert entries(tmp_path / "out") == ["old"]
    with replace_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert entries(tmp_path) == ["out"] and entries(tmp_path / "out") == ["new"]


@pytest.mark.version_independent
def test_what_appears_meanwhile_is_not_lost(tmp_path):
    with pytest.raises(OSError, match="the whole result is in") as error, replace_folder(tmp_path / "out") as folder:
        (folder / "result").write_text("result")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("precious")
    assert (tmp_path / "out" / "precious").read_text() == "precious"
    kept = str(error.value).rsplit(" ", 1)[1]
    assert entries(type(tmp_path)(kept)) == ["result"]


@pytest.mark.version_independent
def test_a_working_folder_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="working folder"), replace_folder("."):
        raise AssertionError("the block must not run")


@pytest.mark.version_independent
def test_files_are_added_beside_others_and_readable(tmp_path):
    (tmp_path / "other").write_text("other")
    with add_files(tmp_path) as folder:
        (folder / "model").write_text("model")
    assert entries(tmp_path) == ["model", "other"]
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
    finally:
        os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert entries(tmp_path) == ["a.json", "model", "other"]


@pytest.mark.version_independent
@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_results_are_readable_as_other_files_are(tmp_path):
    (tmp_path / "plain").write_text("any other file")
    with replace_folder(tmp_path / "new") as new, add_files(tmp_path / "old") as old:
        for folder in (new, old):
            (folder / "model.safetensors").write_text("as safetensors writes it")
            (folder / "model.safetensors").chmod(0o600)
    for folder in ("new", "old"):
        assert (tmp_path / folder / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode

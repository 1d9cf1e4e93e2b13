from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flexidit.weight_files import (
    load_pickle,
    read_diffusers,
    read_json,
    read_safetensors,
    resolve,
    save_json,
    save_pickle,
    save_safetensors,
)

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    state, header = read_safetensors(save_safetensors(STATE, tmp_path / "a.safetensors", {"key": "value"}))
    pickled = load_pickle(save_pickle(STATE, tmp_path / "a.pt"))
    assert header == {"key": "value"}
    for read in (state, pickled):
        assert set(read) == set(STATE)
        assert all(torch.equal(read[name], STATE[name]) for name in STATE)
    assert read_json(save_json({"n": [1, None]}, tmp_path / "a.json")) == {"n": [1, None]}


def test_views_of_other_tensors_are_written_whole(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(3, 4)
    state = {"columns": rows.T, "row": rows[1]}
    read, _ = read_safetensors(save_safetensors(state, tmp_path / "a.safetensors", {}))
    assert all(torch.equal(read[name], state[name]) for name in state)


def test_a_directory_of_several_files_or_of_an_old_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_pytorch_model\.safetensors"):
        read_diffusers(tmp_path)
    save_pickle(STATE, tmp_path / "diffusion_pytorch_model.bin")
    assert set(read_diffusers(tmp_path)) == {"a", "b"}
    for i, name in enumerate(STATE):
        save_safetensors({name: STATE[name]}, tmp_path / f"diffusion_pytorch_model-0000{i}-of-00002.safetensors", {})
    save_safetensors({"c": STATE["a"]}, tmp_path / "null_caption.safetensors", {})
    assert set(read_diffusers(tmp_path)) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "sentence"), [(b"{", "damaged or not json"), (b"\xff", "damaged"), (b"3", "holds a int")]
)
def test_damaged_json_is_named(text: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=sentence):
        read_json(tmp_path / "a.json")


def test_a_path_is_taken_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve("owner/name") == Path("owner/name")
    with pytest.raises(FileNotFoundError, match="no checkpoint at a/b/c"):
        resolve("a/b/c")


def test_what_the_hub_does_not_give_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"owner/name is neither a file.*\(no network\); give a local path"):
        resolve("owner/name")

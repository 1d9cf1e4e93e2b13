"""What one process does with its error; several are in tests/distributed/launching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.rank_errors import RankErrors


class Failing(BoringModel):
    """Raises at the third step."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            raise self.error
        return super().training_step(batch, batch_idx)


def fit(folder: Path, error: Exception) -> RankErrors:
    errors = RankErrors()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=4, logger=False, enable_checkpointing=False, callbacks=[errors],
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
    )  # fmt: skip
    with pytest.raises(type(error)):
        trainer.fit(Failing(error))
    return errors


def test_the_file_has_the_traceback_of_each_start(tmp_path: Path) -> None:
    for message in ("first trouble", "second trouble"):
        errors = fit(tmp_path, RuntimeError(message))
        assert errors.sentence is not None
        assert errors.sentence.startswith("rank 0 on ")
        assert errors.sentence.endswith(f"failed first, at step 2: RuntimeError: {message}")
        assert not errors.is_consequence
    text = (tmp_path / "errors" / "rank000.txt").read_text()
    assert text.count("raise self.error") == 2
    assert text.index("first trouble") < text.index("second trouble")


def test_a_mistake_of_the_user_leaves_no_file(tmp_path: Path) -> None:
    fit(tmp_path, ValueError("a batch of no samples"))
    assert not (tmp_path / "errors").exists()


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path: Path) -> None:
    (tmp_path / "errors").write_text("not a folder")
    fit(tmp_path, RuntimeError("the error"))

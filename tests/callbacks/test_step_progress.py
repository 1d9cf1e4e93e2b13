from __future__ import annotations

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from callbacks.step_progress import StepProgress


class Failing(BoringModel):
    def training_step(self, batch: object, batch_idx: int) -> None:
        raise RuntimeError("broken")


def fit(model: BoringModel, progress: StepProgress, **options: object) -> None:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[progress],
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(model)


def test_one_bar_counts_the_steps_of_all_epochs(capsys: pytest.CaptureFixture[str]) -> None:
    fit(BoringModel(), StepProgress("training", refresh_every_n_steps=2), max_steps=9, limit_train_batches=4)
    out = capsys.readouterr().out
    assert "training" in out
    assert "9/9" in out


def test_the_bar_is_taken_down_when_training_fails() -> None:
    progress = StepProgress()
    with pytest.raises(RuntimeError, match="broken"):
        fit(Failing(), progress, max_steps=2)
    assert progress._progress is None


def test_it_can_be_turned_off(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress("quiet one")
    progress.disable()
    fit(BoringModel(), progress, max_steps=2)
    assert "quiet one" not in capsys.readouterr().out

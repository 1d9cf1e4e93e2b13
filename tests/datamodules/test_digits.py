import pytest
import torch

from datamodules.digits import DigitsDataModule, load_digit_images, stratified_split


def test_split_is_stratified_pure_disjoint_and_complete():
    y = load_digit_images()[1]
    train, val = stratified_split(y, 0.2, seed=1)
    assert torch.cat([train, val]).sort().values.equal(torch.arange(1797))
    share = y[val].bincount() / y.bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.003, rtol=0)
    assert val.equal(stratified_split(y, 0.2, seed=1)[1])
    assert not val.equal(stratified_split(y, 0.2, seed=2)[1])


def test_batches_are_pixels_and_labels_of_the_training_part():
    data = DigitsDataModule(batch_size=32, val_fraction=0.2)
    batches = list(data.train_dataloader())
    x, y = data.train_images()
    assert len(batches) == len(y) // 32
    assert all(set(batch) == {"x", "y", "names"} for batch in batches)
    assert batches[0]["x"].shape == (32, *data.sample_shape)
    known = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    batch = batches[3]
    assert [known[image.numpy().tobytes()] for image in batch["x"]] == batch["y"].tolist()


def test_validation_is_everything_held_out_in_order():
    data = DigitsDataModule(batch_size=50, val_fraction=0.1)
    assert torch.cat([batch["x"] for batch in data.val_dataloader()]).equal(data.val_images()[0])
    assert DigitsDataModule(val_fraction=0).val_dataloader() == []


def test_a_batch_is_one_read_of_the_tensors(monkeypatch):
    data = DigitsDataModule()
    loader = data.train_dataloader()

    def refuse(*args: object) -> None:
        raise AssertionError("read sample by sample")

    monkeypatch.setattr(type(data.dataset), "__getitem__", refuse)
    assert len(list(loader)) == len(loader)


@pytest.mark.parametrize("options, message", [({"val_fraction": 1.0}, "val_fraction"), ({"size": 7}, "at least 8")])
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DigitsDataModule(**options).setup()


def test_a_single_sample_equals_its_row():
    data = DigitsDataModule()
    data.setup()
    assert data.dataset[5]["x"].equal(data.dataset.__getitems__([5])["x"][0])

import pytest
import torch

from flexidit.digit_images import load_digit_images


def test_the_digits_are_real_and_in_range():
    x, y = load_digit_images()
    assert (tuple(x.shape), x.dtype, y.dtype) == ((1797, 1, 8, 8), torch.float32, torch.int64)
    assert (x.min(), x.max()) == (-1, 1)
    assert y.unique().tolist() == list(range(10))


def test_upsampling_keeps_range_and_mean():
    x, native = load_digit_images(16)[0], load_digit_images()[0]
    assert tuple(x.shape) == (1797, 1, 16, 16)
    assert x.abs().max() <= 1
    torch.testing.assert_close(x.mean(), native.mean(), atol=0.01, rtol=0)


def test_less_than_native_is_refused():
    with pytest.raises(ValueError, match="at least 8, got 7"):
        load_digit_images(7)

"""What clips of moving digits show: where the digit sets off to, and which digit it is.

The direction is that of the centroid of the ink, fitted over the frames in which a real digit has not reached a border
(see :mod:`flexidit.moving_digits`). The digit is cut out of each frame where most of the ink is, and the scores of a
classifier are averaged over the frames. Stroke weight, slant and width are measured in the first frame, where real
digits lie on the pixel grid: between pixels they are blurred by up to half a pixel, which would count as width.

Shape legend: N clips, F frames, H W height and width in pixels, D side of a digit in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flexidit.digit_captions import caption_of
from flexidit.digit_images import NATIVE_SIZE
from flexidit.draws import Draw
from flexidit.metrics import digit_attributes
from flexidit.metrics.digit_attributes import FAINT, Agreement, Count, attributes_of
from flexidit.metrics.digit_classifier import DigitClassifier, train_digit_classifier
from flexidit.moving_captions import MovingDigit, moving_captions_of, parse_moving_caption
from flexidit.moving_digits import DIRECTION_NAMES, SHARES, SMALL, ClipFormat, MovingDigits

CONFIRMED_SHARE = SHARES[0] / 2
"""Of the free way: what moves less than this on both axes is not believed to move; the slowest real digit has twice."""

_TIED = 1e-3  # windows that hold as much ink but for this share; the faintest pixel of a real digit is more
_QUADRANTS = 4


def centroids(clips: Tensor) -> Tensor:
    """Centre of the ink, down and right: (N, 1, F, H, W) in [-1, 1] -> (N, F, 2); nan in a blank frame.

    Raises:
        ValueError: for another shape.
    """
    ink = _ink(clips)  # (N, F, H, W)
    mass = ink.sum((2, 3))
    down, right = (torch.arange(size, dtype=ink.dtype, device=ink.device) for size in ink.shape[2:])
    return torch.stack([(ink.sum(3) * down).sum(2) / mass, (ink.sum(2) * right).sum(2) / mass], dim=2)


def velocities(clips: Tensor) -> Tensor:
    """Pixels a frame, down and right, by least squares up to the last named frame: (N, 1, F, H, W) -> (N, 2)."""
    last = clips.shape[2] // 2
    track = centroids(clips)[:, : last + 1]
    time = torch.arange(last + 1, dtype=track.dtype, device=track.device) - last / 2
    return torch.einsum("f,nfa->na", time / time.square().sum(), track)


def directions_of(clips: Tensor, digit_size: int = NATIVE_SIZE) -> list[str | None]:
    """The nearest direction of each clip, None for what hardly moves or is blank: (N, 1, F, H, W) -> N names."""
    velocity = velocities(clips).cpu()
    way = velocity.abs().amax(dim=1) * (clips.shape[2] // 2)
    moves = way >= CONFIRMED_SHARE * (clips.shape[-1] - digit_size)  # a nan does not
    eighths = (torch.atan2(velocity[:, 0], velocity[:, 1]) / (math.pi / 4)).nan_to_num().round().long() % 8
    return [
        DIRECTION_NAMES[eighth] if does else None for eighth, does in zip(eighths.tolist(), moves.tolist(), strict=True)
    ]


def cut_out(clips: Tensor, digit_size: int = NATIVE_SIZE) -> Tensor:
    """The square of each frame that holds most ink: (N, 1, F, H, W) -> (N, F, 1, D, D).

    Where several hold all of it, as around a narrow digit, the one in their middle.

    Raises:
        ValueError: for another shape, or frames smaller than the digit.
    """
    if min(clips.shape[-2:]) < digit_size:
        raise ValueError(f"digits of {digit_size} pixels cannot be cut out of clips {tuple(clips.shape)}")
    frames = clips.transpose(1, 2).flatten(0, 1)  # (N * F, 1, H, W)
    held = F.avg_pool2d(_ink(clips).flatten(0, 1), digit_size, stride=1)  # (N * F, H - D + 1, W - D + 1)
    tied = (held >= held.amax((1, 2), keepdim=True) * (1 - _TIED)).to(held.dtype)
    window = torch.arange(digit_size, device=clips.device)
    down = _middle(tied.amax(2))[:, None] + window  # (N * F, D)
    right = _middle(tied.amax(1))[:, None] + window
    rows = torch.arange(len(frames), device=clips.device)
    digits = frames[rows[:, None, None], 0, down[:, :, None], right[:, None, :]]
    return digits.view(len(clips), -1, 1, digit_size, digit_size)


def agreement(
    clips: Tensor,
    captions: Sequence[str],
    classify: Callable[[Tensor], Tensor],
    digit_size: int = NATIVE_SIZE,
) -> Agreement:
    """Share of what captions say that the clips show.

    True captions of real clips score 1 but for errors of the classifier.

    Args:
        clips: (N, 1, F, H, W) in [-1, 1].
        captions: N texts that :func:`~flexidit.moving_captions.parse_moving_caption` understands.
        classify: Digits (M, 1, D, D), cut out of frames -> class scores (M, 10), such as the ``logits`` of
            :func:`train_moving_digit_classifier`.
        digit_size: D.

    Returns:
        Counts for "class", "weight", "slant", "size" and "direction".

    Raises:
        ValueError: unequal numbers of clips and captions, or a caption that cannot be understood.
    """
    if len(clips) != len(captions):
        raise ValueError(f"every clip needs a caption, got {len(clips)} clips and {len(captions)} captions")
    wanted = [parse_moving_caption(caption) for caption in captions]
    digits = cut_out(clips, digit_size)  # (N, F, 1, D, D)
    with torch.no_grad():
        scores = classify(digits.flatten(0, 1)).log_softmax(1).view(*digits.shape[:2], -1).mean(1)  # (N, 10)
    stills = [caption_of(moving.digit) for moving in wanted]
    counts = digit_attributes.agreement(digits[:, 0], stills, lambda _: scores).counts
    found = directions_of(clips, digit_size)
    hits = sum(name == moving.direction for name, moving in zip(found, wanted, strict=True))
    return Agreement({**counts, "direction": Count(hits, len(wanted))})


def train_moving_digit_classifier(clip: ClipFormat = SMALL, seed: int = 0) -> DigitClassifier:
    """Of digits (M, 1, D, D) as :func:`cut_out` gives them, trained on all real ones: some seconds, pure.

    Args:
        clip: Size of the clips.
        seed: Of the training, and of the movements that it sees.
    """
    clips, labels = _real_clips(clip, seed, num_frames=3)
    digits = cut_out(clips, clip.digit_size).flatten(0, 1)
    return train_digit_classifier(digits, labels.repeat_interleave(3), seed, num_epochs=8)


def moving_digit_features(
    canvas_size: int = 16, num_frames: int = 8, digit_size: int = NATIVE_SIZE, seed: int = 0
) -> DigitClassifier:
    """A classifier of whole frames (M, 1, S, S), whose features make Frechet distances of frames and of clips.

    It learns class and quadrant together: features of the class alone are made to forget the place, and a distance in
    them would hardly notice how a digit moves. Trained, here and now, on all real digits: a config can name it.

    Args:
        canvas_size: S.
        num_frames: Frames of a clip.
        digit_size: Side of a digit in pixels.
        seed: Of the training, and of the movements that it sees.
    """
    clips, labels = _real_clips(ClipFormat(canvas_size, num_frames, digit_size), seed, num_frames=2)
    below, beside = (centroids(clips) > (canvas_size - 1) / 2).flatten(0, 1).long().unbind(1)
    places = labels.repeat_interleave(2) * _QUADRANTS + 2 * below + beside
    frames = clips.transpose(1, 2).flatten(0, 1)
    classifier = train_digit_classifier(frames, places, seed, num_epochs=6, num_classes=10 * _QUADRANTS)
    classifier.name = "classifier of moving digits and their quadrant, penultimate layer (trained on the same digits)"
    return classifier


@lru_cache(maxsize=4)
def moving_digits_in(clip: ClipFormat) -> tuple[MovingDigits, tuple[digit_attributes.DigitAttributes, ...]]:
    """All digits of this size, and what is remarkable about each."""
    digits = MovingDigits(clip)
    return digits, tuple(attributes_of(digits.images, digits.labels))


def moving_prompts(count: int, seed: int = 0) -> list[str]:
    """Captions with the shares that real clips have: those of digits drawn without repetition while there are any.

    A pure function of its arguments; fewer prompts are the first ones of more.
    """
    generator = torch.Generator().manual_seed(seed)
    return [caption for caption, _ in zip(_shuffled_captions(generator), range(count), strict=False)]


def _shuffled_captions(generator: torch.Generator) -> Iterator[str]:
    _, attributes = moving_digits_in(SMALL)
    while True:
        for place in torch.randperm(len(attributes), generator=generator).tolist():
            direction = DIRECTION_NAMES[int(torch.randint(len(DIRECTION_NAMES), (), generator=generator))]
            captions = moving_captions_of(MovingDigit(attributes[place], direction))
            yield captions[int(torch.randint(len(captions), (), generator=generator))]


def _real_clips(clip: ClipFormat, seed: int, num_frames: int) -> tuple[Tensor, Tensor]:
    """Every digit in one motion, in so many frames of it, evenly spaced; and their labels."""
    digits, _ = moving_digits_in(clip)
    clips, _ = digits.clips(seed, [Draw(sample) for sample in range(len(digits))])
    return clips[:, :, torch.linspace(0, clip.num_frames - 1, num_frames).long()], digits.labels


def _ink(clips: Tensor) -> Tensor:
    """Amount of ink, 0 to 1, less what is faint: (N, 1, F, H, W) -> (N, F, H, W) float64, but on MPS."""
    if clips.ndim != 5 or clips.shape[1] != 1:
        raise ValueError(f"clips of digits are (N, 1, F, H, W), got {tuple(clips.shape)}")
    pixels = clips.detach()[:, 0]
    ink = (pixels.float() if clips.device.type == "mps" else pixels.double()).add(1).div(2)
    return ((ink - FAINT) / (1 - FAINT)).clamp(0, 1)


def _middle(tied: Tensor) -> Tensor:
    """Mean place of the ones in each row, a whole number: (M, K) -> (M,)."""
    place = torch.arange(tied.shape[1], dtype=tied.dtype, device=tied.device)
    return ((tied * place).sum(1) / tied.sum(1)).round().long()

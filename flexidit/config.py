"""The configs that decide a model's parameters, their shapes and the function they compute: data only, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from flexidit.patch_size import PatchSize

if TYPE_CHECKING:
    from typing_extensions import Self

Positions = Literal["coords", "corners", "grid"]
PositionTable = Literal["sincos", "learned"]
MlpKind = Literal["gelu", "swiglu"]
Recipe = Literal["shared", "lora"]
ProcessName = Literal["diffusion", "flow"]


@dataclass(frozen=True)
class FlexConfig:
    """What ``flexify`` added to a pre-trained model."""

    recipe: Recipe
    """"shared": one set of weights for all sizes (section 3.1); "lora": frozen base, an adapter per size (3.2)."""
    weak_patch_sizes: tuple[PatchSize, ...]
    """The added sizes, most powerful first."""
    underlying_patch_size: PatchSize | None = None
    """Size p' at which the shared (de)embedding weights are held; None in the lora recipe."""
    size_norms: bool = True
    """Whether weak sizes scale and shift the layer norms (shared recipe)."""
    positions: Positions = "coords"
    """Where a weak patch sits: at the coordinates of its centre, of its first base patch, or at its index."""
    rank: int | None = None
    """Rank of the adapters; None in the shared recipe."""
    alpha: float | None = None
    """The adapters' update is scaled by alpha / rank."""


@dataclass(frozen=True)
class TransformerConfig:
    """What the configs of all families share."""

    embedding_name: ClassVar[str] = "x_embedder"
    """Module of the model that turns patches into tokens; its weights are those of ``proj`` in it."""
    unembedding_name: ClassVar[str] = "final_layer.linear"
    """Module that turns tokens into patches."""

    input_size: tuple[int, ...] = (32, 32)
    """Latent height and width; of clips, latent frames before them."""
    patch_size: PatchSize = PatchSize(1, 2, 2)
    """The pre-trained, most powerful size."""
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    class_dropout_prob: float = 0.1
    """How often training replaces the condition by the null condition."""
    learn_sigma: bool = True
    position_unit: PatchSize | None = None
    """Patch size whose grid is the unit of positions; None: ``patch_size``. A weak size taken out of a flexible model
    as a plain one keeps that model's unit."""
    placement: Positions = "coords"
    """Where a patch sits if it is not of the unit's size; see ``positions.patch_centres``."""
    process: ProcessName = "diffusion"
    """What the output means: the noise of "diffusion", or the velocity of a rectified "flow"."""
    time_shift: float = 1.0
    """Of a flow: how far noise levels are moved towards noise, in training and (by default) in sampling; 1: evenly
    spread. See ``diffusion.flow``."""
    flex: FlexConfig | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads or self.hidden_size % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not work with {self.num_heads} heads: "
                "it must be a multiple of num_heads and of 4"
            )
        if self.patch_size.t > 1 and not self.is_video:
            raise ValueError(
                f"patch size {self.patch_size.name} spans {self.patch_size.t} frames, but input_size {self.input_size} "
                "is that of images: give (F, H, W), or a patch size 1x..x.."
            )
        self._check_process()

    @property
    def is_video(self) -> bool:
        """Whether the model takes clips (N, C, F, H, W) and not images (N, C, H, W)."""
        return len(self.input_size) == 3

    @property
    def mlp_width(self) -> int:
        """Width between the two layers of a block's perceptron."""
        return round(self.hidden_size * self.mlp_ratio)

    def _check_process(self) -> None:
        if self.process not in get_args(ProcessName):
            raise ValueError(f"process is {' or '.join(map(repr, get_args(ProcessName)))}, got {self.process!r}")
        if self.process == "diffusion" and self.time_shift != 1:
            raise ValueError(f"time_shift={self.time_shift!r} belongs to process='flow'; leave it at 1 for diffusion")
        if not (isinstance(self.time_shift, int | float) and 0 < self.time_shift < math.inf):
            raise ValueError(f"time_shift is a number above 0, and 1 shifts nothing; got {self.time_shift!r}")
        if self.process == "flow" and self.learn_sigma:
            raise ValueError("a flow predicts velocities and no variance: set learn_sigma=False with process='flow'")

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: noise or velocity, and the variance if it is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_sizes(self) -> tuple[PatchSize, ...]:
        """All sizes that a model accepts, base first."""
        return (self.patch_size, *(self.flex.weak_patch_sizes if self.flex else ()))

    def plain(self, patch_size: PatchSize) -> Self:
        """The config of one patch size as a model of its own, whose patches stay where they are."""
        placement = self.flex.positions if self.flex else self.placement
        unit = self.position_unit or self.patch_size
        is_own = patch_size == unit or (placement == "grid" and self.computes_positions)
        if is_own:
            return replace(self, patch_size=patch_size, flex=None, position_unit=None, placement="coords")
        return replace(self, patch_size=patch_size, flex=None, position_unit=unit, placement=placement)

    @property
    def computes_positions(self) -> bool:
        """Whether positions are a function of coordinates; if they are learned, a model has its own table."""
        return True

    @property
    def has_position_table(self) -> bool:
        """Whether a model keeps a table of computed positions among its weights, as DiT's checkpoints do."""
        return self.computes_positions


@dataclass(frozen=True)
class DiTConfig(TransformerConfig):
    """A class-conditional diffusion transformer (Peebles and Xie 2023)."""

    num_classes: int = 1000
    frequency_shift: int = 0
    """0 in the official code, 1 in diffusers' port; see ``layers.TimestepEmbedder``."""
    mlp_norm_eps: float = 1e-6
    """1e-6 in the official code; diffusers' port reads it from its ``norm_eps``."""


@dataclass(frozen=True)
class CaptionedConfig(TransformerConfig):
    """What the configs of text-conditional families share."""

    caption_channels: int = 4096
    """Width of the text encoder; 4096 is T5-XXL."""
    caption_length: int = 120
    """Most tokens of a caption."""

    @property
    def has_null_caption(self) -> bool:
        """Whether the weights hold a caption of their own for the unconditional prediction."""
        return False


@dataclass(frozen=True)
class TextDiTConfig(CaptionedConfig):
    """A text-conditional one with cross-attention and adaLN-single, as PixArt-alpha (Chen et al. 2023).

    With a 3-D ``input_size`` it is the paper's Video DiT: tokens of all frames attend to one another.
    """

    null_caption: bool = True
    """Whether the weights hold a caption of their own for the unconditional prediction, as PixArt's ``.pth`` do;
    diffusers' layout does not, and its pipelines encode an empty prompt instead."""
    position_table: PositionTable = "sincos"
    """"learned" with ``qk_norm`` is the paper's Emu (appendix C.2)."""
    position_scale: float = 1.0
    """Positions are divided by it: 2 in the 1024 px PixArt, so that its grid spans what 512 px did."""
    qk_norm: bool = False
    """Layer norm on queries and keys of self-attention, head by head."""
    mlp: MlpKind = "gelu"
    """Perceptron of the blocks: tanh GELU, or gated by a SiLU, as in the paper's Video DiT."""
    micro_conditions: bool = False
    """Height, width and aspect ratio of the image enter with the time (the 1024 px PixArt)."""
    pixels_per_latent: int = 8
    """Downscale of the VAE, for micro-conditions that are not given."""

    @property
    def has_null_caption(self) -> bool:
        """Whether the weights hold a caption of their own for the unconditional prediction."""
        return self.null_caption

    @property
    def computes_positions(self) -> bool:
        """Whether positions are a function of coordinates."""
        return self.position_table == "sincos"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position_table == "learned" and self.position_scale != 1:
            raise ValueError(f"learned positions have no scale: position_scale must be 1, got {self.position_scale}")
        if self.micro_conditions and self.hidden_size % 3:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 3 for micro_conditions")
        if self.micro_conditions and self.is_video:
            raise ValueError("micro_conditions are of images: set them to false for a model of clips")


@dataclass(frozen=True)
class WanConfig(CaptionedConfig):
    """Wan 2.1 (Wan Team 2025), whose text-to-video model of 1.3 B parameters the defaults are."""

    embedding_name: ClassVar[str] = "patch_embedding"
    unembedding_name: ClassVar[str] = "head.head"

    input_size: tuple[int, ...] = (21, 60, 104)
    in_channels: int = 16
    hidden_size: int = 1536
    depth: int = 30
    num_heads: int = 12
    mlp_ratio: float = 8960 / 1536
    learn_sigma: bool = False
    process: ProcessName = "flow"
    time_shift: float = 3.0
    """3 at 480 lines, 5 at 720 (Wan Team 2025)."""
    caption_length: int = 512
    """Captions are filled up to it, and what fills them is attended to like any token."""
    norm_eps: float = 1e-6
    """Of all norms."""

    @property
    def has_position_table(self) -> bool:
        """Rotary positions are no weights."""
        return False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.is_video:
            raise ValueError(f"a Wan takes clips: give input_size as (F, H, W), got {self.input_size}")
        if self.process != "flow":
            raise ValueError(f"a Wan predicts velocities: leave process at 'flow', got {self.process!r}")
        head_size = self.hidden_size // self.num_heads
        if head_size % 2 or head_size < 6:
            raise ValueError(
                f"heads of {head_size} channels ({self.hidden_size} / {self.num_heads}) have no place for rotary "
                "positions along three axes: give an even number from 6 on"
            )


AnyConfig: TypeAlias = DiTConfig | TextDiTConfig | WanConfig

_FAMILIES: dict[str, type[AnyConfig]] = {"DiT": DiTConfig, "TextDiT": TextDiTConfig, "Wan": WanConfig}


def family_of(config: TransformerConfig) -> str:
    """ "DiT", "TextDiT" or "Wan"."""
    return next(name for name, kind in _FAMILIES.items() if type(config) is kind)


def config_to_dict(config: TransformerConfig) -> dict[str, Any]:
    """Plain values only, for json and for checkpoints that are read without unpickling code."""
    return {"family": family_of(config), **_plain(asdict(config))}


def config_from_dict(values: Mapping[str, Any]) -> AnyConfig:
    """Inverse of :func:`config_to_dict`.

    Raises:
        ValueError: an unknown family or field, as of a checkpoint that a newer version wrote.
    """
    values = dict(values)
    family = values.pop("family", None)
    if family not in _FAMILIES:
        raise ValueError(f"the model family {family!r} is not known here; known are {', '.join(_FAMILIES)}")
    kind = _FAMILIES[family]
    _check_fields(kind, values)
    flex, unit = values.pop("flex", None), values.pop("position_unit", None)
    values["patch_size"] = PatchSize.parse(values["patch_size"])
    values["position_unit"] = None if unit is None else PatchSize.parse(unit)
    values["input_size"] = tuple(values["input_size"])
    return kind(**values, flex=None if flex is None else _flex_from_dict(flex))


def _flex_from_dict(values: Mapping[str, Any]) -> FlexConfig:
    values = dict(values)
    _check_fields(FlexConfig, values)
    underlying = values["underlying_patch_size"]
    values["underlying_patch_size"] = None if underlying is None else PatchSize.parse(underlying)
    values["weak_patch_sizes"] = tuple(PatchSize.parse(size) for size in values["weak_patch_sizes"])
    return FlexConfig(**values)


def _check_fields(kind: type[TransformerConfig] | type[FlexConfig], values: Mapping[str, Any]) -> None:
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; was this written by a newer version?")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"t", "h", "w"}:
            return PatchSize(**value).name
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

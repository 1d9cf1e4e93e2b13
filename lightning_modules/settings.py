"""The groups of options that the training modules share; each field shows in ``--help`` and in configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flexidit.config import CaptionedConfig, Positions, Recipe, TransformerConfig
from flexidit.diffusion.mmd import ChainPlan, Estimator
from lightning_modules.trained_state import base_source

if TYPE_CHECKING:
    from flexidit.models import FlexiTransformer

_COMPARED = (  # what decides which function the weights compute
    "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_classes", "caption_channels",
    "position_scale", "position_table", "qk_norm", "mlp", "micro_conditions", "process", "time_shift",
)  # fmt: skip


@dataclass
class TargetSettings:
    """The plain model that training starts from."""

    variant: str | None = None
    """Name such as "DiT-XL/2"; not needed when ``checkpoint`` is given."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Fields of the variant's config to replace: input_size, num_classes, depth, ...; class_dropout_prob of a
    checkpoint too."""
    checkpoint: str | None = None
    """Pre-trained weights: official .pt or .pth, diffusers directory or hub id, flexidit .safetensors, or a training
    .ckpt."""
    inflate_from: str | None = None
    """Pre-trained weights of an image model, in any of these forms, that a variant of clips starts with."""

    def build(self) -> FlexiTransformer:
        """The model, with the checkpoint's weights if one is named.

        Raises:
            ValueError: neither a variant nor a checkpoint, or a checkpoint of another model than the variant.
        """
        from flexidit.variants import create_model, variant_config

        if self.inflate_from is not None:
            return self._inflated(self.inflate_from)
        if self.variant is None and self.checkpoint is None:
            raise ValueError("no model was given: set target.variant, target.checkpoint, or both")
        if self.checkpoint is None:
            assert self.variant is not None
            return create_model(self.variant, **self.overrides)
        if self.variant is None:
            return self._load(None)
        return self._load(variant_config(self.variant, **self.overrides))

    def source_of_base(self, target: FlexiTransformer) -> str | None:
        """Where the base is that the built target was read from."""
        return base_source(target, self.checkpoint)

    def _load(self, expected: TransformerConfig | None) -> FlexiTransformer:
        from flexidit.checkpoint import load_checkpoint

        assert self.checkpoint is not None
        model = load_checkpoint(self.checkpoint, **_untold(expected))
        if expected is not None:
            check_config(model.config, expected, self.checkpoint)
        elif set(self.overrides) - {"class_dropout_prob"}:
            raise ValueError(
                f"target.overrides {', '.join(self.overrides)} change a variant: give target.variant too, or leave "
                "them out and take the model that target.checkpoint holds"
            )
        if "class_dropout_prob" in self.overrides:  # of training, not of the weights
            model.config = replace(model.config, class_dropout_prob=self.overrides["class_dropout_prob"])
        # Adapters take the type of what they are added to, and in half precision small updates would be lost. What is
        # computed in half is the trainer's precision.
        model.float().reset_derived()
        return model.train()

    def _inflated(self, source: str) -> FlexiTransformer:
        from flexidit.checkpoint import load_checkpoint
        from flexidit.inflation import inflate
        from flexidit.variants import variant_config

        if self.variant is None or self.checkpoint is not None:
            raise ValueError("target.inflate_from starts a variant of clips: give target.variant and no checkpoint")
        expected = variant_config(self.variant, **self.overrides)
        image = replace(expected, input_size=expected.input_size[-2:])
        model = inflate(load_checkpoint(source, **_untold(image)), expected.input_size)  # type: ignore[type-var]
        check_config(model.config, expected, source)
        model.config = replace(model.config, class_dropout_prob=expected.class_dropout_prob)
        return model.float().train()


def check_config(found: TransformerConfig, expected: TransformerConfig, source: str) -> None:
    """Refuse weights of another model than the one that was named.

    Raises:
        ValueError: naming the first field that differs.
    """
    if type(found) is not type(expected):
        kinds = (type(config).__name__.removesuffix("Config") for config in (found, expected))
        raise ValueError("{} holds a {}, but target.variant is a {}".format(source, *kinds))
    for name in _COMPARED:
        given, wanted = getattr(found, name, None), getattr(expected, name, None)
        if given != wanted:
            raise ValueError(f"{source} has {name}={given}, but target.variant and target.overrides say {wanted}")


def _untold(expected: TransformerConfig | None) -> dict[str, Any]:
    """What the shapes of weights do not tell, or not in all layouts; flexidit's own files need none of it."""
    if expected is None:
        return {}
    names = ["num_heads", "process", "time_shift"]
    if isinstance(expected, CaptionedConfig):
        names += ["input_size", "caption_length"]
    return {name: getattr(expected, name) for name in names}


@dataclass
class FlexSettings:
    """How the target becomes flexible; see ``flexidit.flexify``."""

    patch_sizes: list[int | str] = field(default_factory=lambda: [4])
    """Weak patch sizes to add, such as [4] or ["1x4x4", "1x8x8"]."""
    recipe: Recipe = "shared"
    """"shared": everything trains (section 3.1); "lora": frozen base, an adapter per size (section 3.2)."""
    underlying_patch_size: int | str | None = None
    """Size p' of the shared (de)embedding weights; null takes the largest patch size."""
    size_norms: bool = True
    """Weak sizes scale and shift the layer norms (shared recipe)."""
    positions: Positions = "coords"
    """Where a weak patch sits: at the coordinates of its centre ("coords"), of its first base patch ("corners", which
    diffusers' PixArt can express), or at its index ("grid")."""
    rank: int = 32
    """Rank of the adapters (lora recipe)."""
    alpha: float | None = None
    """The adapters' update is scaled by alpha / rank; null takes the rank."""


@dataclass
class OptimizerSettings:
    """AdamW and its learning rate over the steps. Defaults: Table 4 of the paper."""

    lr: float = 1e-4
    """Highest learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the gradient's running moments."""
    warmup_steps: int = 0
    """Steps of linear increase from zero."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a cosine to zero at the last step."""

    def build(
        self, parameters: Iterable[nn.Parameter], max_steps: float, fused: bool = True
    ) -> tuple[Optimizer, LambdaLR]:
        """Optimizer and a learning-rate schedule that steps once per optimizer step.

        Args:
            parameters: what to train.
            max_steps: length of the run, for the cosine.
            fused: use the fused kernel where the parameters are on a GPU.
        """
        parameters = list(parameters)
        fused = fused and all(p.is_cuda for p in parameters)
        optimizer = AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, betas=self.betas, fused=fused)
        return optimizer, LambdaLR(optimizer, self.factor(max_steps))

    def factor(self, max_steps: float) -> Callable[[int], float]:
        """Factor on ``lr`` at a step.

        Raises:
            ValueError: a cosine over an unknown number of steps.
        """
        if self.decay == "cosine" and not 0 < max_steps < math.inf:
            raise ValueError("optimizer.decay is 'cosine', which needs trainer.max_steps or trainer.max_epochs")

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
            if self.decay == "constant":
                return warm
            progress = min(1.0, step / max_steps)
            return warm * 0.5 * (1.0 + math.cos(math.pi * progress))

        return factor


ADAPTERS = FlexSettings(recipe="lora")
"""Of distillation: rank 32 (Table 5). As a default value, so that a config may change one of its fields alone."""
TABLE_5 = OptimizerSettings(lr=8e-4, weight_decay=1e-2)
"""Of distillation, likewise."""


@dataclass
class MatchingSettings:
    """The bootstrapped distribution-matching loss (paper, appendix B.1; ``flexidit.diffusion.mmd``)."""

    weight: float = 0.0
    """Factor of the loss; 0 turns it off. The paper gives none."""
    start_step: int = 0
    """First optimizer step with this loss."""
    every_n_steps: int = 1
    """Apply it at every n-th optimizer step only; each application costs a whole chain of forward passes."""
    chain: dict[str, int] = field(default_factory=dict)
    """Denoising steps per patch size, such as {4: 2, 2: 2}, taken weakest first; empty: two of each size."""
    num_timesteps: int = 250
    """Steps of the sampler whose errors are to be corrected (250 in the paper)."""
    backprop_steps: int | None = None
    """How many of the last steps carry gradients; null: those of the most powerful size (lora recipe: all)."""
    location: float = -1.0
    """Mean of logit(t1 / T): negative prefers times near the data, where the mismatch is larger."""
    scale: float = 1.0
    """Standard deviation of logit(t1 / T)."""
    estimator: Estimator = "biased"
    """Of the squared MMD."""

    def plan(self, patch_sizes: Iterable[Any]) -> ChainPlan:
        """The chain, over the model's own sizes if none is given."""
        chain: Mapping[Any, int] = self.chain or dict.fromkeys(patch_sizes, 2)
        return ChainPlan.from_steps(chain)

"""How fast training runs: samples per second, TFLOP/s and the share of the device's peak, without per-step syncs."""

from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

# Dense (no sparsity) bfloat16 tensor-core peaks in FLOP/s, multiply and add counted separately. Vendors' data sheets
# print the 2:4-sparse figure for many of these, twice as large. Sources: NVIDIA data sheets of A100 (2021), H100
# (2023), H200 (2024), B200 / DGX B200 (2024), L4, L40S (2023), A10 (2021), GA102 and Ada whitepapers (RTX; FP32
# accumulation); AMD CDNA 3 data sheets. First match wins, so the longer name stands before the shorter one.
PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("GH200", 989.4e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.4e12),
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bfloat16 peak in FLOP/s of a device as ``torch.cuda.get_device_name`` calls it; None if not listed.

    Example:
        >>> peak_bf16_flops("NVIDIA H100 80GB HBM3") / 1e12
        989.4
        >>> peak_bf16_flops("NVIDIA A100-SXM4-80GB") / 1e12
        312.0
    """
    words = device_name.lower().replace("-", " ").split()
    for name, flops in PEAK_BF16_FLOPS:
        wanted = name.lower().split()
        # Whole words: "A10" must not price an "A100".
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return flops
    return None


class Throughput(Callback):
    """Logs ``throughput/images_per_s`` (all devices), ``throughput/tflops_per_s`` (one device), ``throughput/mfu``.

    Of clips it is ``throughput/clips_per_s``.

    Steps alternate between patch sizes of very unequal cost, so FLOPs are summed step by step from
    ``pl_module.step_flops``: a plain int, the forward and backward FLOPs of one sample in the step that just ran, a
    teacher's forward included (2 per multiply-add). A module without it gets samples per second only. MFU divides by
    the dense bfloat16 peak, whatever the precision of the run.

    The device is synchronised once per window, never per step (Lightning's ``ThroughputMonitor`` does so at every
    batch). Validation is left out of the clock; loading data and writing checkpoints are in it.

    Args:
        every_n_steps: Optimizer steps per window.
        peak_flops: Peak of one device in FLOP/s, where the built-in table does not know it.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self.last: dict[str, float] = {}
        self._started: float | None = None
        self._elapsed = 0.0
        self._samples, self._sample = 0, "image"
        self._flops = 0
        self._window_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.peak_flops is None and pl_module.device.type == "cuda":
            self.peak_flops = peak_bf16_flops(torch.cuda.get_device_name(pl_module.device))
        self._window_step = trainer.global_step
        self._reset(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        num_samples = batch_size(batch)
        self._samples += num_samples
        self._sample = "clip" if samples_of(batch).ndim == 5 else "image"
        self._flops += num_samples * (getattr(pl_module, "step_flops", None) or 0)
        if trainer.global_step - self._window_step < self.every_n_steps:
            return
        self._stop(pl_module)
        self.last = self._metrics(trainer.world_size)
        # Straight to the loggers: ``self.log`` drops values off its own interval and copies each to the device.
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=trainer.global_step)
        self._window_step = trainer.global_step
        self._reset(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start(pl_module)

    def _metrics(self, world_size: int) -> dict[str, float]:
        metrics = {f"throughput/{self._sample}s_per_s": self._samples * world_size / self._elapsed}
        if self._flops:
            flops_per_s = self._flops / self._elapsed
            metrics["throughput/tflops_per_s"] = flops_per_s / 1e12
            if self.peak_flops:
                metrics["throughput/mfu"] = flops_per_s / self.peak_flops
        return metrics

    def _reset(self, pl_module: LightningModule) -> None:
        self._elapsed, self._samples, self._flops = 0.0, 0, 0
        self._start(pl_module)

    def _start(self, pl_module: LightningModule) -> None:
        _synchronize(pl_module.device)
        self._started = perf_counter()

    def _stop(self, pl_module: LightningModule) -> None:
        if self._started is not None:
            _synchronize(pl_module.device)
            self._elapsed += perf_counter() - self._started
            self._started = None


def batch_size(batch: Any) -> int:
    """Number of samples in a batch."""
    return int(samples_of(batch).shape[0])


def samples_of(batch: Any) -> torch.Tensor:
    """The samples of a batch: ``batch["x"]``, or the first element of a tuple, or the tensor itself."""
    if isinstance(batch, dict):
        return batch["x"]
    return batch[0] if isinstance(batch, (tuple, list)) else batch


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

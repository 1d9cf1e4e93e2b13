"""Communication of a training step against its compute, under DDP, FSDP2 and HSDP, in closed form: no GPU is needed.

    python benchmarks/scale.py
    python benchmarks/scale.py --recipe full --gpus 8 64 --inter 25 --json scale.json

One micro-batch with activation checkpointing, of the weak mode with the least work to hide behind. FLOPs are those of
``flexidit.flops``; bytes are those of the parameters; formulas are in docs/cluster.md. DDP's gradients are counted in
this one micro-batch; with accumulation they travel once in an optimizer step, while shards travel in every one.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from flexidit import create_model, flexify
from flexidit.flops import caption_flops, forward_flops

STRATEGIES = ("ddp", "fsdp", "hsdp")
RECIPES = ("lora", "full")
_GATHERED = {"float32": 4, "bfloat16": 2}
_GIB = 2**30


@dataclass(frozen=True)
class Cluster:
    """Links and speed; rates are bytes and FLOPs per second."""

    gpus_per_node: int = 8
    intra: float = 450e9
    """Of a GPU to its node, one way: NVLink of H100."""
    inter: float = 50e9
    """Of a GPU's own network card, one way: 400 Gb/s."""
    latency: float = 5e-6
    """Seconds of a hop inside a node."""
    inter_latency: float = 10e-6
    """Seconds of a hop between nodes."""
    efficiency: float = 0.8
    """Share of the rates that collectives reach."""
    flops: float = 400e12
    """That a GPU reaches, not its peak."""


@dataclass(frozen=True)
class Group:
    """Processes of a collective."""

    size: int
    bandwidth: float
    latency: float

    def gather(self, num_bytes: float) -> float:
        """Seconds of a ring's all-gather to so many bytes, or of a reduce-scatter from them."""
        hops = self.size - 1
        return hops * self.latency + self.sent(num_bytes) / self.bandwidth

    def all_reduce(self, num_bytes: float) -> float:
        """Seconds of a reduce-scatter and an all-gather."""
        return 2 * self.gather(num_bytes)

    def sent(self, num_bytes: float) -> float:
        """Bytes that each process sends in an all-gather or reduce-scatter."""
        return (self.size - 1) / self.size * num_bytes


@dataclass(frozen=True)
class Model:
    """Parameters and work of a micro-batch of one sample."""

    depth: int
    block: int
    """Parameters of a block that are gathered."""
    outside: int
    """Parameters outside of blocks."""
    trained_block: int
    """Parameters of a block that train."""
    trained_outside: int
    total: int
    passes: tuple[float, ...]
    """FLOPs of each pass through the blocks, in the order they run; the last is backward, with its recomputation."""

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return self.depth * self.trained_block + self.trained_outside


@dataclass(frozen=True)
class Step:
    """Seconds of one micro-batch on each GPU."""

    strategy: str
    gpus: int
    compute: float
    gather: float
    """All-gathers of weights."""
    reduce: float
    """Reduce-scatters and all-reduces of gradients."""
    exposed: float
    """Communication that no computation hides."""
    sent: float
    """Bytes that a GPU sends."""
    state: float
    """Bytes of weights, gradients, moments and average on a GPU."""

    @property
    def slower(self) -> float:
        """Time by that of the computation alone."""
        return 1 + self.exposed / self.compute


def groups_of(strategy: str, gpus: int, cluster: Cluster) -> tuple[Group, Group]:
    """(sharded over, replicated over): DDP shards over one, FSDP2 over all, HSDP over a node.

    A ring through whole nodes has all their cards; one with a single process of each node has one card.
    """
    per_node = min(gpus, cluster.gpus_per_node)
    nodes = gpus // per_node
    if nodes * per_node != gpus:
        raise ValueError(f"{gpus} GPUs do not fill nodes of {cluster.gpus_per_node}: give a multiple of it")
    none = Group(1, cluster.intra * cluster.efficiency, cluster.latency)
    node = Group(per_node, cluster.intra * cluster.efficiency, cluster.latency)
    across = Group(nodes, cluster.inter * cluster.efficiency, cluster.inter_latency)
    whole = min(cluster.intra, per_node * cluster.inter) * cluster.efficiency
    everyone = node if nodes == 1 else Group(gpus, whole, cluster.inter_latency)
    return {"ddp": (none, everyone), "fsdp": (everyone, none), "hsdp": (node, across)}[strategy]


@cache
def model_of(name: str, recipe: str, weak: tuple[str, ...], rank: int, batch_size: int = 1) -> Model:
    """Counted on the meta device; the pass of the cheapest weak mode beside the teacher's."""
    with torch.device("meta"):
        model = flexify(create_model(name), list(weak), "lora", rank=rank) if recipe == "lora" else create_model(name)
    block = model.blocks[0]
    counts = [sum(p.numel() for p in part.parameters()) for part in (block, model)]
    trained = [sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (block, model)]
    depth, captions = len(model.blocks), batch_size * caption_flops(model)
    costs = [batch_size * forward_flops(model, size, merged=False, captions="once") for size in weak]
    student = min(costs)
    teacher = batch_size * forward_flops(model, model.base_patch_size, captions="once")
    # Backward runs each block again, then costs as much once more, or twice where weights have gradients.
    passes = (teacher + captions, student, 2 * student) if recipe == "lora" else (student + captions, 3 * student)
    outside, trained_outside = counts[1] - depth * counts[0], trained[1] - depth * trained[0]
    return Model(depth, counts[0], outside, trained[0], trained_outside, counts[1], tuple(map(float, passes)))


def step_of(model: Model, strategy: str, gpus: int, cluster: Cluster, gather_dtype: str = "bfloat16") -> Step:
    """One micro-batch: each block's communication runs beside the computation of its neighbour."""
    shards, copies = groups_of(strategy, gpus, cluster)
    block_bytes, outside_bytes = model.block * _GATHERED[gather_dtype], model.outside * 4
    gather = shards.gather(block_bytes)
    reduce, reduce_outside = (
        shards.gather(4 * count) + copies.all_reduce(4 * count / shards.size)
        for count in (model.trained_block, model.trained_outside)
    )
    exposed = shards.gather(outside_bytes) + reduce_outside  # before the first block, and after the last one
    for number, flops in enumerate(model.passes):
        is_backward = number == len(model.passes) - 1
        communication = gather + (reduce if is_backward else 0)
        hidden = flops / cluster.flops / model.depth
        exposed += gather + (reduce if is_backward else 0)  # of the first block, of the last one
        exposed += (model.depth - 1) * max(0.0, communication - hidden)
    num_gathers = len(model.passes) * model.depth
    trained = 4 * model.trained
    sent = num_gathers * shards.sent(block_bytes) + shards.sent(outside_bytes + trained)
    frozen = 4 * (model.total - model.trained)
    return Step(
        strategy,
        gpus,
        compute=sum(model.passes) / cluster.flops,
        gather=num_gathers * gather + shards.gather(outside_bytes),
        reduce=model.depth * reduce + reduce_outside,
        exposed=exposed,
        sent=sent + 2 * copies.sent(trained / shards.size),
        state=(frozen + 5 * trained) / shards.size,
    )


def table(steps: Sequence[Step]) -> str:
    """One line a strategy and number of GPUs."""
    lines = ["strategy  GPUs  compute s  gather s  reduce s  exposed s  slower  GiB sent  GiB state"]
    for s in steps:
        lines.append(
            f"{s.strategy:<8} {s.gpus:>5} {s.compute:>10.2f} {s.gather:>9.3f} {s.reduce:>9.3f} {s.exposed:>10.3f} "
            f"{s.slower - 1:>7.1%} {s.sent / _GIB:>9.1f} {s.state / _GIB:>10.1f}"
        )
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="VideoDiT-4.9B")
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--weak", nargs="+", default=["1x4x4", "2x2x2"])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--gather", choices=_GATHERED, default="bfloat16")
    parser.add_argument("--batch-size", type=int, default=1, help="of one GPU")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--intra", type=float, default=450.0, help="GB/s of a GPU inside its node (NVLink of H100)")
    parser.add_argument("--inter", type=float, default=50.0, help="GB/s of a GPU's network card (400 Gb/s)")
    parser.add_argument("--latency", type=float, default=5.0, help="microseconds of a hop inside a node")
    parser.add_argument("--inter-latency", type=float, default=10.0, help="microseconds of a hop between nodes")
    parser.add_argument("--efficiency", type=float, default=0.8, help="share of the rates that collectives reach")
    parser.add_argument("--tflops", type=float, default=400.0, help="that a GPU reaches")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute and print."""
    args = parse_arguments(arguments)
    cluster = Cluster(
        args.gpus_per_node, args.intra * 1e9, args.inter * 1e9, args.latency * 1e-6, args.inter_latency * 1e-6,
        args.efficiency, args.tflops * 1e12,
    )  # fmt: skip
    record = {}
    for recipe in args.recipe:
        model = model_of(args.model, recipe, tuple(args.weak), args.rank, args.batch_size)
        steps = [step_of(model, kind, gpus, cluster, args.gather) for gpus in args.gpus for kind in STRATEGIES]
        record[recipe] = [{**asdict(step), "slower": step.slower} for step in steps]
        print(f"\n{args.model}, {recipe}: {model.total / 1e9:.2f} B parameters, {model.trained / 1e9:.2f} B train")
        print(table(steps))
    if args.json:
        args.json.write_text(json.dumps({"cluster": asdict(cluster), "steps": record}, indent=1))


if __name__ == "__main__":
    main()

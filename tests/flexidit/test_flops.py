import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flexidit import PatchSchedule, PatchSize, Sampler, create_model, flexify
from flexidit.config import DiTConfig, FlexConfig
from flexidit.flops import forward_costs, forward_flops, schedule_cost, schedule_for_budget, trace_cost
from flexidit.variants import known_variants

XL = DiTConfig()
WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)


def weak_first(powerful_steps: int, guide_powerful_steps: int | None = None) -> PatchSchedule:
    return PatchSchedule.weak_first(
        num_steps=250, powerful_steps=powerful_steps, guide_powerful_steps=guide_powerful_steps, weak=4, powerful=2
    )


def counted(model: torch.nn.Module, patch_size: PatchSize, size: tuple[int, int]) -> int:
    """FLOPs of one forward pass on the meta device, where the counter sees attention too."""
    x = torch.empty(1, model.in_channels, *size, device="meta")
    t = y = torch.zeros(1, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x, t, y, patch_size=patch_size)
    return counter.get_total_flops()


def test_published_cost_of_dit_xl_2():
    assert forward_flops(XL, 2) / 1e9 == pytest.approx(237.24, abs=0.005)
    assert forward_flops(XL, 4) / 1e9 == pytest.approx(58.09, abs=0.005)
    assert forward_flops(XL, 2) / 2e9 == pytest.approx(118.6, abs=0.1)  # GMACs, DiT paper
    assert forward_flops(XL, 4) / forward_flops(XL, 2) == pytest.approx(0.2445, abs=0.003)


@pytest.mark.parametrize(
    ("schedule", "relative"), [(weak_first(130), 0.64), (weak_first(70), 0.46), (weak_first(90, 50), 0.46)]
)
def test_class_conditional_rows_of_the_paper(schedule, relative):
    assert schedule_cost(XL, schedule).relative == pytest.approx(relative, abs=0.005)


def test_moving_powerful_steps_between_the_branches_costs_the_same():
    assert schedule_cost(XL, weak_first(90, 50)) == schedule_cost(XL, weak_first(70, 70))


@pytest.mark.parametrize("name", known_variants())
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_equals_the_counter_for_every_variant(name, learn_sigma):
    with torch.device("meta"):
        model = create_model(name, learn_sigma=learn_sigma)
    assert forward_flops(model, model.base_patch_size) == counted(model, model.base_patch_size, (32, 32))


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (20, 36), (17, 31)])
@pytest.mark.parametrize("patch_size", [4, 8, "1x2x4"])
def test_equals_the_counter_for_every_patch_size(name, size, patch_size):
    """A plain model with that base size does what a student does at it, its projected embedding being ready."""
    patch_size = PatchSize.parse(patch_size)
    with torch.device("meta"):
        model = create_model(name, patch_size=patch_size, depth=2)
    student = replace(model.config, patch_size=POWERFUL)
    assert forward_flops(student, patch_size, size) == counted(model, patch_size, size)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_equals_the_counter_with_adapters_beside_the_weights(patch_size):
    student = flexify(create_model("DiT-Tiny/2"), patch_sizes=[4, 8], recipe="lora", rank=3).to("meta")
    patch_size = PatchSize.parse(patch_size)
    assert forward_flops(student, patch_size, merged=False) == counted(student, patch_size, (32, 32))


def test_shared_recipe_costs_the_projection_of_its_weights_on_top():
    student = flexify(create_model("DiT-Tiny/2"), patch_sizes=[4, 8]).to("meta")
    for patch_size in student.patch_sizes:
        closed, real = forward_flops(student, patch_size), counted(student, patch_size, (32, 32))
        per_token_work = forward_flops(student, patch_size, size=(64, 64))  # a projection does not grow with T
        assert closed <= real and real - closed < per_token_work
        assert real - closed == counted(student, patch_size, (64, 64)) - per_token_work


def test_adapters_cost_only_unmerged_and_at_weak_sizes():
    lora = replace(XL, flex=FlexConfig("lora", (WEAK,), rank=32))
    assert forward_flops(lora, 4) == forward_flops(XL, 4)
    assert forward_flops(lora, 2, merged=False) == forward_flops(XL, 2)
    extra = forward_flops(lora, 4, merged=False) - forward_flops(XL, 4)
    width, in_plus_out = 1152, (1 + 3) + (1 + 1) + (1 + 4) + (4 + 1)
    assert extra == 28 * 2 * 64 * 32 * in_plus_out * width
    shared = replace(XL, flex=FlexConfig("shared", (WEAK,)))
    assert forward_flops(shared, 4, merged=False) == forward_flops(XL, 4)


def test_schedule_cost_is_the_sum_of_its_parts():
    cost = schedule_cost(XL, weak_first(90, 50))
    costs = {size: forward_flops(XL, size) for size in (POWERFUL, WEAK)}
    assert cost.by_size == {POWERFUL: 140 * costs[POWERFUL], WEAK: 360 * costs[WEAK]}
    assert cost.total == sum(cost.by_size.values()) and cost.powerful_total == 500 * costs[POWERFUL]


def test_cost_without_guidance_counts_the_conditional_branch_only():
    assert schedule_cost(XL, weak_first(90, 50), guided=False).total == schedule_cost(XL, weak_first(90)).total // 2
    assert schedule_cost(XL, weak_first(70), guided=False).relative == schedule_cost(XL, weak_first(70)).relative


@pytest.mark.parametrize("order", ["weak_first", "weak_last"])
def test_schedule_for_budget_meets_it_within_half_a_step(order):
    for budget in (0.3, 0.46, 0.6, 1.0):
        schedule = schedule_for_budget(XL, budget, 250, weak=4, order=order)
        assert schedule_cost(XL, schedule).relative == pytest.approx(budget, abs=0.5 * 0.756 / 250)
    assert str(schedule_for_budget(XL, 1.0, 50, weak=4)) == "1x2x2:50"


def test_schedule_for_budget_prefers_the_models_own_weakest_size():
    config = replace(XL, flex=FlexConfig("shared", (WEAK, PatchSize.parse(8))))
    assert PatchSize.parse(8) in schedule_for_budget(config, 0.5, 50).sizes
    assert list(forward_costs(config)) == [POWERFUL, WEAK, PatchSize.parse(8)]


@pytest.mark.parametrize(("cfg_scale", "guided"), [(4.0, True), (1.0, False)])
@pytest.mark.parametrize("text", ["4:3,2:2", "4:2,2:3/4:4,2:1", "2:5"])
def test_trace_adds_up_to_the_schedule(cfg_scale, guided, text):
    student = flexify(create_model("DiT-Tiny/2", num_classes=10, input_size=8), patch_sizes=[4])
    schedule = PatchSchedule.parse(text)
    sampler = Sampler(student, schedule=schedule, cfg_scale=cfg_scale)
    sampler([1, 2, 3, 4], batch_size=2)
    ran, planned = trace_cost(student, sampler.trace), schedule_cost(student, schedule, guided=sampler.is_guided)
    assert sampler.is_guided == guided
    assert ran.total == 4 * planned.total and ran.relative == pytest.approx(planned.relative)
    assert ran.by_size == {size: 4 * flops for size, flops in planned.by_size.items()}


def test_trace_prices_padding_and_another_latent_size():
    model = create_model("DiT-Tiny/2", num_classes=10, input_size=8)
    sampler = Sampler(model, schedule=PatchSchedule.constant(2, 3))
    sampler([1, 2, 3], batch_size=2, size=(12, 4))
    assert trace_cost(model, sampler.trace, size=(12, 4)).total == 3 * 4 * forward_flops(model, 2, size=(12, 4))


def test_refusals():
    with pytest.raises(ValueError, match="no patch size but 1x2x2"):
        schedule_for_budget(XL, 0.6, 250)
    with pytest.raises(ValueError, match="no FLOPs formula for str; known: DiTConfig"):
        forward_flops("DiT-XL/2", 2, size=(32, 32))


def test_pricing_a_config_does_not_import_torch():
    code = "import sys; from flexidit.flops import forward_flops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

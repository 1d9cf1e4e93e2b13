import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from flexidit import PatchSchedule, PatchSize, Sampler, create_model, flexify
from flexidit.conditions import Captions, Condition
from flexidit.config import CaptionedConfig, DiTConfig, FlexConfig, TransformerConfig
from flexidit.flops import (
    batch_flops,
    caption_flops,
    forward_costs,
    forward_flops,
    schedule_cost,
    schedule_for_budget,
    trace_cost,
)
from flexidit.merged import MergedModel
from flexidit.sampling.packing import PACKINGS
from flexidit.token_layout import Segment
from flexidit.variants import known_variants, variant_config

XL = DiTConfig()
PIXART = variant_config("PixArt-XL/2-256")
WEAK, POWERFUL = PatchSize.parse(4), PatchSize.parse(2)


def weak_first(powerful_steps: int, guide_powerful_steps: int | None = None) -> PatchSchedule:
    return PatchSchedule.weak_first(
        num_steps=250, powerful_steps=powerful_steps, guide_powerful_steps=guide_powerful_steps, weak=4, powerful=2
    )


def counted(model: torch.nn.Module, patch_size: PatchSize, size: tuple[int, int], prepared: bool = False) -> int:
    """FLOPs of one forward pass on the meta device, where the counter sees attention too."""
    x = torch.empty(1, model.in_channels, *size, device="meta")
    t, y = torch.zeros(1, dtype=torch.long, device="meta"), condition(model.config)
    with torch.no_grad():
        y = model.prepare(y) if prepared else y
        with FlopCounterMode(display=False) as counter:
            model.eval()(x, t, y, patch_size=patch_size)
    return counter.get_total_flops()


def condition(config: TransformerConfig) -> Condition:
    """One, on the meta device."""
    if not isinstance(config, CaptionedConfig):
        return torch.zeros(1, dtype=torch.long, device="meta")
    shape = (1, config.caption_length, config.caption_channels)
    return Captions(torch.empty(shape, device="meta"), torch.ones(shape[:2], dtype=torch.bool, device="meta"))


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
def test_equals_the_counter_for_every_variant(name):
    with torch.device("meta"):
        model = create_model(name)
    base, size = model.base_patch_size, model.input_size
    assert forward_flops(model, base) == counted(model, base, size)
    assert forward_flops(model, base, captions="once") == counted(model, base, size, prepared=True)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-XL/2", "PixArt-XL/2-1024", "Emu-1.7B"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (17, 31)])
@pytest.mark.parametrize("patch_size", [4, 8, "1x2x4"])
def test_equals_the_counter_for_every_patch_size(name, size, patch_size):
    """A plain model with that base size does what a student does at it, its projected embedding being ready."""
    patch_size = PatchSize.parse(patch_size)
    with torch.device("meta"):
        model = create_model(name, patch_size=patch_size, input_size=size, depth=1, learn_sigma=patch_size.volume > 8)
    student = replace(model.config, patch_size=POWERFUL)
    assert forward_flops(student, patch_size, size) == counted(model, patch_size, size)


@pytest.mark.parametrize("size", [(32, 48, 88), (21, 45, 80)])
@pytest.mark.parametrize("patch_size", ["2x2x2", "1x4x4", "2x4x4"])
def test_equals_the_counter_for_every_mode_of_the_video_dit(size, patch_size):
    patch_size = PatchSize.parse(patch_size)
    with torch.device("meta"):
        model = create_model("VideoDiT-4.9B", patch_size=patch_size, input_size=size, depth=1)
    student = replace(model.config, patch_size=POWERFUL)
    assert forward_flops(student, patch_size, size) == counted(model, patch_size, size)


@pytest.mark.parametrize("size", [(20, 60, 104), (21, 45, 81)])
@pytest.mark.parametrize("patch_size", ["1x2x2", "2x2x2", "1x4x4", "2x4x4"])
@pytest.mark.parametrize("prepared", [False, True])
def test_equals_the_counter_for_every_mode_of_wan(size, patch_size, prepared):
    patch_size = PatchSize.parse(patch_size)
    with torch.device("meta"):
        model = create_model("Wan-1.3B", patch_size=patch_size, input_size=size, depth=2)
    student = replace(model.config, patch_size=POWERFUL)
    work = "once" if prepared else "every_step"
    assert forward_flops(student, patch_size, size, captions=work) == counted(model, patch_size, size, prepared)


@pytest.mark.parametrize("size", [(4, 8, 8), (5, 7, 6)])
@pytest.mark.parametrize("patch_size", ["1x2x2", "2x2x2", "1x4x4", "2x4x4"])
def test_equals_the_counter_with_the_adapters_of_wan(size, patch_size):
    student = flexify(create_model("Wan-Tiny"), patch_sizes=["2x2x2", "1x4x4", "2x4x4"], recipe="lora", rank=3)
    merged, student, patch_size = MergedModel(student).to("meta"), student.to("meta"), PatchSize.parse(patch_size)
    assert forward_flops(student, patch_size, size, merged=False) == counted(student, patch_size, size)
    assert forward_flops(student, patch_size, size) == counted(merged, patch_size, size)


def test_the_spatial_mode_reaches_the_quarter_of_the_paper():
    """READING.md: 25.2 % "is reached with the spatial weak mode": about 217 of the 250 DDPM steps are weak."""
    video = variant_config("VideoDiT-4.9B")
    schedule = PatchSchedule.parse("1x4x4:216,1x2x2:34/1x4x4:217,1x2x2:33")
    assert schedule_cost(video, schedule).relative == pytest.approx(0.252, abs=0.0005)
    assert schedule_for_budget(video, 0.252, 250, weak="1x4x4").stages()[0][1] == 217
    temporal = forward_flops(video, "2x2x2") / forward_flops(video, 2)
    assert temporal > 0.34  # the temporal mode alone cannot reach it


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("name", ["DiT-Tiny/2", "TextDiT-Tiny/2"])
def test_equals_the_counter_with_adapters_beside_the_weights_and_in_them(name, patch_size):
    student = flexify(create_model(name), patch_sizes=[4, 8], recipe="lora", rank=3)
    merged, student, patch_size = MergedModel(student).to("meta"), student.to("meta"), PatchSize.parse(patch_size)
    assert forward_flops(student, patch_size, merged=False) == counted(student, patch_size, (32, 32))
    assert forward_flops(student, patch_size) == counted(merged, patch_size, (32, 32))


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


WEAK_STEPS = dict(zip(range(10, 90, 10), (92.9, 85.8, 78.8, 71.7, 64.6, 57.7, 50.5, 43.4), strict=True))


def weak_steps(num_steps: int, count: int) -> PatchSchedule:
    return PatchSchedule.weak_first(num_steps=num_steps, weak_steps=count, weak=4, powerful=2)


def test_cost_of_pixart_at_256_pixels():
    assert forward_flops(PIXART, 2) / 1e9 == pytest.approx(298.10, abs=0.01)
    assert forward_flops(PIXART, 4) / 1e9 == pytest.approx(87.44, abs=0.005)


@pytest.mark.parametrize("patch_size", [2, 4])
def test_equals_the_counter_over_diffusers_pixart(patch_size):
    options = {"sample_size": 32, "num_layers": 2, "out_channels": 8, "caption_channels": 4096}
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        peer = PixArtTransformer2DModel(**options, patch_size=patch_size, use_additional_conditions=False)
        nothing = {"resolution": None, "aspect_ratio": None}
        latents, texts, t = torch.empty(1, 4, 32, 32), torch.empty(1, 120, 4096), torch.zeros(1)
        peer(latents, encoder_hidden_states=texts, timestep=t, added_cond_kwargs=nothing)
    assert forward_flops(replace(PIXART, depth=2), patch_size) == counter.get_total_flops()


@pytest.mark.parametrize("rank", [None, 32])
def test_text_to_image_rows_of_the_paper(rank):
    """READING.md, for merged adapters and for ones of rank 32 that run beside the weights."""
    flex = None if rank is None else FlexConfig("lora", (WEAK,), rank=rank)
    config = replace(PIXART, flex=flex)
    for count, percent in WEAK_STEPS.items():
        cost = schedule_cost(config, weak_steps(100, count), merged=rank is None)
        assert 100 * cost.relative == pytest.approx(percent, abs=0.7 if rank else 0.15)


@pytest.mark.parametrize(("count", "percent"), [(10, 84.3), (20, 68.6), (30, 52.9)])
@pytest.mark.parametrize("guess", [{}, {"caption_channels": 1280}, {"in_channels": 4}, {"learn_sigma": True}])
def test_emu_rows_of_the_paper_whatever_it_leaves_open(count, percent, guess):
    config = variant_config("Emu-1.7B", **guess)
    assert 100 * schedule_cost(config, weak_steps(50, count)).relative == pytest.approx(percent, abs=0.05)


def test_what_captions_cost_once_is_what_a_forward_pass_saves():
    for config in (PIXART, variant_config("Emu-1.7B"), variant_config("PixArt-XL/2-1024")):
        for size in (2, 4):
            saved = forward_flops(config, size) - forward_flops(config, size, captions="once")
            assert saved == caption_flops(config) > 0
    assert forward_flops(XL, 2, captions="once") == forward_flops(XL, 2) and caption_flops(XL) == 0


def test_share_of_captions_in_a_forward_pass_of_pixart():
    """Keys and values alone are 6 and 20 % (TRAPS, measured with a counter); with the projection a little more."""
    length, width = 120, 1152
    keys_values = 28 * 2 * length * width * 2 * width
    shares = [work / forward_flops(PIXART, size) for work in (keys_values, caption_flops(PIXART)) for size in (2, 4)]
    assert shares == pytest.approx([0.060, 0.204, 0.065, 0.221], abs=0.0005)


def test_counting_captions_once_counts_one_for_each_branch():
    schedule = weak_steps(20, 12)
    every, once = (schedule_cost(PIXART, schedule, captions=way) for way in ("every_step", "once"))
    captions = caption_flops(PIXART)
    assert once.captions == 2 * captions and every.captions == 0
    assert every.total - once.total == (2 * 20 - 2) * captions
    assert every.powerful_total - once.powerful_total == (2 * 20 - 2) * captions
    unguided = schedule_cost(PIXART, schedule, guided=False, captions="once")
    assert unguided.captions == captions and 2 * unguided.total == once.total
    by_weaker_size = schedule_cost(PIXART, PatchSchedule.parse("2:3/4:3"), captions="once")
    assert by_weaker_size.captions == captions  # no unconditional prediction


@pytest.mark.parametrize("captions", ["every_step", "once"])
def test_budgets_are_met_in_either_way_of_counting(captions):
    for budget in (0.5, 0.75, 1.0):
        schedule = schedule_for_budget(PIXART, budget, 100, weak=4, captions=captions)
        assert schedule_cost(PIXART, schedule, captions=captions).relative == pytest.approx(budget, abs=0.004)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("text", ["4:3,2:2", "4:1,2:3/4:3,2:1", "2:2/4:2"])
def test_trace_of_captions_adds_up_to_the_schedule(text, cache):
    model = flexify(create_model("TextDiT-Tiny/2", input_size=8), patch_sizes=[4])
    schedule = PatchSchedule.parse(text)
    sampler = Sampler(model, schedule=schedule, cfg_scale=4.0, cache_captions=cache)
    sampler(Captions(torch.randn(4, 16, 64), torch.ones(4, 16, dtype=torch.bool)), batch_size=2)
    every, once = (trace_cost(model, sampler.trace, captions=way) for way in ("every_step", "once"))
    planned = schedule_cost(model, schedule)
    assert (every.total, every.powerful_total) == (4 * planned.total, 4 * planned.powerful_total)
    as_ran = schedule_cost(model, schedule, captions="once") if cache else planned
    assert (once.total, once.powerful_total) == (4 * as_ran.total, 4 * as_ran.powerful_total)
    assert once.captions == sampler.num_prepared * caption_flops(model)


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_captions_are_priced_as_the_counter_counts(name):
    student = flexify(create_model("TextDiT-Tiny/2", input_size=8), patch_sizes=[4], recipe="lora", rank=2)
    sizes, student = list(student.patch_sizes), student.to("meta")
    layout = PACKINGS[name]([Segment(size, 3, size.num_tokens((8, 8))) for size in sizes])
    x, t = torch.empty(3, 4, 8, 8, device="meta"), torch.zeros(3, device="meta")
    y = condition(student.config)[torch.zeros(3, dtype=torch.long, device="meta")]
    for captions, told in (("every_step", y), ("once", student.prepare(y))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            student([x, x], [t, t], [told, told], patch_size=sizes, packing=PACKINGS[name])
        works = [(size, 3, layout.work(i)) for i, size in enumerate(sizes)]
        closed = sum(batch_flops(student, *work, merged=False, captions=captions) for work in works)
        assert counter.get_total_flops() == closed


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
    with pytest.raises(ValueError, match="no FLOPs formula for str; known: DiTConfig, TextDiTConfig"):
        forward_flops("DiT-XL/2", 2, size=(32, 32))
    for call in (lambda: forward_costs("DiT-XL/2"), lambda: schedule_for_budget("DiT-XL/2", 0.6, 250)):
        with pytest.raises(ValueError, match="no FLOPs formula for str"):
            call()
    for price, args in ((forward_flops, (XL, 2)), (schedule_cost, (XL, weak_first(3))), (trace_cost, (XL, []))):
        with pytest.raises(ValueError, match="captions='twice' is not known: give 'every_step' or 'once'"):
            price(*args, captions="twice")


def test_pricing_a_config_does_not_import_torch():
    code = "import sys; from flexidit.flops import forward_flops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

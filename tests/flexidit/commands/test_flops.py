import argparse
import json
import subprocess
import sys

import pytest

from flexidit.commands import flops


def run(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    parser = argparse.ArgumentParser()
    flops.configure(parser)
    assert flops.run(parser.parse_args(line.split())) == 0
    return capsys.readouterr().out


def report(line: str, capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(run(f"{line} --json", capsys))


def test_numbers_of_the_paper(capsys):
    out = report("--model DiT-XL/2 --weak 4 --steps 250 --powerful-steps 70", capsys)
    assert (out["powerful_gflops"], out["weak_gflops"], out["relative"]) == (237.24, 58.09, 0.456)
    assert out["schedule"] == "1x4x4:180,1x2x2:70" and out["steps"] == 250 and out["guided"]
    assert [row["gmacs"] for row in out["forward"]] == [118.62, 29.04]


def test_examples_of_the_help_run(capsys):
    examples = [line.strip() for line in flops.EXAMPLE.splitlines()]
    assert all(example.startswith("flexidit flops ") for example in examples)
    reports = [report(example.removeprefix("flexidit flops "), capsys) for example in examples]
    costs = [entry["relative"] for out in reports for entry in out.get("schedules", [out])]
    assert costs[:2] == [0.456, pytest.approx(0.698, abs=1e-3)] and len(costs) == 4


def test_guiding_branch_of_its_own(capsys):
    out = report("--powerful-steps 90 --guide-powerful-steps 50", capsys)
    assert out["relative"] == 0.456 and "/" in out["schedule"]


def test_schedule_and_budget_lead_to_the_same_cost(capsys):
    by_budget = report("--budget 0.6", capsys)
    by_stages = report(f"--schedule {by_budget['schedule']}", capsys)
    assert by_budget == by_stages and by_budget["relative"] == pytest.approx(0.6, abs=0.002)


def test_without_a_schedule_everything_is_powerful(capsys):
    assert report("--model DiT-S/2", capsys)["relative"] == 1.0


def test_unguided_costs_half(capsys):
    guided, unguided = report("--powerful-steps 70", capsys), report("--powerful-steps 70 --unguided", capsys)
    assert unguided["total_tflops"] == pytest.approx(guided["total_tflops"] / 2, abs=0.001)
    assert not unguided["guided"]


def test_unmerged_adapters_cost_a_little(capsys):
    merged = report("--recipe lora --powerful-steps 70", capsys)
    unmerged = report("--recipe lora --rank 32 --unmerged --powerful-steps 70", capsys)
    assert merged["weak_gflops"] == 58.09 < unmerged["weak_gflops"] < 1.1 * 58.09
    assert merged["powerful_gflops"] == unmerged["powerful_gflops"]


def test_latent_sizes(capsys):
    assert report("--input-size 64", capsys)["input_size"] == [64, 64]
    assert report("--input-size 32x64", capsys)["forward"][0]["tokens"] == 512
    clips = report("--model VideoDiT-4.9B --weak 2x4x4 --size 21x45x80", capsys)
    assert [row["tokens"] for row in clips["forward"]] == [21 * 23 * 40, 11 * 12 * 20]


def test_each_weak_mode_has_a_schedule_of_its_own(capsys):
    line = "--model VideoDiT-4.9B --steps 50 --powerful-steps 20 --recipe lora --unmerged"
    both = report(f"{line} --weak 1x4x4,2x2x2", capsys)
    assert [row["tokens"] for row in both["forward"]] == [33792, 16896, 8448]
    for mode, entry in zip(("1x4x4", "2x2x2"), both["schedules"], strict=True):
        assert {**report(f"{line} --weak {mode}", capsys), **entry} == report(f"{line} --weak {mode}", capsys)
    assert run(f"{line} --weak 1x4x4,2x2x2", capsys).count("TFLOPs per sample") == 2


def test_the_cost_of_a_mixture_is_that_of_its_stages(capsys):
    line = "--model VideoDiT-4.9B --weak 1x4x4,2x2x2,2x4x4 --unguided"
    out = report(f"{line} --schedule 1x4x4:12,2x2x2:6,1x2x2:6", capsys)
    gflops = {row["patch_size"]: row["gflops"] for row in out["forward"]}
    assert list(gflops) == ["1x2x2", "2x2x2", "1x4x4", "2x4x4"] and "schedules" not in out
    total = 12 * gflops["1x4x4"] + 6 * gflops["2x2x2"] + 6 * gflops["1x2x2"]
    assert out["total_tflops"] == pytest.approx(total / 1000, rel=1e-5)


def test_three_sizes_have_a_row_each(capsys):
    assert [row["patch_size"] for row in report("--schedule 8:5,4:5,2:5", capsys)["forward"]] == [
        "1x2x2",
        "1x4x4",
        "1x8x8",
    ]


def test_table_says_the_same(capsys):
    out = run("--powerful-steps 70", capsys)
    for text in ("237.24", "58.09", "118.62", "24.48 %", "1x4x4:180,1x2x2:70", "45.6 %", "with guidance"):
        assert text in out


def test_text_to_image_at_every_step_as_in_the_paper(capsys):
    line = "--model PixArt-XL/2-256 --steps 100 --powerful-steps 50"
    out = report(line, capsys)
    assert (out["powerful_gflops"], out["weak_gflops"], out["relative"]) == (298.11, 87.44, 0.647)
    assert (out["captions"], out["caption_tokens"], out["caption_gflops"]) == ("every_step", 120, 19.29)
    assert "captions of 120 tokens (19.29 GFLOPs) counted in every forward pass, as in the paper" in run(line, capsys)


def test_text_to_image_with_captions_once(capsys):
    line = "--model PixArt-XL/2-256 --steps 100 --powerful-steps 50"
    every, once = report(line, capsys), report(f"{line} --captions once", capsys)
    assert once["captions"] == "once" and once["relative"] == 0.622 < every["relative"]
    assert once["powerful_gflops"] == pytest.approx(every["powerful_gflops"] - 19.29, abs=0.02)
    saved = (2 * 100 - 2) * 19.287e-3
    assert once["total_tflops"] == pytest.approx(every["total_tflops"] - saved, abs=0.01)
    assert "counted once for each branch, as it is run" in run(f"{line} --captions once", capsys)


def test_budgets_are_met_as_captions_are_counted(capsys):
    for way in ("every-step", "once"):
        out = report(f"--model PixArt-XL/2-256 --steps 100 --budget 0.6 --captions {way}", capsys)
        assert out["relative"] == pytest.approx(0.6, abs=0.004)


def test_length_of_captions(capsys):
    short = report("--model PixArt-XL/2-256 --caption-tokens 20", capsys)
    assert short["caption_tokens"] == 20 and short["powerful_gflops"] < 298


def test_models_of_labels_say_nothing_of_captions(capsys):
    assert not any("caption" in name for name in report("--model DiT-S/2", capsys))
    assert "caption" not in run("--model DiT-S/2", capsys)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--captions once", "takes labels"),
        ("--caption-tokens 20", "takes labels"),
        ("--model PixArt-XL/2-256 --caption-tokens 0", "at least 1"),
        ("--model DiT-XXL/2", "unknown model 'DiT-XXL/2'"),
        ("--weak four", "not a patch size"),
        ("--weak 2 --powerful-steps 70", "must be larger"),
        ("--input-size 32x", "not a latent size"),
        ("--input-size 8x8x8", "not a latent size"),
        ("--model VideoDiT-4.9B --size 48x88", "give FxHxW"),
        ("--weak 4,1x4x4", "names a patch size twice"),
        ("--budget 0.1", "0.245 .all weak. to 1"),
        ("--powerful-steps 300", "do not fit"),
        ("--guide-powerful-steps 50", "needs --powerful-steps"),
        ("--powerful-steps 50 --guide-powerful-steps 70", "never more powerful"),
        ("--schedule 4:10,2:10 --steps 250", "leave --steps out"),
        ("--unmerged", "add --recipe lora"),
        ("--recipe lora --rank 0", "at least 1"),
    ],
)
def test_refusals(line, sentence, capsys):
    with pytest.raises(ValueError, match=sentence):
        run(line, capsys)


def test_exit_code_and_sentence_of_the_command():
    command = [sys.executable, "-m", "flexidit.cli", "flops", "--budget", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "out of reach" in done.stderr


def test_no_torch_is_imported():
    code = (
        "import sys; from flexidit.cli import main; main(['flops', '--powerful-steps', '70']); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

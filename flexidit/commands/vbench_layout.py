"""Clips as VBench expects them, and the script that has them scored.

VBench (Huang et al. 2023) finds the clips of a prompt by their names, ``{prompt}-{index}.mp4``, five a prompt, in one
folder that holds nothing else. It has no rule for prompts that are no file name; its own have none of that kind. Here
these lose what does not fit, and ``prompts.json`` says what each file was asked for, which VBench reads in its mode for
prompts of one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_style",
    "overall_consistency",
)
"""Those that the paper reports the average of (appendix C.2)."""
CLIPS_PER_PROMPT = 5
SCRIPT_NAME, PROMPTS_NAME = "vbench.sh", "prompts.json"

_MOST_BYTES = 255  # of a file name, on the file systems of Linux, macOS and Windows
_ROOM = len("-9999.mp4")

_SCRIPT = """\
#!/usr/bin/env bash
# Scores these clips with VBench on a CUDA device, in the dimensions that the FlexiDiT paper averages.
# VBench needs an environment of its own: it asks for transformers 4.33.2, timm up to 1.0.12 and numpy below 2.
#   python3.10 -m venv vbench-env && vbench-env/bin/pip install torch torchvision vbench
#   PATH="$PWD/vbench-env/bin:$PATH" bash vbench.sh
# VBench's own prompts are scored by its standard protocol, each in its dimensions; others in all of them. To choose:
#   bash vbench.sh vbench_standard|custom_input
set -euo pipefail
cd "$(dirname "$0")"
mode=${1:-$(python - <<'EOF'
import importlib.util, json, pathlib
suite = pathlib.Path(importlib.util.find_spec("vbench").submodule_search_locations[0]) / "VBench_full_info.json"
known = {entry["prompt_en"] for entry in json.loads(suite.read_text(encoding="utf-8"))}
asked = set(json.loads(pathlib.Path("@PROMPTS@").read_text(encoding="utf-8")).values())
print("vbench_standard" if asked <= known else "custom_input")
EOF
)}
for clips in @FOLDERS@; do
  for dimension in @DIMENSIONS@; do
    path=$clips options=()
    if [ "$mode" = custom_input ]; then
      options=(--prompt_file @PROMPTS@)
    elif [ "$dimension" = temporal_flickering ]; then  # of clips that do not move, as VBench has it
      vbench static_filter --videos_path "$clips" --result_path "scores/$clips/static"
      path=scores/$clips/static/filtered_videos
    fi
    vbench evaluate --videos_path "$path" --dimension "$dimension" --mode "$mode" \\
      --output_path "scores/$clips" ${options[@]+"${options[@]}"}
  done
done
"""


def file_names(prompts: Sequence[str]) -> list[str]:
    """What the names of the files of each prompt begin with, before ``-{index}.mp4``: itself, wherever that can be.

    Example:
        >>> file_names(["a red fox in snow", "black/white film"])
        ['a red fox in snow', 'black_white film (1)']
    """
    return [_file_name(prompt, place) for place, prompt in enumerate(prompts)]


def _file_name(prompt: str, place: int) -> str:
    name = "".join("_" if letter in "/\\" or ord(letter) < 32 else letter for letter in prompt)
    if name == prompt and len(name.encode()) + _ROOM <= _MOST_BYTES:
        return name
    mark = f" ({place})"
    return name.encode()[: _MOST_BYTES - _ROOM - len(mark)].decode(errors="ignore") + mark


def script(folders: Iterable[str]) -> str:
    """A shell script for the folder above these, one for each budget."""
    filled = {"@FOLDERS@": " ".join(folders), "@DIMENSIONS@": " ".join(DIMENSIONS), "@PROMPTS@": PROMPTS_NAME}
    text = _SCRIPT
    for place, value in filled.items():
        text = text.replace(place, value)
    return text

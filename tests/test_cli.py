from __future__ import annotations

import subprocess
import sys
import time

import pytest

from flexidit.cli import COMMANDS, TRAINING_COMMANDS, main


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in TRAINING_COMMANDS])
def test_every_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    assert f"flexidit {name}" in capsys.readouterr().out.split("example:")[1]


def test_unknown_commands_are_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fitt"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no command 'fitt'" in err
    assert "fit," in err


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from flexidit.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'lightning', 'numpy', 'diffusers', 'peft') if m in sys.modules])"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", time.perf_counter() - start

"""The README does what it says."""

import re
from pathlib import Path

import torch

from simclr_kernels import NegativeQueue, fused_nt_xent

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_as_written(capsys):
    example, _ = EXAMPLES
    assert len([line for line in example.splitlines() if line]) <= 20
    exec(compile(example, "README.md", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_the_lines_on_the_loss_run_as_written():
    _, example = EXAMPLES
    queue = NegativeQueue(16, 8)
    queue.push(torch.randn(4, 8))
    names = {"fused_nt_xent": fused_nt_xent, "z": torch.randn(6, 8), "tau": 0.1, "queue": queue}
    exec(compile(example, "README.md", "exec"), names | {"group": None})


def test_files_it_links_to_exist():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_commands_it_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", README):
        assert f"\n{target}:" in makefile
    commands = (ROOT / "simclr_kernels" / "cli.py").read_text()
    for command in re.findall(r"simclr-kernels (\w+)", README):
        assert f'add_subcommand("{command}"' in commands

"""The README does what it says."""

import re
from pathlib import Path

import torch

import simclr_kernels
from simclr_kernels import NegativeQueue, fused_nt_xent
from simclr_kernels.data import shapes10
from simclr_kernels.pipelines.fused_views import FusedViews

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_as_written(capsys):
    example = EXAMPLES[0]
    assert len([line for line in example.splitlines() if line]) <= 20
    exec(compile(example, "README.md", "exec"), {})
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_the_lines_on_the_views_run_as_written():
    source = shapes10("test")
    images = torch.from_numpy(source.images[:4])
    names = {"images": images, "index": torch.arange(4), "sizes": torch.tensor([[24, 24]] * 4)}
    names |= {"source": source} | vars(simclr_kernels) | {"FusedViews": FusedViews, "torch": torch}
    exec(compile(EXAMPLES[1], "README.md", "exec"), names)
    assert names["views"].shape == (8, 3, 224, 224)
    assert torch.equal(names["view"], names["views"][:4].half())
    assert len(names["pipeline"]) == 15


def test_the_lines_on_the_loss_run_as_written():
    example = EXAMPLES[2]
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
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert f"\n{target}:" in makefile
    commands = (ROOT / "simclr_kernels" / "cli.py").read_text()
    for command in re.findall(r"simclr-kernels (\w+)", README):
        assert f'add_subcommand("{command}"' in commands

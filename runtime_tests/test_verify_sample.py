"""`l4q-export --verify sample`: the modules it picks, that only they are decoded, and that damage to them is seen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from exporters.card import CARD_NAME
from exporters.cli import command
from exporters.driver import EXPORTERS, export, get_exporter
from exporters.manifest import read_manifest
from exporters.plan import ExportOptions
from exporters.verify import SAMPLE_STEP, compare_bits, sample_modules, verify
from l4q.checkpoint import L4QCheckpoint
from l4q.config import QuantConfig
from runtime_tests.tiny_llama import tiny_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> L4QCheckpoint:
    """Three layers on a symmetric grid, in sizes that every format holds."""
    return tiny_checkpoint(tmp_path_factory.mktemp("sampled"), QuantConfig(group_size=32), num_hidden_layers=3)


def other_code(checkpoint: L4QCheckpoint, module: str, folder: Path) -> L4QCheckpoint:
    """A copy of the checkpoint in which the first code of a module is another one."""
    shutil.copytree(checkpoint.path, folder)
    (shard,) = folder.glob("*.safetensors")
    with safe_open(shard, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(shard)
    tensors[f"{module}.codes"][0, 0] ^= 1
    save_file(tensors, shard, metadata)
    return L4QCheckpoint.open(folder)


class Deep:
    """Two kinds of modules in 20 layers, one of them on another grid in the last layer."""

    modules = tuple(f"layers.{n}.{leaf}" for n in range(20) for leaf in ("q_proj", "o_proj"))

    def info(self, module: str) -> Any:
        """Layout of one module."""
        odd = module == "layers.19.o_proj"
        return _Info(group_size=32 if odd else 64)


class _Info:
    out_features = in_features = 64
    bits, zero_point, k_grid = 4, "none", None

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size


def test_the_sample_has_first_last_and_every_eighth_of_each_kind() -> None:
    """Kinds are names, shapes and grids; the order is the model's and nothing is drawn by chance."""
    assert SAMPLE_STEP == 8
    chosen = sample_modules(Deep())  # type: ignore[arg-type]  # only the layout is asked for
    assert chosen == (
        "layers.0.q_proj", "layers.0.o_proj", "layers.8.q_proj", "layers.8.o_proj", "layers.16.q_proj",
        "layers.16.o_proj", "layers.18.o_proj", "layers.19.q_proj", "layers.19.o_proj",
    )  # fmt: skip


@pytest.mark.parametrize("name", EXPORTERS)
def test_only_the_sample_is_decoded_and_damage_to_it_is_seen(
    name: str, checkpoint: L4QCheckpoint, tmp_path: Path
) -> None:
    """Every format decodes the sampled modules alone; another code in one of them is seen, elsewhere not."""
    sample = sample_modules(checkpoint)
    assert 0 < len(sample) < len(checkpoint.modules)
    folder = export(checkpoint, name, tmp_path / name, check="sample").folder
    assert sorted(module for module, _ in get_exporter(name).read_back(folder, sample)) == sorted(sample)
    report = verify(checkpoint, get_exporter(name), folder, sample=sample)
    assert (report.passed, report.exact, report.checked) == (True, len(sample), len(sample))
    assert report.total == len(checkpoint.modules)
    unseen = next(module for module in checkpoint.modules if module not in sample)
    for module, passes in ((sample[-1], False), (unseen, True)):
        damaged = other_code(checkpoint, module, tmp_path / f"{name} {passes}")
        assert verify(damaged, get_exporter(name), folder, sample=sample).passed is passes
        assert not verify(damaged, get_exporter(name), folder).passed


def test_a_sampled_module_that_is_missing_is_named(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """A module that should have been decoded and is not in the file fails the sample."""
    folder = export(checkpoint, "compressed-tensors", tmp_path / "out", check="none").folder
    sample = sample_modules(checkpoint)
    (shard,) = folder.glob("*.safetensors")
    tensors = {name: t for name, t in load_file(shard).items() if not name.startswith(f"{sample[0]}.")}
    save_file(tensors, shard, metadata={"format": "pt"})
    report = verify(checkpoint, get_exporter("compressed-tensors"), folder, sample=sample)
    assert not report.passed
    assert report.differing == (f"{sample[0]}: missing from the export",)


def test_dense_fields_are_sampled_in_the_other_process(dense_judge: Path, tmp_path: Path) -> None:
    """The reader in its own process decodes the sampled modules only."""
    source = tiny_checkpoint(tmp_path, QuantConfig(group_size=32, bits=3), num_hidden_layers=1)
    options = ExportOptions(container_bits=3)
    folder = export(source, "compressed-tensors", tmp_path / "out", options, check="none").folder
    found = dict(get_exporter("compressed-tensors").read_back(folder, source.modules[:2]))
    assert sorted(found) == sorted(source.modules[:2])
    first, second = (source.quantized(module).dequantize() for module in source.modules[:2])
    assert compare_bits(found[source.modules[0]], first) is None
    assert compare_bits(found[source.modules[1]], second[::-1]) is not None


@pytest.mark.parametrize(
    ("words", "checked", "card"),
    [
        ([], "all", "{total} of {total} quantized tensors decode"),
        (["--verify", "full"], "all", "{total} of {total} quantized tensors decode"),
        (["--verify", "sample"], "sample", "{sample} of {sample} sampled quantized tensors decode"),
        (["--verify", "none"], None, "Not verified"),
        (["--no-verify"], None, "Not verified"),
    ],
)
def test_card_and_manifest_say_how_many_were_checked(
    words: list[str], checked: str | None, card: str, checkpoint: L4QCheckpoint, tmp_path: Path
) -> None:
    """The command's choices end in the summary, l4q_export.json and the model card."""
    arguments = [str(checkpoint.path), "--to", "compressed-tensors", "--out", str(tmp_path), *words]
    result = CliRunner().invoke(command, [*arguments, "--json"], catch_exceptions=False)
    total, sample = len(checkpoint.modules), len(sample_modules(checkpoint))
    counts = {"all": total, "sample": sample}
    expected = {"exact": counts[checked], "checked": counts[checked], "total": total} if checked else None
    assert json.loads(result.stdout)["compressed-tensors"]["verified"] == expected
    folder = tmp_path / "compressed-tensors"
    assert (read_manifest(folder) or {})["verified"] == expected
    assert card.format(total=total, sample=sample) in (folder / CARD_NAME).read_text(encoding="utf-8")


def test_the_table_says_that_it_was_a_sample(checkpoint: L4QCheckpoint, tmp_path: Path) -> None:
    """People see the counts too; an unknown choice is refused with the ones that exist."""
    arguments = [str(checkpoint.path), "--to", "gptq", "--out", str(tmp_path), "--verify"]
    shown = CliRunner().invoke(command, [*arguments, "sample"], env={"COLUMNS": "200"}, catch_exceptions=False)
    sample = len(sample_modules(checkpoint))
    assert f"{sample} of {sample} sampled, of {len(checkpoint.modules)}" in shown.stdout
    refused = CliRunner().invoke(command, [*arguments, "some"])
    assert refused.exit_code == 2
    assert "'full', 'sample', 'none'" in refused.output

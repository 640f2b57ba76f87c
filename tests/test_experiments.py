"""Every experiment and every sweep of the repository loads, and makes a training step at reduced width."""

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from madformer.config import freeze, load_experiment
from madformer.sweep.loading import load_sweep
from madformer.sweep.plan import print_plan
from madformer.training.module import LitMADFormer
from tests.conftest import ROOT

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.yaml"))
SWEEPS = sorted((ROOT / "sweeps").rglob("*.yaml"))
NARROW = ["model.width=16", "model.num_heads=2", "model.ffn_width=24", "model.depth=3", "model.diffusion_depth=2"]
NARROW += [
    "model.unet.channels=[8,16]",
    "model.unet.layers=[1,1]",
    "model.unet.attention=[false,true]",
    "model.unet.num_heads=2",
]
SHORT_TEXT = ["model.text.vocab_size=11", "model.text.length=3", "model.text.pad_token_id=0", "model.text.dropout=0.5"]


class RandomLatents(Dataset):
    """Batches in the form of `LatentDataModule`, with prompts where the model takes them."""

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return 4

    def __getitem__(self, index):
        model = self.config.model
        shape = (model.latent_channels, model.latent_size, model.latent_size)
        item = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(index)), "keys": torch.tensor([0, index])}
        return item if model.text is None else {**item, "text": torch.randint(1, 11, (3,))}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_makes_a_step(path):
    narrow = NARROW + (SHORT_TEXT if load_experiment(path).model.text else [])
    config = load_experiment(path, [*narrow, "evaluation.nfe=[10]", "optimizer.warmup_fraction=0"])
    module = LitMADFormer(config)
    before = module.model.boi_SD.clone()
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(RandomLatents(config), batch_size=2))
    assert trainer.global_step == 1 and not torch.equal(before, module.model.boi_SD)
    assert trainer.callback_metrics["loss"].isfinite()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_is_planned(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(ROOT)
    sweep = load_sweep(path, [f"output_dir={tmp_path}"])
    print_plan(sweep)
    printed = capsys.readouterr().out
    assert sweep.name in printed and "-hours" in printed
    for cell in sweep.cells():
        assert cell.name in printed and cell.run == tmp_path / sweep.name / cell.name


def test_the_paper_s_tables_share_their_models(monkeypatch, tmp_path):
    """The default is in every table, and Figure 4's models are Table 1's."""
    monkeypatch.chdir(ROOT)
    cells = {path.stem: load_sweep(path, [f"output_dir={tmp_path}"]).cells() for path in (ROOT / "sweeps/paper").glob("*.yaml")}
    for data, distinct in (("ffhq1024", 15), ("imagenet256", 16)):
        tables = [{cell.config_hash for cell in cells[name]} for name in cells if name.startswith(data)]
        assert len(tables) == 8 and len(set.intersection(*tables)) == 1 and len(set.union(*tables)) == distinct
    first, figure = cells["ffhq1024_table1_depth"], cells["ffhq1024_figure4_nfe"]
    assert [cell.config_hash for cell in first] == [cell.config_hash for cell in figure]
    assert [cell.budgets for cell in first] == [(21 + 7 * 250,), (14 + 14 * 250,), (7 + 21 * 250,), (28 * 250,)]
    # what is trained for one table is there for the next
    freeze(first[1].config, first[1].run)
    again = load_sweep(ROOT / "sweeps/paper/ffhq1024_table2_length.yaml", [f"output_dir={tmp_path}"]).cells()
    assert [cell.run == first[1].run for cell in again] == [False, True, False]


def test_dropped_prompts_are_keyed_too():
    """Text of a dropped prompt is padding, and which ones are dropped depends on step and place alone."""
    config = load_experiment(ROOT / "experiments/imagenet256.yaml", [*NARROW, *SHORT_TEXT, "evaluation.nfe=[10]"])
    module = LitMADFormer(config)
    text = torch.randint(1, 11, (64, 3))
    batch = {"latents": torch.randn(64, 4, 32, 32), "text": text}
    batch["keys"] = torch.stack([torch.full((64,), 7), torch.arange(64)], dim=1)
    whole = module.on_before_batch_transfer(batch, 0)
    dropped = (whole["text"] == 0).all(dim=1)
    assert 16 < int(dropped.sum()) < 48 and torch.equal(whole["text"][~dropped], text[~dropped])
    half = module.on_before_batch_transfer({name: tensor[32:] for name, tensor in batch.items()}, 0)
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name][32:]), name

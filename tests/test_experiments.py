"""Every experiment and every sweep of the repository loads, is planned, and trains and samples at reduced width."""

import contextlib
import math
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from madformer.config import ExperimentConfig, ModelConfig, TextConfig, config_hash, load_experiment, write_config
from madformer.config.identity import trained_fields
from madformer.diffusion.samplers import build_sampler
from madformer.model.generation import generate
from madformer.runs.exchange import CLASS_NUMBERS
from madformer.sweep.adaptive import wanted_cells
from madformer.sweep.cells import sweep_cells
from madformer.sweep.load_sweep import load_sweep
from madformer.sweep.search import sample_cells
from madformer.sweep.status import print_plan
from madformer.training.module import LitMADFormer
from tests.conftest import HUB, ROOT

EXPERIMENTS = sorted((ROOT / "experiments").rglob("*.yaml"))
SWEEPS = sorted((ROOT / "sweeps").rglob("*.yaml"))
SAMPLED = 4
"""Cells of each search that are tried."""

DEPTH = 4
TEXT = TextConfig(vocab_size=11, length=3, pad_token_id=0, dropout=0.5)


def narrow(config):
    """The experiment with a small model: as many blocks, the same part of its layers iterates, every switch as it was."""
    model, levels = config.model, range(1, len(config.model.unet.channels) + 1)
    unet = replace(
        model.unet,
        channels=tuple(8 * level for level in levels),
        layers=(1,) * len(levels),
        groups=4,
        num_heads=2,
        time_embed_dim=8,
    )
    model = replace(
        model,
        latent_size=min(32, model.latent_size),
        depth=DEPTH,
        diffusion_depth=math.ceil(DEPTH * model.diffusion_depth / model.depth),
        elastic_depths=tuple(math.ceil(DEPTH * depth / model.depth) for depth in model.elastic_depths),
        width=16,
        num_heads=2,
        num_kv_heads=None if model.num_kv_heads is None else math.ceil(2 * model.num_kv_heads / model.num_heads),
        ffn_width=24,
        unet=unet,
        text=model.text and replace(TEXT, final_norm=model.text.final_norm),
    )
    optimizer = replace(config.optimizer, warmup_fraction=0, warmup_steps=None)
    evaluation, data = replace(config.evaluation, nfe=(10,)), replace(config.data, tokenizer="of eleven words")
    return replace(config, model=model, optimizer=optimizer, evaluation=evaluation, data=data)


def trained(config):
    """What decides about a training step on given latents: not seeds, nor where they are from."""
    return config.model, config.diffusion, config.loss, config.optimizer


def load(path):
    with contextlib.chdir(ROOT):
        return load_sweep(path, [f"output_dir={HUB.name}/runs"])  # where no run is known


def cells_of(sweep):
    return sweep_cells(sweep) if sweep.search is None else sample_cells(sweep, SAMPLED)


LOADED = {path: load(path) for path in SWEEPS}
CELLS = {path: cells_of(sweep) for path, sweep in LOADED.items()}


def distinct_models():
    """The narrow models of all files, each once, named by where it is first: the paper's tables share most of theirs."""
    models = {}
    for path in EXPERIMENTS:
        config = narrow(load_experiment(path))
        models.setdefault(trained(config), pytest.param(config, id=path.stem))
    for path, cells in CELLS.items():
        for cell in cells:
            config = narrow(cell.config)
            models.setdefault(trained(config), pytest.param(config, id=f"{path.stem}:{cell.name}"))
    return models.values()


class RandomLatents(Dataset):
    """Batches in the form of `LatentDataModule`, with prompts where the model takes them."""

    def __init__(self, config):
        self.config = config

    def __len__(self):
        return 2

    def __getitem__(self, index):
        model = self.config.model
        shape = (model.latent_channels, model.latent_size, model.latent_size)
        item = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(index)), "keys": torch.tensor([0, index])}
        return item if model.text is None else {**item, "text": torch.randint(1, TEXT.vocab_size, (TEXT.length,))}


@pytest.mark.parametrize("config", distinct_models())
def test_model_makes_a_step_and_samples(config):
    module = LitMADFormer(config)
    before = [parameter.clone() for parameter in module.model.parameters()]
    trainer = pl.Trainer(fast_dev_run=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module, DataLoader(RandomLatents(config), batch_size=2))
    assert trainer.global_step == 1 and module.last_loss.isfinite()
    for (name, parameter), was in zip(module.model.named_parameters(), before, strict=True):
        assert parameter.isfinite().all() and torch.equal(parameter, was) != parameter.requires_grad, name
    sampler = build_sampler(config.diffusion, config.model.prediction_type, config.evaluation.sampler)
    with module.sampling_weights() as model:
        sampled_BLCYX = generate(model, sampler, 1, seeds=[0])
    assert sampled_BLCYX.isfinite().all() and sampled_BLCYX.shape[1] == config.model.ar_length


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweep_is_planned(path, capsys):
    sweep = LOADED[path]
    print_plan(sweep, memory_gib=80)
    printed = capsys.readouterr().out
    assert sweep.name in printed and "-hours" in printed and "refused" not in printed and "may not fit" not in printed
    for cell in wanted_cells(sweep):
        assert cell.name in printed and cell.run == sweep.folder / cell.name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_narrow_models_differ_as_the_sweep_s_do(path):
    configs = [cell.config for cell in CELLS[path]]
    assert configs and len(set(map(trained, configs))) == len({trained(narrow(config)) for config in configs})


def test_the_paper_s_tables_share_their_models(tmp_path):
    """The default is in every table, and Figure 4's models are Table 1's."""
    others = ("ffhq1024_elastic", "ffhq1024_paper_or_code")
    cells = {path.stem: cells for path, cells in CELLS.items() if path.parent.name == "paper" and path.stem not in others}
    for data, distinct in (("ffhq1024", 15), ("imagenet256", 16)):
        tables = [{cell.config_hash for cell in cells[name]} for name in cells if name.startswith(data)]
        assert len(tables) == 8 and len(set.intersection(*tables)) == 1 and len(set.union(*tables)) == distinct
    first, figure = cells["ffhq1024_table1_depth"], cells["ffhq1024_figure4_nfe"]
    assert [cell.config_hash for cell in first] == [cell.config_hash for cell in figure]
    assert [cell.budgets for cell in first] == [(21 + 7 * 250,), (14 + 14 * 250,), (7 + 21 * 250,), (28 * 250,)]
    # what is trained for one table is there for the next
    run = tmp_path / "table1" / first[1].name
    write_config(replace(first[1].config, name=run.name, output_dir=str(run.parent)), run)
    with contextlib.chdir(ROOT):
        again = sweep_cells(load_sweep(ROOT / "sweeps/paper/ffhq1024_table2_length.yaml", [f"output_dir={tmp_path}"]))
    assert [cell.run == run for cell in again] == [False, True, False]


def test_paper_and_code_differ_in_one_thing_at_a_time():
    """The first cell is the paper's run, the last one the code's, and each between changes one field, once."""
    cells = CELLS[ROOT / "sweeps/paper/ffhq1024_paper_or_code.yaml"]
    paper, *single, code = [trained_fields(cell.config) for cell in cells]
    changes = [{name: value for name, value in fields.items() if paper.get(name) != value} for fields in single]
    assert all(len(change) == 1 for change in changes)
    assert {name: value for change in changes for name, value in change.items()}.items() <= code.items()
    released = load_experiment(ROOT / "experiments/released/ffhq1024.yaml")
    assert cells[-1].config_hash == config_hash(released) and cells[0].config_hash == config_hash(
        load_experiment(ROOT / "experiments/ffhq1024.yaml")
    )


def test_released_imagenet_is_what_an_import_is_trained_with():
    """`madformer import` freezes the released habits; the experiment trains them."""
    trained = trained_fields(load_experiment(ROOT / "experiments/released/imagenet256.yaml"))
    imported = trained_fields(replace(ExperimentConfig(), model=ModelConfig(text=TextConfig()), data=CLASS_NUMBERS))
    prompts = ("class_names", "prompts", "tokenizer", "bos", "padding_side", "crop", "batch_size")
    assert {name: trained[f"data.{name}"] for name in prompts} == {name: imported[f"data.{name}"] for name in prompts}


def test_dropped_prompts_are_keyed_too():
    """Text of a dropped prompt is padding, and which ones are dropped depends on step and place alone."""
    config = narrow(load_experiment(ROOT / "experiments/imagenet256.yaml"))
    module, model = LitMADFormer(config), config.model
    text = torch.randint(1, TEXT.vocab_size, (64, TEXT.length))
    batch = {"latents": torch.randn(64, model.latent_channels, model.latent_size, model.latent_size), "text": text}
    batch["keys"] = torch.stack([torch.full((64,), 7), torch.arange(64)], dim=1)
    whole = module.on_before_batch_transfer(batch, 0)
    dropped = (whole["text"] == 0).all(dim=1)
    assert 16 < int(dropped.sum()) < 48 and torch.equal(whole["text"][~dropped], text[~dropped])
    half = module.on_before_batch_transfer({name: tensor[32:] for name, tensor in batch.items()}, 0)
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name][32:]), name

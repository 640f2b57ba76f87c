"""The command line: one function per command, nothing heavy imported before its arguments are checked."""

from __future__ import annotations

import errno
import io
import itertools
import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from madformer import __version__
from madformer.config import load_experiment, load_run
from madformer.config.evaluation import SPACINGS, TRIES, SamplerName
from madformer.config.validation import typed_path
from madformer.errors import DataError, InputError, PlainLines, describe, explain, printable, show_defect

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)
sweep_app = typer.Typer(help="Grids of runs.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(sweep_app, name="sweep")

_SAMPLERS = ", ".join(get_args(SamplerName))
_TUNED = "Sample each budget as madformer tune chose."
_DEPTH = "Diffusion depths of an elastic run, of model.elastic_depths; default: model.diffusion_depth"
_INTERVAL = "Timesteps at which guidance acts, such as 100/900, or all"

Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Fields that replace the file's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", parser=typed_path)]
SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml")]


def _examples(*commands: str) -> str:
    r"""The end of a command's help. `\b` keeps its lines apart."""
    return "\n".join(["\b", "Examples:", *(f"  madformer {command}" for command in commands)])


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"madformer {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A laboratory for mixed autoregressive/diffusion image generators."""


@app.command(epilog=_examples("train experiments/digits.yaml name=first model.diffusion_depth=2", "train --resume runs/first"))
def train(
    arguments: Annotated[list[str] | None, typer.Argument(metavar="EXPERIMENT.yaml [KEY=VALUE]...")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with a run.", parser=typed_path)] = None,
    branch: Annotated[
        Path | None,
        typer.Option(metavar="RUN", parser=typed_path, help="Begin at a checkpoint of RUN; only trainer.max_steps may differ."),
    ] = None,
) -> None:
    """Train a run, or go on with it from its newest intact checkpoint."""
    given = arguments or []
    if resume is not None and branch is not None:
        raise InputError("--resume goes on with a run, --branch begins one: give one of them")
    if resume is not None:
        config = load_run(resume, given)
    elif given:
        config = load_experiment(given[0], given[1:])
    else:
        raise InputError("nothing to train: give an EXPERIMENT.yaml, or --resume RUN")
    from madformer.config.identity import require_no_other_run

    require_no_other_run(config, but="data.source" if resume is not None else "")  # the checkpoint knows the images
    if branch is not None:
        from madformer.runs.checkpoints import require_trunk

        require_trunk(config, branch)
    from madformer.training.train import train as train_run

    train_run(config, branch=branch)


@app.command(epilog=_examples("evaluate runs/first --nfe 16,64", "evaluate runs/first --steps 5,29 --sampler ddim,unipc"))
def evaluate(
    run: RunFolder,
    overrides: Overrides = None,
    nfe: Annotated[str | None, typer.Option(help="Budgets, such as 280,700; default: the experiment's.")] = None,
    steps: Annotated[str | None, typer.Option(help="Denoising steps per block instead of budgets, such as 50,250.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Images sampled for each number; default: the experiment's.")] = None,
    checkpoints: Annotated[str, typer.Option(help="newest, last5 (each, and their mean), or a step.")] = "newest",
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    diffusion_depth: Annotated[str | None, typer.Option(help=f"{_DEPTH}; several with commas.")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"{_SAMPLERS}; several with commas.")] = None,
    spacing: Annotated[str | None, typer.Option(help=f"{SPACINGS}; several with commas.")] = None,
    guidance: Annotated[str | None, typer.Option(help="Scales of classifier-free guidance, such as 1,1.5.")] = None,
    guidance_interval: Annotated[str | None, typer.Option(help=f"{_INTERVAL}; several with commas.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of sampling, such as 0,1,2: each, and their mean.")] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help=_TUNED)] = False,
    reference: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Statistics of the reference images, one for each network.", parser=typed_path),
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices that share the work; default: all GPUs.")] = None,
    diagnostics: Annotated[bool, typer.Option("--diagnostics", help="Also losses on held-out images, and why.")] = False,
) -> None:
    """Measure samples of a run. A point that is recorded already is not computed again."""
    from madformer.evaluation.request import parse_request

    options = {"references": tuple(reference or ()), "devices": devices, "diagnostics": diagnostics}
    axes = {"diffusion_depth": diffusion_depth, "sampler": sampler, "spacing": spacing, "guidance": guidance}
    axes |= {"guidance_interval": guidance_interval, "seed": seeds}
    config = load_run(run, overrides or [])
    request = parse_request(config, nfe, steps, num_samples, checkpoints, weights, axes, tuned, **options)
    from madformer.evaluation.evaluate import evaluate

    with _going_on_later():
        evaluate(request)


@app.command(epilog=_examples("tune runs/first --nfe 16,64", "tune sweeps/quickstart.yaml"))
def tune(
    sources: Annotated[list[str], typer.Argument(metavar="RUN... [KEY=VALUE]... | SWEEP.yaml [KEY=VALUE]...")],
    nfe: Annotated[str | None, typer.Option(help="Budgets, such as 16,64; default: the experiment's, or the sweep's.")] = None,
    tries: Annotated[int | None, typer.Option(min=1, help=f"Samplings to try at each budget; default: {TRIES}.")] = None,
    diffusion_depth: Annotated[str | None, typer.Option(help=f"{_DEPTH}, each with choices of its own.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="When to stop trying; what was found is confirmed.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Devices that share the work; default: all GPUs.")] = None,
) -> None:
    """Find the best sampler, spacing and guidance for each budget. Several runs share one choice."""
    names = list(itertools.takewhile(lambda word: "=" not in word, sources))
    overrides = sources[len(names) :]
    if not names:
        raise InputError(f"{sources[0]}: name a run or a SWEEP.yaml before overrides")
    from madformer.evaluation.measurement import parse_integers

    budgets = parse_integers("--nfe", nfe) if nfe is not None else ()
    depths = parse_integers("--diffusion-depth", diffusion_depth) if diffusion_depth is not None else (None,)
    if Path(names[0]).suffix in (".yaml", ".yml"):
        from madformer.sweep.adaptive import trained_designs
        from madformer.sweep.load_sweep import load_sweep

        sweep = load_sweep(Path(names[0]), overrides)
        tries = tries or sweep.evaluate.tries
        designs = [(cells, depth) for cells in trained_designs(sweep) for depth in cells[0].depths]
        chosen = [pair for pair in designs if diffusion_depth is None or pair[1] in (None, *depths)]
        work = [(tuple(cell.config for cell in cells), budgets or cells[0].budgets_at(depth), depth) for cells, depth in chosen]
    else:
        configs = tuple(load_run(name, overrides) for name in names)
        work = [(configs, budgets or configs[0].evaluation.nfe, depth) for depth in depths]
    from madformer.evaluation.tune import TuningRequest, tune

    with _going_on_later():
        for runs, nfes, depth in work:
            tune(TuningRequest(runs, nfes, tries or TRIES, minutes, devices, depth))


@app.command(epilog=_examples("sample runs/first --num 64 --nfe 64 --out samples"))
def sample(
    run: RunFolder,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the images.", parser=typed_path)],
    num: Annotated[int, typer.Option(min=1, help="Images.")] = 16,
    steps: Annotated[int | None, typer.Option(help="Denoising steps per block.")] = None,
    nfe: Annotated[int | None, typer.Option(help="A budget, instead of steps.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i depends on (seed, i) alone.")] = 0,
    classes: Annotated[str | None, typer.Option(metavar="207,360", help="Classes, in turn; default: all of them.")] = None,
    prompt: Annotated[str | None, typer.Option(help="A text for all images, instead of classes.")] = None,
    diffusion_depth: Annotated[int | None, typer.Option(help="Diffusion depth of an elastic run.")] = None,
    sampler: Annotated[str | None, typer.Option(help=f"One of {_SAMPLERS}.")] = None,
    spacing: Annotated[str | None, typer.Option(help=f"One of {SPACINGS}.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 1: none.")] = None,
    guidance_interval: Annotated[str | None, typer.Option(help=f"{_INTERVAL}.")] = None,
    tuned: Annotated[bool, typer.Option("--tuned", help=_TUNED)] = False,
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    devices: Annotated[int | None, typer.Option(min=1, help="Devices that share the work; default: all GPUs.")] = None,
) -> None:
    """Write sampled images into a folder, and a grid of them. Images that are there already stay as they are."""
    from madformer.evaluation.request import parse_sampling

    axes = {"diffusion_depth": diffusion_depth, "sampler": sampler, "spacing": spacing, "guidance": guidance}
    axes |= {"guidance_interval": guidance_interval, "seed": seed}
    options = {"classes": classes, "prompt": prompt, "devices": devices}
    request = parse_sampling(load_run(run), num, steps, nfe, weights, axes, tuned, **options)
    from madformer.evaluation.write_samples import write_samples

    with _going_on_later():
        write_samples(request, out)


@app.command(epilog=_examples("encode experiments/folder.yaml data.source=photos data.latents=latents/photos"))
def encode(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")],
    overrides: Overrides = None,
    only_verify: Annotated[bool, typer.Option("--verify", help="Only compare what is there with its checksums.")] = False,
) -> None:
    """Turn images into shards of latents (data.latents). Run again, it goes on, and makes torn shards again."""
    config = load_experiment(experiment, overrides or [])
    if only_verify and config.data.latents is not None:
        verify([Path(config.data.latents)])
    from madformer.data.encode import encode as encode_images

    with _going_on_later():
        encode_images(config)


@app.command(epilog=_examples("verify runs", "verify latents/photos references runs/first"))
def verify(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs, latents, references, sweeps, or folders of them.", parser=typed_path),
    ],
) -> None:
    """Compare what lies on the disk with its checksums. Nothing is written; the exit status is 1 if something is broken."""
    from madformer.report.verify import verify as verify_paths

    raise typer.Exit(0 if verify_paths(paths) else 1)


@app.command("import", epilog=_examples("import JunhaoC/MADFormer-FFHQ --out runs/theirs"))
def import_(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="FILE", help="A released checkpoint, a hub's owner/name, or an exported file.")
    ],
    out: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the new run.", parser=typed_path)],
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
    overrides: Overrides = None,
) -> None:
    """Make a run from other weights. evaluate, sample, tune and report accept it."""
    from madformer.runs.exchange import import_run

    import_run(checkpoint, out, weights, overrides or [])


@app.command(epilog=_examples("export runs/first --out first.safetensors"))
def export(
    run: RunFolder,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help=".safetensors, with a .yaml beside it; or .pt, as released.", parser=typed_path)
    ],
    weights: Annotated[str, typer.Option(help="ema or model.")] = "ema",
) -> None:
    """Write a run's weights to one file: safetensors, or the released code's."""
    from madformer.runs.exchange import export_run

    export_run(run, out, weights)


@app.command(epilog=_examples("report sweeps/quickstart.yaml --samples 12", "report runs/first runs/second"))
def report(
    sources: Annotated[list[str], typer.Argument(metavar="SWEEP.yaml [KEY=VALUE]... | RUN...")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the report; default: the sweep's, or report/.", parser=typed_path),
    ] = None,
    metric: Annotated[str | None, typer.Option(help="Such as fid; default: the first one that all runs have.")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="The figure's panels, of nfe, flops, seconds, seconds_per_block, memory; default: the first three."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Images of each to show, sampled now from the same noise.")] = 0,
    reference: Annotated[
        str | None, typer.Option(metavar="LABEL", help="The design that others are compared with; default: the first.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare designs: which is the best for which budget. Tables and curves of a sweep, or of runs, beside the paper's."""
    from madformer.report.write import report_on

    with _going_on_later():
        report_on(sources, out, metric, against, samples, reference, as_json)


@app.command(epilog=_examples("config experiments/digits.yaml model.diffusion_depth=2 > mine.yaml"))
def config(experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT.yaml")], overrides: Overrides = None) -> None:
    """Print every field of an experiment and where it comes from. The YAML can be saved and trained."""
    from madformer.config.identity import annotated_yaml
    from madformer.config.loading import field_origins

    loaded = load_experiment(experiment, overrides or [])
    print(annotated_yaml(loaded, field_origins(experiment, overrides or [])), end="")


@app.command(epilog=_examples("diff runs/first runs/second", "diff runs/first experiments/digits.yaml"))
def diff(
    one: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or an experiment's YAML file.")],
    other: Annotated[str, typer.Argument(metavar="RUN", help="The same.")],
) -> None:
    """Print the fields in which two runs or experiments differ. The last line says whether their weights do."""
    from madformer.config.identity import compare
    from madformer.progress import TextTable, print_table

    rows, line = compare(one, other)
    if rows:
        print_table(TextTable("what differs", ("field", one, other), frozenset(("field", one, other)), [*rows]), [line])
    else:
        print(f"nothing differs\n{line}")


@app.command(epilog=_examples("show runs/first"))
def show(run: RunFolder) -> None:
    """Print what a run is, how far it is, and its newest numbers. It may be in training."""
    from madformer.config.identity import design_lines, run_hash
    from madformer.evaluation.record import newest_values
    from madformer.progress import print_table, training_state

    config = load_run(run)
    print("\n".join([f"{config.run_dir}, configuration hash {run_hash(config)}", *design_lines(config)]))
    state, values = training_state(config), newest_values(config.run_dir)
    if values.rows:
        print_table(values, [state])
    else:
        print(f"no evaluations; make them: madformer evaluate {config.run_dir}\n{state}")


@sweep_app.command(
    "run", epilog=_examples("sweep run sweeps/quickstart.yaml", "sweep run sweeps/quickstart.yaml 'seeds=[0,1,2]'")
)
def sweep_run(
    sweep: SweepFile,
    overrides: Overrides = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what has failed.")] = False,
) -> None:
    """Train and evaluate every cell of a sweep. Run again, it does only the rest."""
    from madformer.sweep.load_sweep import load_sweep

    spec = load_sweep(sweep, overrides or [])
    from madformer.evaluation.tensorboard import board_address
    from madformer.sweep.cells import sweep_cells
    from madformer.sweep.driver import run_sweep

    status = run_sweep(spec, retry_failed)
    if status == 0:
        print(printable(f"table and curves: madformer report {shlex.join([str(sweep), *(overrides or [])])}"))
        in_sweep_folder = all(cell.run.parent == spec.folder for cell in sweep_cells(spec))
        print(f"in TensorBoard:   tensorboard --logdir {spec.folder if in_sweep_folder else spec.folder.parent}")
        print(f"                  {board_address(tagFilter='_vs_', runColorGroup='regex:(.*)-s')}")
    raise typer.Exit(status)


@sweep_app.command("plan", epilog=_examples("sweep plan sweeps/quickstart.yaml", "sweep plan sweeps/paper/*.yaml --memory 80"))
def sweep_plan(
    sweeps: Annotated[list[str], typer.Argument(metavar="SWEEP.yaml... [KEY=VALUE]...", help="Of several, what all cost.")],
    tflops: Annotated[float | None, typer.Option(min=1e-3, help="Peak of a device in TFLOP/s; default: an A100's.")] = None,
    mfu: Annotated[float | None, typer.Option(min=1e-3, max=1, help="Part of the peak that is reached.")] = None,
    memory: Annotated[float | None, typer.Option(min=1e-3, help="Of a device, in GiB: say which cells do not fit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep would run and what it costs, by measured rates if there are any, else by FLOPs."""
    files = list(itertools.takewhile(lambda word: "=" not in word, sweeps))
    if not files:
        raise InputError(f"{sweeps[0]}: name a SWEEP.yaml before overrides")
    from madformer.sweep.load_sweep import load_sweep
    from madformer.sweep.status import print_json, print_plan, print_suite

    loaded = [load_sweep(Path(file), sweeps[len(files) :]) for file in files]
    if as_json:
        if len(loaded) > 1 or memory is not None:
            raise InputError("--json: one sweep at a time, and without --memory")
        print_json(loaded[0], tflops, mfu)
    elif len(loaded) == 1:
        print_plan(loaded[0], tflops, mfu, memory)
    else:
        print_suite(loaded, tflops, mfu, memory)


@sweep_app.command("status", epilog=_examples("sweep status sweeps/quickstart.yaml"))
def sweep_status(sweep: SweepFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show how far every cell of a sweep is, live on a terminal."""
    from madformer.sweep.load_sweep import load_sweep
    from madformer.sweep.status import print_json, print_status

    (print_json if as_json else print_status)(load_sweep(sweep, overrides or []))


def main() -> None:
    """Run the command line; exit with 0 when done, 2 for the user's mistake, 130 when interrupted, 1 for all else."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character must not end a command
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PlainLines("%(levelname)s: %(message)s"))
    sys.excepthook = show_defect
    try:
        app()
    except DataError as error:
        _fail(f"bad data: {error}", 2)
    except (InputError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(describe(error), 2)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP):
            _fail(describe(error), 2)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(f"{describe(error)}; what was complete is kept, the same command goes on", 1)
    except UnicodeEncodeError as error:
        _fail(f"{error.object!r}: no path of this locale ({error.encoding}): name it otherwise, or set LC_ALL=C.UTF-8", 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except RuntimeError as error:
        _fail(*explain(error))


@contextmanager
def _going_on_later() -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; what was complete is kept, the same command goes on", 130)


def _fail(message: Any, status: int) -> None:
    print(f"madformer: {printable(str(message))}", file=sys.stderr)
    sys.exit(status)

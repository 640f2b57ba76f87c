"""Diagnostics in a report: loss, denoising error, exposure gap, variance explained by the condition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from madformer.evaluation.record import newest_diagnostics
from madformer.report.formatting import distinct, incomparable, natural, show, table, trained_for
from madformer.report.points import Curve
from madformer.report.statistics import Estimate, over_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from madformer.report.figures import Look

_CONDITIONS = ("weights", "images", "held_out", "source", "nfe", "sampler", "timesteps")
"""Keys that must agree for diagnostics of runs to be comparable."""


@dataclass(frozen=True)
class Diagnosis:
    """The newest diagnostics of one label's runs."""

    label: str
    timesteps: tuple[int, ...]
    """Timesteps of the noise schedule, rising."""
    loss_by_timestep: tuple[Estimate, ...]
    """Mean loss over blocks, at each of `timesteps`."""
    loss_by_block: tuple[Estimate, ...]
    """Mean loss over timesteps, for each block in the order of generation."""
    exposure_gap: tuple[Estimate, ...]
    """For each block, its distance to real blocks after the model's own blocks, minus that after real blocks."""
    condition_explains: tuple[Estimate, ...]
    """For each block, the share of its variance that the condition explains; empty: there is no condition."""
    denoising_timesteps: tuple[int, ...]
    """Timesteps of the next three fields, rising. All four are empty if an earlier version diagnosed the runs."""
    denoising_error: tuple[Estimate, ...]
    """Squared error of the predicted clean latents, at each of `denoising_timesteps`."""
    noisy_error: tuple[Estimate, ...]
    """Squared error of the noisy block, returned as the prediction."""
    mean_error: tuple[Estimate, ...]
    """Squared error of the mean image, returned as the prediction; the same at each timestep."""


@dataclass(frozen=True)
class Diagnostics:
    """The diagnoses of a report, in the order of its table."""

    diagnoses: tuple[Diagnosis, ...]
    notes: tuple[str, ...]
    """Sentences on how the diagnoses were made."""

    def markdown(self) -> str:
        """The notes, and a table of losses (low and high noise, first and last block), exposure gap and explained variance."""
        steps = self.diagnoses[0].timesteps
        same = all(diagnosis.timesteps == steps for diagnosis in self.diagnoses)
        ends = {"low": 0, "middle": (len(steps) - 1) // 2, "high": -1}
        titles = [f"loss at t = {steps[index]}" if same else f"loss at {name} t" for name, index in ends.items()]
        titles += ["loss, first block", "loss, last block", "mean exposure gap", "gap, last block", "condition explains"]
        lines = [["", *titles]]
        for diagnosis in self.diagnoses:
            losses, blocks, gaps = diagnosis.loss_by_timestep, diagnosis.loss_by_block, diagnosis.exposure_gap
            cells = [losses[0], losses[(len(losses) - 1) // 2], losses[-1], blocks[0], blocks[-1], _over_blocks(gaps), gaps[-1]]
            lines.append([diagnosis.label, *map(show, [*cells, _over_blocks(diagnosis.condition_explains)])])
        return "\n\n".join(["### Diagnostics", "\n".join(f"- {note}" for note in self.notes), table(lines)])


def gather_diagnostics(curves: Sequence[Curve]) -> Diagnostics | None:
    """The newest diagnostics of runs; None: no run was diagnosed.

    Raises:
        InputError: a record is broken.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for curve in sorted(curves, key=lambda curve: (natural(curve.label), curve.seed)):
        if (entry := newest_diagnostics(curve.run)) is not None:
            groups.setdefault(curve.label, []).append(entry)
    if not groups:
        return None
    diagnoses = [_diagnosis(label, entries) for label, entries in groups.items()]
    return Diagnostics(tuple(diagnoses), tuple(_notes([entry for entries in groups.values() for entry in entries])))


def _diagnosis(label: str, entries: Sequence[dict[str, Any]]) -> Diagnosis:
    """Means over seeds. Seeds with other timesteps than the first are left out; the notes then say that timesteps differ."""
    timesteps = entries[0]["timesteps"]
    alike = [entry for entry in entries if entry["timesteps"] == timesteps]
    denoised_at: list[int] = next((entry["denoising_timesteps"] for entry in alike if "denoising_timesteps" in entry), [])
    denoised = [entry for entry in alike if entry.get("denoising_timesteps", []) == denoised_at]

    def means(
        values_of: Callable[[dict[str, Any]], Sequence[float]], among: Sequence[dict[str, Any]] = alike
    ) -> tuple[Estimate, ...]:
        return tuple(over_training(values) for values in zip(*map(values_of, among), strict=True))

    return Diagnosis(
        label,
        tuple(timesteps),
        means(lambda entry: entry["loss_by_timestep"]),
        means(lambda entry: entry["loss_by_block"]),
        means(lambda entry: entry["exposure"]["gap"]),
        means(lambda entry: entry["condition_explains"] or ()),
        tuple(denoised_at),
        means(lambda entry: entry.get("denoising_error", ()), denoised),
        means(lambda entry: entry.get("noisy_error", ()), denoised),
        means(lambda entry: [entry.get("mean_error", 0.0)] * len(denoised_at), denoised),
    )


def _over_blocks(estimates: Sequence[Estimate]) -> Estimate | None:
    """The mean over seeds of each seed's mean over blocks; None: there are no blocks."""
    runs = list(zip(*(estimated.values for estimated in estimates), strict=True))
    return over_training([sum(values) / len(values) for values in runs]) if runs else None


def _notes(entries: Sequence[dict[str, Any]]) -> list[str]:
    seen = distinct("held-out images" if entry["held_out"] else "images of the training set" for entry in entries)
    weights = distinct("EMA" if entry["weights"] == "ema" else "raw" for entry in entries)
    errors = [error for entry in entries for error in entry["exposure"].get("gap_error", ())]
    nfe, sampler = (distinct(entry[key] for entry in entries) for key in ("nfe", "sampler"))
    error = f"; its standard error is at most {max(errors):.1g} a run" if errors else ""
    denoising = (
        "Denoising error: that of the clean latents that the prediction stands for, with the same noise at all timesteps; "
        "above a grey line of the figure, a model is worse than none."
    )
    return [
        f"{distinct(entry['images'] for entry in entries)} {seen}; {weights} weights; {trained_for(entries)}.",
        "Loss: the denoiser's, by timestep t and by block, after real blocks.",
        *([denoising] if any("denoising_error" in entry for entry in entries) else []),
        "Exposure gap: how much farther samples are from real blocks, as a share of the distances between them, after the "
        f"model's own blocks than after real ones; 0 at the first block; sampled at NFE {nfe} with {sampler}{error}.",
        "The condition explains this share of the blocks' variance before any denoising (the mean over blocks); 1 is all, "
        "below 0 is worse than the mean image.",
        *incomparable([{key: entry.get(key) for key in _CONDITIONS} for entry in entries], "diagnostics"),
    ]


def draw_diagnostics(diagnostics: Diagnostics, title: str) -> dict[str, bytes]:
    """The figure of all diagnostics, by timestep and by block: kind of file (`png`, `svg`) -> its contents."""
    from madformer.report.figures import looks, pictures  # matplotlib takes a second to import

    diagnoses = diagnostics.diagnoses
    chosen = looks({diagnosis.label: (diagnosis.label, "") for diagnosis in diagnoses})
    denoised = [diagnosis for diagnosis in diagnoses if diagnosis.denoising_error]

    def fill(panels: Sequence[Axes]) -> None:
        by_timestep, gap, condition = panels[0], *panels[-2:]
        _series(by_timestep, diagnoses, chosen, lambda entry: entry.loss_by_timestep, lambda entry: entry.timesteps)
        _series(gap, diagnoses, chosen, lambda entry: entry.exposure_gap)
        _series(condition, diagnoses, chosen, lambda entry: entry.condition_explains)
        by_timestep.set(xlabel="timestep (noise level)", ylabel="denoising loss")
        gap.set(xlabel="block, in the order of generation", ylabel="exposure gap")
        condition.set(xlabel="block, in the order of generation", ylabel="variance that the condition explains")

        if denoised:
            _denoising(panels[1], denoised, chosen)

    return pictures(4 if denoised else 3, list(chosen), f"{title}: diagnostics", fill)


def _series(
    panel: Axes,
    diagnoses: Sequence[Diagnosis],
    chosen: dict[str, Look],
    values_of: Callable[[Diagnosis], Sequence[Estimate]],
    steps_of: Callable[[Diagnosis], Sequence[int]] | None = None,
) -> None:
    """Draw a line for each label, by timestep or by block."""
    from matplotlib.ticker import MaxNLocator

    from madformer.report.figures import fit, line, remark

    known = [value for diagnosis in diagnoses for value in values_of(diagnosis)]
    if not known:
        panel.set(xticks=[], yticks=[])
        remark(panel, "no condition")
        return
    fit(panel, known, log=steps_of is not None)
    for diagnosis in diagnoses:
        values = values_of(diagnosis)
        steps = steps_of(diagnosis) if steps_of else range(len(values))
        line(panel, diagnosis.label, chosen[diagnosis.label], steps, values)
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def _denoising(panel: Axes, diagnoses: Sequence[Diagnosis], chosen: dict[str, Look]) -> None:
    """Draw the denoising error of each label, and in grey the errors of the trivial denoisers for the first label."""
    from matplotlib.ticker import FuncFormatter

    from madformer.report.figures import fit, line

    first = diagnoses[0]
    trivial = {"the noisy block": (":", first.noisy_error), "the mean image": ("--", first.mean_error)}
    fit(
        panel, [*(value for entry in diagnoses for value in entry.denoising_error), *first.noisy_error, *first.mean_error], True
    )
    for diagnosis in diagnoses:
        line(panel, diagnosis.label, chosen[diagnosis.label], diagnosis.denoising_timesteps, diagnosis.denoising_error)
    grey = [
        panel.plot(first.denoising_timesteps, [value.mean for value in values], color="0.5", linestyle=dashes, label=text)[0]
        for text, (dashes, values) in trivial.items()
    ]
    panel.legend(handles=grey, loc="lower right", fontsize="small", title="error of returning", title_fontsize="small")
    panel.set_xscale("symlog", linthresh=1)
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    panel.set(xlabel="timestep (noise level)", ylabel="denoising error")

"""The training loop of all pretraining stages. It saves its state and can continue."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from samr1_mini.config import UserError, auto_device, first_line
from samr1_mini.files import replace_file
from samr1_mini.tiny.scenes import PRETRAIN, Scene, make_scene

DEVICE = auto_device()


def scenes_from(start: int, count: int) -> list[Scene]:
    """Return `count` scenes of the pretraining range, starting with scene number `start`."""
    return [make_scene(PRETRAIN[0] + start + i) for i in range(count)]


def one_cycle(optimizer, steps: int):
    """Return a schedule: the rate rises for a tenth of the steps, then falls to nearly 0.

    Adam's first beta falls from 0.95 to 0.85 and rises again. Muon has no betas. With 10
    steps, OneCycleLR divides by 0. So a run of fewer steps uses the schedule of 11 steps.
    """
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        max(steps, 11),
        pct_start=0.1,
        final_div_factor=20,
        cycle_momentum="betas" in optimizer.defaults,
    )


def restore(file: Path, parts: list, steps: int) -> tuple[int, dict]:
    """Load a saved state into `parts`. Return the next step and the figures of the bar.

    Without a file the stage starts at step 0. A UserError names a file that does not fit.
    """
    if not file.exists():
        return 0, {}
    saved = torch.load(file, map_location=DEVICE, weights_only=True)
    if saved["steps"] != steps:
        raise UserError(
            f"{file} is from a stage of {saved['steps']} steps, not {steps}: "
            "delete the file to start again"
        )
    try:
        for part, state in zip(parts, saved["parts"], strict=True):
            part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file} is from another network: delete the file to start again ({first_line(error)})"
        ) from None
    return saved["step"], saved["shown"]


def save(file: Path, state: dict) -> None:
    """Write a state. An interrupted write leaves the old file as it was."""
    replace_file(file, lambda part: torch.save(state, part))


def save_weights(module: torch.nn.Module, file: Path) -> None:
    """Write a module's weights as safetensors."""
    weights = module.state_dict()
    save_file({name: value.contiguous().cpu() for name, value in weights.items()}, file)


def smoothed(shown: dict, figures: dict, step: int) -> dict:
    """Return the moving averages of the figures of the progress bar."""
    if step == 0:
        return figures
    averages = {}
    for name, value in figures.items():
        averages[name] = 0.97 * shown.get(name, value) + 0.03 * value
    return averages


def learn(
    name: str, model: torch.nn.Module, optimizers: list, steps: int, work: Path, loss_of: Callable
) -> None:
    """Make `steps` updates with `loss_of(step)`, which returns (loss, figures for the bar).

    All random numbers in `loss_of` depend on the step alone.
    Every 100 steps the state is saved in work/NAME.pt. An interrupted stage continues from there.
    """
    schedules = [one_cycle(optimizer, steps) for optimizer in optimizers]
    file = work / f"{name}.pt"
    parts = [model, *optimizers, *schedules]
    first, shown = restore(file, parts, steps)
    bar = tqdm(range(first, steps), desc=name, initial=first, total=steps)
    for step in bar:
        loss, figures = loss_of(step)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        shown = smoothed(shown, figures, step)
        if step % 25 == 0:
            bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()})
        if step % 100 == 99:
            states = [part.state_dict() for part in parts]
            save(file, {"step": step + 1, "steps": steps, "parts": states, "shown": shown})

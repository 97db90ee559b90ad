"""Train the policy with SAM as the reward: `python train.py --samples 3000`."""

import os
import sys

from samr1_mini.config import (
    MEMORY,
    Settings,
    Terminated,
    UserError,
    cause,
    exit_with,
    parse_settings,
    print_anything,
)
from samr1_mini.gpu import card_memory
from samr1_mini.memory import cap_memory, is_memory_error, memory_warning
from samr1_mini.stops import first_started, outlive_terminal

OUT_OF_MEMORY = (
    "memory ran out. If a step was saved, continue with --resume and a lower --max-new-tokens "
    "or --micro. Otherwise start again: lower --max-new-tokens, --micro, --group or --processes, or "
    "add --checkpointing or --load-in nf4. `--rehearse 1` forecasts the sizes that fit"
)


def print_forecast(settings: Settings) -> None:
    """Print the forecast of memory and hours. Raise UserError if the GPU cannot hold the weights.

    If the forecast itself fails, training starts without it. One line prints the error. A second
    line is a warning if the preset needs more than the free memory.
    """
    try:
        from samr1_mini.forecast import forecast_line

        print(forecast_line(settings), flush=True)
    except UserError:
        raise
    except Exception as error:
        print(f"no forecast: {cause(error)}", flush=True)
        _, peak = MEMORY.get(settings.preset, (0.0, 0.0))
        free, _ = card_memory(settings.memory_limit)
        warning = memory_warning(settings, peak, free)
        if warning:
            print(warning, flush=True)


def run(settings: Settings) -> None:
    """Train, or rehearse the training with random weights."""
    # Imported here, so that --help and wrong options are answered at once.
    if settings.rehearse:
        from samr1_mini.rehearse import rehearse

        rehearse(settings)
        return
    from samr1_mini.grpo import train

    # The forecast describes a training with one process.
    if settings.device == "cuda" and os.environ.get("WORLD_SIZE", "1") == "1":
        print_forecast(settings)
    train(settings)


def leave(error: Exception) -> None:
    """Print one line and exit with code 2. With several processes only the first process prints.

    The first process knows the errors of all processes (processes.fail_together).
    """
    if first_started():
        exit_with(error, "train.py")
    sys.exit(2)


def print_once(line: str) -> None:
    """Print a line on stderr in the first process."""
    if first_started():
        print(line, file=sys.stderr)


def run_or_exit(settings: Settings) -> None:
    """Train or rehearse. Prints a user's mistake in one line, and exits with a code above 0."""
    try:
        cap_memory(settings)
        run(settings)
    except (UserError, OSError) as error:  # most OSErrors come from a full disk
        leave(error)
    except (RuntimeError, MemoryError) as error:  # most of PyTorch's errors are RuntimeErrors
        if not is_memory_error(error):
            raise  # an error of the GPU or of the code, which needs its traceback
        leave(UserError(f"{OUT_OF_MEMORY} ({error})"))
    except Terminated as error:
        print_once(f"train.py: terminated ({error})")
        sys.exit(128 + error.number)
    except KeyboardInterrupt:  # before the first step, after the last step, or a second Ctrl-C
        print_once("\nstopped. Saved states remain, see --resume")
        sys.exit(130)


def main(argv: list[str] | None = None) -> None:
    print_anything()
    settings, line = parse_settings(argv, "train.py", __doc__)
    from samr1_mini.launch import choose_processes, start_processes

    count = choose_processes(settings)
    if count == 1:
        print(line, flush=True)
        run_or_exit(settings)
        return
    print(f"{line}; {count} processes", flush=True)
    code = start_processes(run_or_exit, settings, count)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    outlive_terminal()
    main(sys.argv[1:])

"""Train the policy with SAM as the reward: `python train.py --samples 3000`."""

import os
import sys

from torch import AcceleratorError, OutOfMemoryError

from samr1_mini.config import (
    MEMORY,
    Settings,
    Terminated,
    UserError,
    exit_with,
    first_line,
    parse_settings,
    print_anything,
)
from samr1_mini.gpu import card_memory
from samr1_mini.memory import cap_memory, memory_warning
from samr1_mini.stops import outlive_terminal


def print_forecast(settings: Settings) -> None:
    """Print the expected memory and hours. Raises UserError where the GPU cannot even hold the weights.

    A forecast that fails is no reason not to train. Then one line says so, and the memory that the
    preset itself needs is compared.
    """
    try:
        from samr1_mini.forecast import forecast_line

        print(forecast_line(settings), flush=True)
    except UserError:
        raise
    except Exception as error:
        print(f"no forecast: {type(error).__name__}: {first_line(error)}", flush=True)
        _, peak = MEMORY.get(settings.preset, (0.0, 0.0))
        free, _ = card_memory(settings.memory_limit)
        warning = memory_warning(settings, peak, free)
        if warning:
            print(warning, flush=True)


def main(argv: list[str] | None = None) -> None:
    print_anything()
    settings, line = parse_settings(argv, "train.py", __doc__)
    print(line, flush=True)
    try:
        cap_memory(settings)
        if settings.rehearse:  # imported late, here and below: --help and mistakes answer at once
            from samr1_mini.rehearse import rehearse

            rehearse(settings)
        else:
            from samr1_mini.grpo import train

            # The forecast is for one process.
            if settings.device == "cuda" and os.environ.get("WORLD_SIZE", "1") == "1":
                print_forecast(settings)
            train(settings)
    except (UserError, OSError) as error:  # an OSError: a full disk, most likely
        exit_with(error, "train.py")
    except (OutOfMemoryError, AcceleratorError) as error:
        if isinstance(error, AcceleratorError) and "out of memory" not in str(error):
            raise  # a fault of the GPU or of the code: its traceback says more
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one speaks
            sys.exit(2)
        exit_with(
            UserError(
                "GPU memory ran out. After the first step: what was learnt is saved, go on with --resume and a lower "
                "--max-new-tokens or --micro. Before it: start again with these, --checkpointing, a lower --group, or "
                f"--load-in nf4; --rehearse 1 forecasts what fits ({error})"
            ),
            "train.py",
        )
    except Terminated as error:
        print(f"train.py: terminated ({error})", file=sys.stderr)
        sys.exit(128 + error.number)
    except KeyboardInterrupt:  # before the first step or after the last, or a second Ctrl-C
        print("\nstopped; what was saved before stays, see --resume", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    outlive_terminal()
    main(sys.argv[1:])

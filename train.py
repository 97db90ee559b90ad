"""Train the policy with SAM as the reward: `python train.py --samples 3000`. See --help for every setting."""

import sys

from samr1_mini.config import UserError, exit_with, parse_settings


def main(argv: list[str] | None = None) -> None:
    settings, line = parse_settings(argv, "train.py", __doc__)
    print(line, flush=True)
    from samr1_mini.grpo import train  # imported late: --help and mistakes answer at once

    try:
        train(settings)
    except UserError as error:
        exit_with(error, "train.py")


if __name__ == "__main__":
    main(sys.argv[1:])

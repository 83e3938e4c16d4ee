"""The rehearsal of a profile, before it is paid for: every stage to the report in minutes, on a CPU or on GPUs.

    python -m rlaifv.profiles.rehearsal NAME [--gpu H100 --gpus 8] [--disk GB]     # or: make rehearsal PROFILE=NAME

What can go wrong is as in the run itself: the models' own configurations, processors, chat templates and tokenizers,
fetched from the hub without the weights; dtypes, sharding, notebooks, `dvc repro`. What takes time is small: models
of few narrow layers, eight instructions, a few training steps. What a profile names beside the pipeline (sft,
reward_model, rloo) is run beside it, a step or two of each (`rehearsal_beside`). It runs in a copy of the
repository, below scratch/rehearsal, and says what is made up. With --gpu, --gpus or --disk, of the machine that the
profile is for, what will not fit there stops it at once (`make plan` says more).
"""

import argparse
import sys

from rlaifv.plan import GB, MACHINES, machine_here


def main(arguments: list[str] | None = None) -> None:
    """The command; what stops the rehearsal ends it with one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m rlaifv.profiles.rehearsal",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="a file of params/, without .yaml")
    parser.add_argument("--gpu", choices=MACHINES, help="what the profile is for")
    parser.add_argument("--gpus", type=int, help="how many of them")
    parser.add_argument("--disk", type=float, metavar="GB", help="what is free there")
    options = parser.parse_args(arguments)

    from transformers.utils.logging import disable_progress_bar  # here, for the help is to take no seconds

    from rlaifv.profiles.rehearse import rehearse

    disable_progress_bar()
    try:
        machine = machine_here(options.gpu, options.gpus) if options.gpu or options.gpus else None
        rehearse(options.name, machine, options.disk * GB if options.disk else float("inf"))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"rehearsal: {str(error).strip().splitlines()[0]}")


if __name__ == "__main__":
    main()

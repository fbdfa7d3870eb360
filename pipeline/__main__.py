"""python -m pipeline: the commands of pipeline/command_line.py; doctor works before anything is installed."""

import sys


def main() -> int:
    """Runs what the command line asks for; without the packages, only `doctor` can be run."""
    if sys.argv[1:2] == ["doctor"]:
        from pipeline.workflow.doctor import __main__ as doctor

        return doctor.main(sys.argv[2:])
    try:
        from pipeline import command_line
        from pipeline.waiting import spin_briefly
    except ModuleNotFoundError as fault:
        remedy = "run make setup, then .venv/bin/python -m pipeline"
        print(f"error: {fault.name} is not installed: {remedy}", file=sys.stderr)
        return 2
    spin_briefly()
    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())

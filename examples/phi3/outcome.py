"""What is said at the end of a run, good or bad."""

import argparse
import sys
from pathlib import Path

from phi3 import checkpoints, replies, report
from phi3.errors import UserError


def summarize(progress: report.Report) -> None:
    """The numbers that matter, and where everything is."""
    curve = progress.draw()
    first, last = progress.evaluations[0], progress.evaluations[-1]
    print(
        f"\nHeld-out perplexity {first['eval_perplexity']:.2f} before, {last['eval_perplexity']:.2f} after "
        f"{last['step']} steps.\nEverything is in {curve.parent}: the adapter in {checkpoints.ADAPTER}, "
        f"metrics in {report.METRICS}, the curve in {curve.name}, replies in {replies.REPLIES}."
    )


def explain(error: BaseException, flags: argparse.Namespace) -> int:
    """Prints what went wrong and what to do; the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("\nStopped. Go on from the last checkpoint with --resume.", file=sys.stderr)
        return 130
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
        return 2
    saved = list(checkpoints.steps_in(Path(flags.output_dir).expanduser()).values())
    kept = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved yet"
    print(f"error: training diverged at {error}; {kept}. Try again with a lower --learning-rate.", file=sys.stderr)
    return 1

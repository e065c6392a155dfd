"""The output directory: what may be written there, and what may not be destroyed."""

import shutil
from pathlib import Path

from phi3 import checkpoints, exporting, replies, report
from phi3.errors import UserError


def check(output_dir: Path, resume: Path | None, overwrite: bool) -> None:
    """Raises UserError if a run there would be lost. Called before anything is loaded.

    Args:
        resume: the checkpoint to continue from.
        overwrite: the person said that it may be lost.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output-dir {str(output_dir)!r} is a file")
    if overwrite:
        return
    if resume and _is_within(resume, output_dir):
        later = [path.name for path in _later(output_dir, resume)]
        if later:
            raise UserError(
                f"{str(output_dir)!r} also holds {', '.join(later)}, later than {resume.name}: give "
                "--overwrite to drop what is later, or another --output-dir to keep it"
            )
    elif checkpoints.steps_in(output_dir) or (output_dir / report.METRICS).exists():
        raise UserError(
            f"{str(output_dir)!r} holds a run already: continue it with --resume, replace it with "
            "--overwrite, or choose another --output-dir"
        )


def prepare(output_dir: Path, resume: Path | None) -> None:
    """Makes the directory and clears out an earlier run, of whose end `check` has approved.

    Only files that this example writes are touched.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if resume and _is_within(resume, output_dir):
        for path in _later(output_dir, resume):
            checkpoints.discard(path)
        return
    for path in checkpoints.steps_in(output_dir).values():
        checkpoints.discard(path)
    for name in (report.METRICS, report.CURVE, replies.REPLIES, checkpoints.ADAPTER):
        (output_dir / name).unlink(missing_ok=True)
    for name, _ in exporting.EXPORTS.values():
        shutil.rmtree(output_dir / name, ignore_errors=True)
        if (output_dir / name).is_file():
            (output_dir / name).unlink()
    for leftover in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_within(checkpoint: Path, output_dir: Path) -> bool:
    return checkpoint.resolve().parent == output_dir.resolve()


def _later(output_dir: Path, resume: Path) -> list[Path]:
    """The checkpoints after the one to continue from."""
    paths = list(checkpoints.steps_in(output_dir).values())
    names = [path.name for path in paths]
    return paths[names.index(resume.resolve().name) + 1 :]

"""`vidgen train`: trains an experiment, or resumes it."""

import argparse
import contextlib
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vidgen.cli.main import run
from vidgen.cli.overrides import load_config
from vidgen.core.config import resolve
from vidgen.core.logging import get_logger
from vidgen.core.paths import path_option

__all__ = ["main"]

_log = get_logger(__name__)

_RESTORE = "restore it, or use another workdir"

_EPILOG = """\
examples:
  vidgen train --config=experiments/vae/sprites.py:tiny --workdir=runs/vae
  vidgen train --config=experiments/dit/sprites.py --workdir=runs/dit --config.task.vae=runs/vae
  vidgen train --config=experiments/vae/sprites.py --workdir=runs/vae --config.run.batch_size=16

Any value of the config can be changed with --config.section.key=value; config.json in the workdir lists them
all. The same command resumes a stopped run bit-exactly. SIGTERM and Ctrl-C save a checkpoint, then stop.
Environment: JAX_COMPILATION_CACHE_DIR is a folder that caches compiled programs between runs.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
      argv: arguments after the command's name.

    Returns:
      0 if the run is complete, or was stopped by a signal and saved; 1 if the loss is not finite; 130 or 143
      if a signal came before the first step.
    """
    arguments, overrides = _parser().parse_known_args(argv)
    values = load_config(arguments.config, overrides)

    # Imported late, because JAX loads slowly: --help and errors in options need none of it.
    from vidgen.parallel import processes
    from vidgen.train.experiment import Experiment

    experiment = resolve(Experiment, values)
    processes.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    command = f"vidgen train {shlex.join(argv)}"
    return _train(experiment, arguments.workdir, command, dry=arguments.dry_run)


def _train(experiment, workdir: pathlib.Path, command: str, *, dry: bool) -> int:
    from vidgen.train.workdir_lock import WorkdirLock

    mesh = experiment.mesh.build()
    task = experiment.task.in_workdir(workdir)
    task.check(experiment.data, experiment.run, mesh)
    if dry:
        return _dry_run(workdir, experiment, task, mesh)
    with WorkdirLock(workdir=workdir):
        return _train_in(workdir, experiment, task, mesh, command)


def _dry_run(workdir: pathlib.Path, experiment, task, mesh) -> int:
    from vidgen.cli.dry_run import dry_run
    from vidgen.parallel import processes
    from vidgen.train.experiment import claim_workdir

    claim_workdir(experiment, workdir, write=False)
    dry_run(experiment, task, workdir, mesh, _clips(experiment, *processes.row_shard(mesh)))
    return 0


def _train_in(workdir: pathlib.Path, experiment, task, mesh, command: str) -> int:
    from vidgen.parallel import processes

    with _unchanged_if_refused(workdir, processes.is_main_process()):
        return _claimed(workdir, experiment, task, mesh, command)


@contextlib.contextmanager
def _unchanged_if_refused(workdir: pathlib.Path, is_main: bool) -> Iterator[None]:
    """Restores config.json if the run's checkpoint or source is refused before a step was saved."""
    from vidgen.ckpt.json_files import write_json
    from vidgen.ckpt.manager import CheckpointError
    from vidgen.core.files import read_json

    path = workdir / "config.json"
    saved = lambda: sorted(workdir.glob("checkpoints/*"))  # noqa: E731
    before, steps = read_json(path, remedy=_RESTORE) if path.exists() else None, saved()
    try:
        yield
    except CheckpointError:
        if is_main and before is not None and saved() == steps:
            write_json(path, before)
        raise


def _claimed(workdir: pathlib.Path, experiment, task, mesh, command: str) -> int:
    from vidgen.cli.evaluators import evaluators
    from vidgen.parallel import processes
    from vidgen.train.experiment import claim_workdir
    from vidgen.train.interrupt import Stopped
    from vidgen.train.loop import fit
    from vidgen.train.metrics_buffer import NonFiniteLoss

    experiment = claim_workdir(experiment, workdir, write=processes.is_main_process())
    processes.sync("workdir")
    task = task.prepare(workdir)
    open_clips = _clips(experiment, *processes.row_shard(mesh))
    loader = open_clips()
    try:
        with loader:
            fit(
                task=task,
                loader=loader,
                options=experiment.run,
                optimizer=experiment.optimizer,
                workdir=workdir,
                mesh=mesh,
                evaluators=evaluators(experiment, mesh=mesh),
                open_clips=open_clips,
                resume_with=command,
            )
    except NonFiniteLoss as error:
        print(f"vidgen: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"vidgen: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    if loader.broken:
        _log.warning(
            "%d files or records could not be decoded; their clips were skipped or replaced: %s",
            len(loader.broken),
            loader.broken,
        )
    return 0


def _clips(experiment, index: int, count: int) -> Callable[[], Any]:
    """A function that opens a loader at the first clip; it reads part `index` of `count` of each batch."""
    run = experiment.run
    return functools.partial(
        experiment.task.loader(experiment.data),
        batch_size=run.batch_size,
        seed=run.seed,
        process_index=index,
        process_count=count,
        num_threads=run.num_threads,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidgen train",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="Python file that defines get_config(ARG)"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        type=path_option,
        help="folder for the run's config, checkpoints and metrics",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config, the data, the weights and the disk, then exit",
    )
    processes = parser.add_argument_group(
        "several processes", "or set the environment variables of launch/local.py"
    )
    processes.add_argument(
        "--coordinator", metavar="HOST:PORT", help='address of process 0, or "auto" on a cluster'
    )
    processes.add_argument("--num-processes", type=int, help="processes in total")
    processes.add_argument("--process-id", type=int, help="index of this process, from 0")
    return parser


if __name__ == "__main__":
    sys.exit(run(main))

"""The archive that a SageMaker training job unpacks and runs: this package, its requirements, and a script that trains the run."""

from __future__ import annotations

from pathlib import Path

import qlora_helpers
from qlora_helpers.base.errors import UserError
from qlora_helpers.base.tarball import write_tarball
from qlora_helpers.runs import sigterm

_SCRIPT = """\
#!/bin/bash
# Runs one training run in a SageMaker training job, on each of its instances.
set -o pipefail
ml=${{1:-/opt/ml}}
cd "$(dirname "$0")"
mkdir -p runs "$ml/checkpoints" "$ml/output/tensorboard" "$ml/model"

fail() {{ tail -n 20 train.out > "$ml/output/failure"; exit 1; }}  # SageMaker shows this file as the reason
copy_events() {{ cp -ru runs/{name}/events/. "$ml/output/tensorboard/" 2> /dev/null; }}

python3 -m pip install --quiet --disable-pip-version-check -r requirements.txt 2>&1 | tee train.out || fail
nodes=1 rank=0 address=localhost
if [ {instances} != 1 ]; then
    place=$(python3 -m qlora_helpers.sagemaker.hosts "$ml" 2> train.out) || {{ cat train.out; fail; }}
    read -r nodes rank address <<< "$place"
fi
# The run folder is what SageMaker copies to S3, and back into the next job of this run. Of several instances the first one alone
# writes it; the others have a copy, or they would write over it in S3.
if [ "$rank" = 0 ]; then
    ln -sfn "$ml/checkpoints" runs/{name}
else
    mkdir -p runs/{name} && cp -r "$ml/checkpoints/." runs/{name}/
fi
cp "$ml/input/data/config/config.json" runs/{name}/config.json

while [ "$rank" = 0 ] && sleep 30; do copy_events; done > /dev/null 2>&1 &
copier=$!
{command} > train.out 2>&1 &
trainer=$!
tail -n +1 -f --pid=$trainer train.out &
shown=$!
trap 'kill -TERM $trainer' TERM  # a spot interruption, or the job is stopped: the trainer saves and ends
wait $trainer
status=$?
while kill -0 $trainer 2> /dev/null; do wait $trainer; status=$?; done
kill $copier 2> /dev/null
[ "$rank" != 0 ] || copy_events
wait $shown
[ $status = 0 ] || [ $status = {stopped} ] || fail
[ "$rank" != 0 ] || [ ! -d runs/{name}/adapter ] || cp -r runs/{name}/adapter/. "$ml/model/"
exit $status
"""


def source_archive(out_path: Path, run_name: str, *, processes: int | None = None, instances: int = 1) -> Path:
    """Writes the archive of a training job: this package, its pinned requirements, and the script `job.sh`.

    Args:
        out_path: the archive.
        run_name: the run's name.
        processes: None takes all GPUs in the way that the plan finds fastest. On a single instance so many processes train with the
            settings as they are, and 1 spreads one model over its GPUs; of several instances so many GPUs each are used.
        instances: machines that train together.

    Raises:
        UserError: the package was installed without its repository, or fewer than one process or instance.
    """
    package = Path(qlora_helpers.__file__).resolve().parent
    requirements = package.parent / "requirements.txt"
    if not requirements.is_file():
        raise UserError(
            "requirements.txt is not beside the package",
            next_step="Work in a clone of the repository, installed with `pip install -e .`.",
        )
    files = [path for path in sorted(package.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    contents: dict[str, bytes | Path] = {str(path.relative_to(package.parent)): path for path in files}
    contents["requirements.txt"] = requirements
    script = _SCRIPT.format(
        name=run_name,
        command=_train_command(run_name, processes, instances),
        stopped=sigterm.EXIT_CODE,
        instances=instances,
    )
    contents["job.sh"] = script.encode()
    return write_tarball(out_path, contents)


def _train_command(run_name: str, processes: int | None, instances: int) -> str:
    if processes is not None and processes < 1:
        raise UserError("a job needs processes", expected="at least 1", got=str(processes))
    if instances < 1:
        raise UserError("a job needs instances", expected="at least 1", got=str(instances))
    command = "python3 -m qlora_helpers"
    if instances > 1:
        gpus = f" --gpus {processes}" if processes else ""
        return f'{command} launch {run_name} --nodes "$nodes" --node-rank "$rank" --address "$address"{gpus}'
    if processes is None:
        return f"{command} launch {run_name}"
    return f"{command} train {run_name} --processes {processes}"

#!/bin/sh
# A lifecycle configuration for a JupyterLab space in SageMaker Studio; the same script repairs a space by hand.
#
# It expects this project in the space ($QLORA_PROJECT, else ~/qlora) and ends within seconds: the installation, which takes
# minutes the first time, goes on in the background and writes ~/qlora-install.log. Only ~/ survives a stop of the space, and
# everything here lies there, so a later start finds it installed. Nothing in the image's own environment is changed,
# and the server needs nothing: the charts are drawn by the kernel.
set -u
home=${HOME:-/home/sagemaker-user}
project=${QLORA_PROJECT:-$home/qlora}
log=$home/qlora-install.log

say() { echo "qlora: $*"; }

if [ ! -f "$project/tools/install.py" ]; then
    say "there is no project in $project: clone it there, or set QLORA_PROJECT; nothing was done"
    exit 0 # a failing lifecycle script keeps the whole space from starting
fi

# The kernel that notebooks choose: its threads sleep while they wait, and models go to the volume.
register() {
    "$project/.venv/bin/python" -m ipykernel install --user --name qlora --display-name "Python (QLoRA)" \
        --env OMP_WAIT_POLICY PASSIVE --env HF_HOME "$home/hf" >/dev/null &&
        say "kernel 'Python (QLoRA)' is registered"
}

if [ -f "$project/.venv/.installed" ]; then
    register
elif [ "${1:-}" = "--wait" ]; then
    (cd "$project" && python3 tools/install.py) && touch "$project/.venv/.installed" && register
else
    say "the installation goes on in the background; see $log"
    nohup sh "$0" --wait >"$log" 2>&1 &
fi
exit 0

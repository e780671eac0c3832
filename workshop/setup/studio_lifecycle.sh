#!/bin/sh
# A lifecycle configuration for a JupyterLab space in SageMaker Studio; the same script repairs a space by hand.
#
# It expects this project in the space ($QLORA_PROJECT, else ~/qlora) and ends within seconds: the installation, which takes
# minutes the first time, goes on in the background and writes ~/qlora-install.log. Only ~/ survives a stop of the space, and
# everything here lies there, so a later start finds it installed. Nothing in the image's own environment is changed.
set -u
home=${HOME:-/home/sagemaker-user}
project=${QLORA_PROJECT:-$home/qlora}
server=${QLORA_SERVER_SHARE:-/opt/conda/share/jupyter}
own=$home/.local/share/jupyter
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

# Widgets of the kernel's environment have a part for the browser, which the server has to find (it looks in ~/.local too).
link_widgets() {
    mkdir -p "$own/labextensions"
    for name in bqplot bqscales anywidget; do
        from=$project/.venv/share/jupyter/labextensions/$name
        to=$own/labextensions/$name
        if [ -d "$from" ] && [ ! -e "$server/labextensions/$name" ] && { [ ! -e "$to" ] || [ -L "$to" ]; }; then
            ln -sfn "$from" "$to" && say "the server finds $name; reload the browser's page"
        fi
    done
}

finish() {
    register
    link_widgets
}

if [ -f "$project/.venv/.installed" ]; then
    finish
elif [ "${1:-}" = "--wait" ]; then
    (cd "$project" && python3 tools/install.py) && touch "$project/.venv/.installed" && finish
else
    say "the installation goes on in the background; see $log"
    nohup sh "$0" --wait >"$log" 2>&1 &
fi
exit 0

"""Drawings of where things are: who holds what on several GPUs, and a run's folder with who writes and reads it."""

from __future__ import annotations

from qlora_helpers.base.errors import UserError
from qlora_helpers.teaching.drawings.canvas import Canvas, Drawing, paint

WAYS = ("pipeline", "copies (DDP)", "shares (FSDP)")
# In a run's folder: what it is, who writes it, who reads it. The names are those of `runs.folder.Run`.
FOLDER = (
    ("config.json", "you, in a form or a cell", "every step"),
    ("data/", "data preparation", "the trainer"),
    ("plan.json", "the plan and the trainer", "you, the report"),
    ("status.json", "the trainer", "panel, list of runs"),
    ("progress.jsonl", "the trainer", "panel, charts, report"),
    ("log.txt", "the trainer", "you, the panel"),
    ("requests/", "you, by a button", "the trainer"),
    ("events/", "the trainer", "TensorBoard"),
    ("checkpoints/", "the trainer", "the trainer, to resume"),
    ("adapter/", "the trainer", "evaluation, export"),
    ("evaluation.json", "evaluation", "report, list of runs"),
    ("report.html", "the report", "whoever you mail it to"),
)


def held(way: str, gpu: int, gpus: int, layers: int) -> list[float]:
    """Returns for each layer the share that one GPU holds, from 0 to 1.

    Args:
        way: one of `WAYS`.
        gpu: from 0.
        gpus: how many there are; they divide the layers evenly.
        layers: of the model.
    """
    if way == "pipeline":
        each = layers // gpus
        return [1.0 if layer // each == gpu else 0.0 for layer in range(layers)]
    return [1.0 if way.startswith("copies") else 1 / gpus] * layers


def several_gpus(gpus: int = 4, *, layers: int = 8) -> Drawing:
    """Draws which part of the model each GPU holds, in three ways to use several.

    Args:
        gpus: 2 or 4.
        layers: a multiple of `gpus`, at most 8.

    Raises:
        UserError: other numbers.
    """
    if gpus not in (2, 4) or layers % gpus or not gpus <= layers <= 8:
        raise UserError(
            "that can't be drawn",
            expected="2 or 4 GPUs, and at most 8 layers that they divide evenly",
            got=f"{gpus} GPUs, {layers} layers",
        )
    canvas, room = Canvas(), 560 / gpus
    notes = {
        "pipeline": ("one GPU works,", "the others wait"),
        "copies (DDP)": ("all work, each on", "its own rows"),
        "shares (FSDP)": ("all work, and fetch", "shares they lack"),
    }
    for gpu in range(gpus):
        canvas.text(152 + room * gpu + (room - 10) / 2, 22, f"GPU {gpu}", anchor="middle", bold=True)
    for at, way in enumerate(WAYS):
        y = 34 + 110 * at
        canvas.text(12, y + 22, way, bold=True)
        for down, text in enumerate(notes[way]):
            canvas.text(12, y + 44 + 17 * down, text, size=12)
        for gpu in range(gpus):
            x = 152 + room * gpu
            canvas.box(x, y, room - 10, 96)
            shares, bar = held(way, gpu, gpus, layers), (room - 24) / layers
            for layer, share in enumerate(shares):
                left = x + 7 + layer * bar
                canvas.box(left, y + 8, bar - 3, 56, line=paint("line"))
                if share:
                    slot = 56 * share
                    top = y + 8 + (slot * gpu if share < 1 else 0)
                    canvas.box(left, top, bar - 3, slot, fill=paint("weights"), line=paint("weights"), opacity=0.6)
            own = [layer + 1 for layer, share in enumerate(shares) if share]
            text = (
                (f"layers {own[0]}–{own[-1]}" if len(own) > 1 else f"layer {own[0]}")
                if len(own) < layers
                else "all layers"
                if shares[0] == 1
                else f"1/{gpus} of each layer"
            )
            canvas.text(x + (room - 10) / 2, y + 84, text, size=12, anchor="middle")
    canvas.text(
        12, 382, "Each bar is a layer. Adapters are held with their layers; they are small.", size=12, quiet=True
    )
    return canvas.finish(
        "Who holds what on several GPUs",
        f"A model of {layers} layers on {gpus} GPUs. Pipeline: each GPU holds {layers // gpus} whole layers, and one works while "
        f"the others wait. Copies (DDP): each holds all layers and works on its own rows. Shares (FSDP): each holds 1/{gpus} of "
        f"every layer, works on its own rows and fetches the shares that it lacks.",
        396,
    )


def run_folder() -> Drawing:
    """Draws a run's folder, with who writes each part and who reads it."""
    canvas, bottom = Canvas(), 62 + 32 * len(FOLDER)
    canvas.text(216, 26, "writes", anchor="end", bold=True)
    canvas.text(360, 26, "runs/<name>/", anchor="middle", bold=True, mono=True)
    canvas.text(504, 26, "reads", bold=True)
    canvas.box(262, 38, 196, bottom - 46, fill=paint("weights"), line=paint("weights"), opacity=0.08)
    for at, (name, writer, reader) in enumerate(FOLDER):
        y = 64 + 32 * at
        canvas.text(360, y, name, anchor="middle", mono=True)
        canvas.text(216, y, writer, anchor="end", size=12.5)
        canvas.text(504, y, reader, size=12.5)
        canvas.arrow((224, y - 4), (262, y - 4))
        canvas.arrow((458, y - 4), (496, y - 4))
    canvas.text(
        360, bottom + 16, "Nobody talks to the trainer directly: all that is shared is in this folder.", anchor="middle"
    )
    listed = "; ".join(f"{name} is written by {writer} and read by {reader}" for name, writer, reader in FOLDER)
    return canvas.finish(
        "A run's folder and who reads it", f"All that is shared about a run is in its folder. {listed}.", bottom + 32
    )

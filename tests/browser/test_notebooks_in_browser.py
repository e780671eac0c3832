"""The notebooks as a person sees them."""

from __future__ import annotations

from qlora_helpers.run import Run


def test_notebook_04_runs_to_its_end_and_draws_its_curve(lab, opened, picture):
    notebook = opened("04_train.ipynb")
    notebook.run_all()
    curve = notebook.page.get_by_alt_text("training loss from").first
    curve.scroll_into_view_if_needed()
    assert curve.evaluate("image => image.complete && image.naturalWidth > 100")
    run = Run(lab.runs / "tiny")
    assert run.status().state == "finished"
    assert any(run.checkpoints_dir.glob("checkpoint-*/verified.json"))
    picture(notebook, curve, "curve")

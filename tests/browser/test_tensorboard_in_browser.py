"""TensorBoard's page inside JupyterLab, through Jupyter's own address."""

from __future__ import annotations

import re

from tensorboardX import SummaryWriter

from qlora_helpers.base.profiles import profile_config
from qlora_helpers.runs.folder import Run


def test_its_page_comes_through_jupyter_and_shows_the_run(lab, opened):
    run = Run(lab.runs / "watched")
    run.save_config(profile_config("tiny"))
    with SummaryWriter(str(run.events_dir)) as writer:
        for step in range(1, 5):
            writer.add_scalar("train/loss", 8 - step, step)
    notebook = opened(
        lab.add_notebook(
            "page.ipynb",
            [
                "from qlora_helpers import workflow\nfrom qlora_helpers.views.tensorboard import start_tensorboard",
                "page = start_tensorboard(workflow.existing_run('watched'))\npage",
                "page.stop(); page",
            ],
        )
    )
    notebook.run_cell(0)
    notebook.run_cell(1)
    frame = notebook.page.frame_locator("iframe[title='TensorBoard of watched']")
    frame.get_by_text("train/loss", exact=True).first.wait_for()
    address = notebook.page.get_by_title("TensorBoard of watched").get_attribute("src")
    assert re.fullmatch(r"/qlora-tensorboard/[0-9a-f]{32}/", address)  # a Unix socket: no port is open
    assert notebook.page.request.get(f"{lab.url}{address}").status == 200
    notebook.run_cell(2)
    notebook.page.get_by_text("TensorBoard of watched: stopped").first.wait_for()
    assert notebook.page.locator("iframe[title='TensorBoard of watched']").count() == 0
    assert notebook.page.request.get(f"{lab.url}{address}").status == 404
    notebook.page.keyboard.press("Control+s")
    kept = (lab.folder / "page.ipynb").read_text()
    assert "iframe" not in kept and address not in kept

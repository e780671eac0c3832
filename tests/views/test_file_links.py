"""Links to a run's files: relative where Jupyter can follow them, without anybody's path, and an address to end a command with."""

from __future__ import annotations

import base64
import os

import pytest

from qlora_helpers.views import file_links
from qlora_helpers.views.file_links import KeptFile, KeptFiles, address_of, links_html, shown_path


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A report in a folder of runs below the notebook's folder, with a name that a link has to quote."""
    (tmp_path / "home" / "notebooks" / "runs" / "a#1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "home" / "notebooks")
    path = tmp_path / "home" / "notebooks" / "runs" / "a#1" / "report.html"
    path.write_text("<p>hi</p>")
    return path


def served(monkeypatch, root, url="http://localhost:8888/jupyterlab/default/"):
    monkeypatch.setattr(file_links, "jupyter_server", lambda environ: {"root_dir": str(root), "url": url})


def test_a_file_below_the_notebook_is_a_relative_link_and_a_download(page):
    found = KeptFile(page)._repr_html_()
    assert found.count('href="runs/a%231/report.html"') == 2 and 'download="report.html"' in found
    assert str(page.parent.parent) not in found and "a#1/report.html</a>" in found
    assert repr(KeptFile(page)) == "a#1/report.html" and str(KeptFile(page)) == str(page)
    assert KeptFile(page).read_text() == "<p>hi</p>" and os.fspath(KeptFile(page)) == str(page)


def test_a_file_beside_the_notebook_is_reached_where_jupyter_serves_it(page, tmp_path, monkeypatch):
    other = tmp_path / "home" / "mine.html"
    other.write_text("x")
    assert "href" not in links_html(other), "nobody knows whether anything serves it"
    served(monkeypatch, tmp_path / "home")
    assert 'href="../mine.html"' in links_html(other)
    outside = tmp_path / "elsewhere.html"
    outside.write_text("<b>")
    found = links_html(outside)
    assert base64.b64encode(b"<b>").decode() in found and str(tmp_path / "e") not in found
    monkeypatch.setattr(file_links, "MOST_INLINE", 1)
    assert "href" not in links_html(outside)
    assert "not there" in links_html(tmp_path / "home" / "gone.html")


def test_the_files_of_an_export_are_listed_with_links(page):
    (page.parent / "adapter").mkdir()
    (page.parent / "adapter" / "a.safetensors").write_bytes(b"x" * 2048)
    (page.parent / "adapter" / "link").symlink_to("/etc/passwd")
    found = KeptFiles(page.parent)
    assert [row[0] for row in found.table().rows] == ["adapter/a.safetensors", "report.html"]
    assert "2.0 KiB" in repr(found) and 'href="runs/a%231/adapter/a.safetensors"' in found._repr_html_()
    assert "passwd" not in found._repr_html_()


def test_the_address_is_a_file_s_or_jupyter_s_own(page, tmp_path, monkeypatch):
    assert address_of(page, {}) == page.as_uri()
    terminal = {"JUPYTER_SERVER_ROOT": str(tmp_path / "home"), "JUPYTER_SERVER_URL": "http://localhost:8888/"}
    assert address_of(page, terminal) == "http://localhost:8888/files/notebooks/runs/a%231/report.html"
    assert address_of(page, terminal | {"JUPYTER_SERVER_ROOT": str(tmp_path / "other")}) == page.as_uri()
    studio = terminal | {
        "JUPYTER_SERVER_URL": "http://10.0.0.1:8888/jupyterlab/default/",
        "SAGEMAKER_APP_TYPE": "JupyterLab",
    }
    assert address_of(page, studio).startswith("/jupyterlab/default/files/notebooks/runs/a%231/report.html (behind")
    hub = terminal | {"JUPYTERHUB_SERVICE_PREFIX": "/user/ann/"}
    assert address_of(page, hub).startswith("/user/ann/files/notebooks/")
    served(monkeypatch, tmp_path / "home", "http://localhost:9999/")
    assert address_of(page, {}) == "http://localhost:9999/files/notebooks/runs/a%231/report.html"


def test_a_path_of_a_person_s_home_is_not_shown(tmp_path):
    assert shown_path(tmp_path / "runs" / "a" / "report.html") == os.path.join("a", "report.html")

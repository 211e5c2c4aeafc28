"""What is written beside a run, and that nothing of it can be taken for HTML or a script."""

import html.parser
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_dmc.cli import main
from megatron_dmc.report import write as module
from megatron_dmc.report.text import data, escaped, label, plain
from megatron_dmc.report.write import Written, write_report
from tests.support.runs import HOSTILE, write_small
from tests.support.texts import fails, full_disk
from tests.support.toy import recipe_values, write_recipe, write_text

PNG = b"\x89PNG\r\n\x1a\n"


class Elements(html.parser.HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def embedded(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


def test_a_comparison_has_everything(compared: Written) -> None:
    assert compared.left_out == []
    elements = Elements(compared.page)
    sections = [attributes["id"] for attributes in elements.of("section")]
    assert sections == ["quality", "heads", "training", "serving", "text", "numbers", "stages"]
    values = embedded(compared.page)
    assert set(values["figures"]) == {"quality", "heads", "training", "serving"}
    assert [len(line) for layer in values["text"]["kinds"] for line in layer] == [200] * 6
    images = sorted(path.name for path in (compared.page.parent / "report").iterdir())
    assert len(images) == compared.images and {name.split("-")[0] for name in images} == {*sections[:5]}
    for name in images:
        content = (compared.page.parent / "report" / name).read_bytes()
        assert content.startswith(PNG) and len(content) > 5000, name


def test_nothing_is_loaded(compared: Written, published: list[Written]) -> None:
    for written in (compared, *published):
        elements = Elements(written.page)
        (policy,) = [each["content"] for each in elements.of("meta") if each.get("http-equiv")]
        assert policy is not None and policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe-inline" not in policy.split(";")[1]
        addresses = [each[name] for _, each in elements.found for name in ("src", "href") if name in each]
        assert all(address.startswith("#") or address == "data:," for address in addresses)


def test_names_are_text(compared: Written) -> None:
    page = compared.page.read_text(encoding="utf-8")
    elements = Elements(compared.page)
    assert len(elements.of("script")) == 3 and not elements.of("b")
    assert "<h1>a &lt;b&gt;run</h1>" in page
    assert "<script>document.title" not in page and "\u202e" not in page and "\x07" not in page
    tokens = "".join(embedded(compared.page)["text"]["tokens"])
    assert "</script><script>document.title='broken'</script>" in tokens


def test_text_is_made_harmless() -> None:
    assert plain("a\nb\u202ec\ud800\u2028") == "a\ufffdb\ufffdc\ufffd\ufffd" and plain("größer 🙂") == "größer 🙂"
    assert plain("x" * 501) == "x" * 500 + "…" and plain("x" * 500) == "x" * 500
    assert escaped("<a href='\"'>&") == "&lt;a href=&#x27;&quot;&#x27;&gt;&amp;"
    assert label("<b>\"'&") == "&lt;b&gt;\"'&amp;"
    made = data({HOSTILE: ["</script>", "<!--", "\u2028", "\ud800"]})
    assert not set("<>&\u2028") & set(made) and json.loads(made)[HOSTILE][0] == "</script>"
    with pytest.raises(ValueError):
        data(float("nan"))


def test_what_a_run_lacks_is_left_out(published: list[Written]) -> None:
    quickstart, real = (Elements(written.page) for written in published)
    assert [each["id"] for each in quickstart.of("section")] == ["quality", "heads", "numbers"]
    assert [each["id"] for each in real.of("section")] == ["quality", "heads", "serving", "numbers", "stages"]
    for written in published:
        (line,) = written.left_out
        assert line == "The text, token by token, is left out: there is no exported model in the folder."
        assert line in written.page.read_text(encoding="utf-8")


def test_a_plain_run(
    tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its folder, and of its folder of checkpoints: curves, a text of a checkpoint, the ratio of its heads."""
    write_text(tmp_path)
    phases = [{"kind": "compress", "steps": 4, "lr": 5e-3}, {"kind": "solidify", "steps": 2, "lr": 5e-3}]
    values = recipe_values(tmp_path, tmp_path, phases, target_compression_ratio=3.0)
    assert main(["retrofit", str(write_recipe(tmp_path, values))]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for folder, page in ((".", "report.html"), ("checkpoints", "checkpoints/report.html")):
        assert main(["report", folder]) == 0
        assert capsys.readouterr().out.startswith(f"report: {page} (3 PNGs in ")
        elements = Elements(Path(page))
        assert [each["id"] for each in elements.of("section")] == ["heads", "training", "text", "numbers"]
    lines = embedded(Path(page))["figures"]["training"][0]["plots"][0]["data"]
    assert [line["name"] for line in lines] == ["target", "achieved, training samples", "achieved, held-out text"]
    assert [list(line["x"]) for line in lines[:2]] == [[1, 2, 3, 4, 5, 6]] * 2
    assert lines[0]["y"][-1] == 3.0
    assert main(["report", "checkpoints", "--without-text"]) == 0
    assert "(1 PNGs in" in capsys.readouterr().out
    # A checkpoint's own folder holds nothing else.
    assert main(["report", "checkpoints/final"]) == 1
    assert "is a checkpoint" in capsys.readouterr().err and not Path("checkpoints/final/report.html").exists()


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "run")
    before = {path.name for path in folder.iterdir()}
    write_report(folder)
    page, images = folder / "report.html", folder / "report"
    assert {path.name for path in folder.iterdir()} == before | {"report.html", "report"}
    (images / "serving-09-of-before.png").touch()
    (images / "mine.png").touch()
    made = page.read_bytes()
    page.write_bytes(made[:5000])
    write_report(folder)
    # To the last byte: there is no time and no random number in it.
    assert page.read_bytes() == made
    names = {path.name for path in images.iterdir()}
    assert "mine.png" in names and "serving-09-of-before.png" not in names


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "run")
    page = folder / "report.html"
    page.write_text("my own")
    fails("report.html is not a report of this command; move it away", write_report, folder)
    assert page.read_text() == "my own"
    page.unlink()
    (tmp_path / "elsewhere.html").touch()
    page.symlink_to(tmp_path / "elsewhere.html")
    fails("report.html is not a report", write_report, folder)
    page.unlink()
    (folder / "report").symlink_to(tmp_path)
    fails("report is not a folder, and the figures go there; move it away", write_report, folder)


def test_a_full_disk_leaves_the_page_of_before(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "run")
    write_report(folder)
    made = (folder / "report.html").read_bytes()
    with full_disk(1_000_000), pytest.raises(OSError):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == made
    assert not list(folder.rglob("*.tmp"))


def test_a_model_that_cannot_be_read_does_not_stop_the_report(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "run")
    (folder / "hf-gqa-cr2").mkdir()
    (folder / "hf-gqa-cr2" / "config.json").write_text("{")
    events = folder / "tensorboard" / "recipe" / "events.out.tfevents.1"
    events.parent.mkdir(parents=True)
    events.write_bytes(b"\x00" * 100)
    (line,) = write_report(folder).left_out
    assert line.startswith("The text, token by token, is left out: ") and "config.json is not JSON" in line


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "plotly" else find(name))
    fails("plotly is not installed; run pip install", write_report, write_small(tmp_path / "run"))

from __future__ import annotations

from pathlib import Path

from flexidit import report


def test_text_is_escaped_and_pictures_are_inside(tmp_path: Path) -> None:
    parts = [
        report.paragraph("a < b", "lead"),
        report.heading("<h>"),
        report.bullets(["x & y"]),
        report.table(("<name>",), [("1 < 2",)]),
        report.preformatted("<config>"),
        report.picture(b"png", 'a "quoted" name'),
    ]
    text = report.write_page(tmp_path / "page.html", "<title>", parts).read_text()
    for escaped in (
        "a &lt; b",
        "&lt;h&gt;",
        "x &amp; y",
        "1 &lt; 2",
        "&lt;config&gt;",
        "&lt;title&gt;",
        "&quot;quoted",
    ):
        assert escaped in text
    assert 'src="data:image/png;base64,cG5n"' in text

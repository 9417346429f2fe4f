"""Files as text, made in the browser: what reaches the model is the text, and nothing else leaves it."""

import io
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from page_words import words
from scripted_service import ScriptedService
from serving import Running

W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"


def docx(body: str) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("[Content_Types].xml", "<Types/>")
        file.writestr(
            "word/document.xml",
            f'<?xml version="1.0"?><w:document xmlns:w="{W}"><w:body>{body}</w:body></w:document>',
        )
    return made.getvalue()


def pdf(text: str) -> bytes:
    """A page with one line, as small as readers take it."""
    content = f"BT /F1 24 Tf 72 700 Td ({text}) Tj ET".encode("latin-1")
    parts = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>",
    ]
    made, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, 1):
        places.append(len(made))
        made += b"%d 0 obj%s endobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    start = len(made)
    return (
        made
        + b"xref\n0 6\n0000000000 65535 f \n%strailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF"
        % (
            table,
            start,
        )
    )


PARAGRAPH = "<w:p><w:pPr/><w:r><w:t>Élèves</w:t></w:r><w:r><w:tab/><w:t>de 6e</w:t></w:r></w:p>"
TABLE = (
    "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>Ana</w:t></w:r></w:p></w:tc>"
    "<w:tc><w:p><w:r><w:t>12</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
)
READ = {
    "notes.txt": ("Été".encode(), "Été"),
    "marks.csv": ("Prénom;Note\r\nLéo;15,5".encode("cp1252"), "Prénom;Note\nLéo;15,5"),
    "wide.txt": ("Été".encode("utf-16"), "Été"),
    "list.md": (b"# One\n\n- two", "# One\n\n- two"),
    "letter.docx": (docx(PARAGRAPH + TABLE), "Élèves\tde 6e\n\nAna | 12"),
    "paper.pdf": (pdf("Le r\xe9sultat est 42"), "Le résultat est 42"),
}
REFUSED = {
    "photo.jpg": (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "unknown"),
    "empty.txt": (b" \n", "empty"),
    "broken.docx": (b"PK\x03\x04 and no more", "damaged"),
    "other.zip": (b"PK\x05\x06" + bytes(18), "unknown"),
    "broken.pdf": (b"%PDF-1.7 and no more", "damaged"),
}


def given(name: str, content: bytes) -> Any:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def test_files_are_read_and_asked_about(
    talk: tuple[Running, ScriptedService], visit: Callable[..., Page]
) -> None:
    t, (server, service) = words("en"), talk
    page = visit(f"http://127.0.0.1:{server.port}")
    page.locator(".composer input[type=file]").set_input_files(
        [given(name, content) for name, (content, _) in READ.items()]
    )
    expect(page.locator(".files bdi")).to_have_text(list(READ))
    page.get_by_role("button", name=t("chat.file.remove", name="list.md")).click()
    page.locator(".composer textarea").fill("What is in there?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .text")).to_have_text("So it is.")
    [turn] = service.turns
    for name, (_, text) in READ.items():
        assert (f'File "{name}":\n\n{text}\n' in turn.messages[0].content) == (name != "list.md"), name
    assert turn.messages[0].content.endswith("What is in there?")


@pytest.mark.parametrize("language", ["en", "fr"])
def test_a_file_that_cannot_be_read_is_named(
    talk: tuple[Running, ScriptedService], visit: Callable[..., Page], language: str
) -> None:
    t = words(language)
    page = visit(f"http://127.0.0.1:{talk[0].port}", language=language)
    for name, (content, code) in REFUSED.items():
        page.locator(".composer input[type=file]").set_input_files(given(name, content))
        expect(page.locator(".composer [role=alert]")).to_have_text(t(f"chat.file.{code}", name=name))
    expect(page.locator(".files")).to_have_count(0)


@pytest.mark.parametrize(
    ("event", "where", "holder"),
    [("drop", ".messages", "dataTransfer"), ("paste", ".composer textarea", "clipboardData")],
)
def test_a_file_is_dropped_on_the_page_or_pasted(
    talk: tuple[Running, ScriptedService], visit: Callable[..., Page], event: str, where: str, holder: str
) -> None:
    page = visit(f"http://127.0.0.1:{talk[0].port}")
    dropped = page.evaluate_handle(
        "() => { const data = new DataTransfer();"
        " data.items.add(new File(['hello'], 'a.txt')); return data; }"
    )
    page.locator(where).evaluate(
        "(element, [kind, holder, data]) => element.dispatchEvent("
        "new (kind === 'paste' ? ClipboardEvent : DragEvent)(kind, { bubbles: true, [holder]: data }))",
        [event, holder, dropped],
    )
    expect(page.locator(".files bdi")).to_have_text(["a.txt"])

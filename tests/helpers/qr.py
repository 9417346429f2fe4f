"""What a QR code on the screen says, as a phone's camera would read it."""

import base64

import numpy as np
import pytest
from playwright.sync_api import Locator

# The browser itself turns its picture into shades of grey: no decoder of PNG is needed beside it.
SHADES = """async (picture) => {
  const bytes = Uint8Array.from(atob(picture), (each) => each.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, image.width, image.height);
  return { width: image.width, shades: Array.from(data).filter((_, at) => at % 4 === 1) };
}"""


def read_qr(code: Locator) -> str:
    """The text of a code, which must be readable, and the only one in its place."""
    zxingcpp = pytest.importorskip("zxingcpp", reason="needs zxing-cpp: `make setup`")
    code.scroll_into_view_if_needed()
    picture = base64.b64encode(code.screenshot()).decode()
    found = code.page.evaluate(SHADES, picture)
    shades = np.array(found["shades"], np.uint8).reshape(-1, found["width"])
    [read] = zxingcpp.read_barcodes(shades)
    return read.text

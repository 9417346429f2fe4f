"""What scripts/unicode_table.py calls of unicodedata2; after the standard library's unicodedata."""

unidata_version: str

def category(character: str, /) -> str: ...

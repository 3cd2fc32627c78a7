"""
Bytes to text, whatever the charset: by byte order mark, as UTF-8, as declared, or as chardet finds it.

A crawl is not all UTF-8: of 1,061 public pages 29 were not, and decoding those as UTF-8 destroys every letter outside
ASCII. Used for pages (data/extract.py) and for plain text files alike.
"""
import codecs
import re

from configurator import UserError

BOMS = [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")]
META = re.compile(rb"""<(?:meta|\?xml)[^>]{0,300}?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]{2,40})""", re.I)
# pages that declare the narrow charset use the wide one: curly quotes in "latin-1", rare characters in "gb2312". This
# is also what browsers do (encoding.spec.whatwg.org)
WIDER = {"ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
         "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"}
NAMES = {"x-sjis": "cp932", "x-gbk": "gb18030", "x-euc-jp": "euc_jp", "windows-31j": "cp932", "ks_c_5601-1987": "cp949",
         "x-x-big5": "big5hkscs", "x-cp1251": "cp1251", "x-cp1252": "cp1252", "win-1251": "cp1251"}
GUESSED = 65_536        # bytes that a guess looks at


def decode(raw: bytes, declared: str = "") -> str:
    """
    The text of a page or file. `declared` is the charset of the HTTP header, "" if there was none. Never raises: bytes
    that no charset explains become U+FFFD. A byte order mark wins; then UTF-8, since text of another charset that is
    valid UTF-8 does not occur; then the header, then <meta>; then a guess. A declared charset that the bytes
    contradict is passed over.
    """
    for mark, name in BOMS:
        if raw.startswith(mark):
            return raw[len(mark):].decode(name, "replace")
    if name := wide_by_zeros(raw[:4096]):
        return raw.decode(name, "replace")
    meta = META.search(raw[:4096])
    labels = [known(declared), known(meta[1].decode("ascii", "replace")) if meta else ""]
    if not any(name.startswith(("iso2022", "hz")) for name in labels):      # these are ASCII bytes, and so valid UTF-8
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            if mostly_utf8(raw):
                return raw.decode("utf-8", "replace")
    for name in filter(None, labels):
        text = raw.decode(name, "replace")
        if text.count("\ufffd") <= len(text) // 500:
            return text
    return guess(raw)


def known(label: str) -> str:
    """Python's name of a charset label, "" for a label that names none or a charset that these bytes cannot be."""
    label = label.strip(" \"'").lower()
    try:
        name = NAMES.get(label) or codecs.lookup(label).name
    except (LookupError, ValueError):
        return ""
    name = WIDER.get(name, name)
    text = name not in ("utf-8", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "idna", "punycode", "mbcs")
    return name if text and getattr(codecs.lookup(name), "_is_text_encoding", True) and "escape" not in name else ""


def wide_by_zeros(start: bytes) -> str:
    """UTF-16 without a mark: nearly every other byte of a text with ASCII in it is zero. "" when it is not so."""
    half = len(start) // 2
    if half >= 8 and start[1::2].count(0) > 0.4 * half and start[::2].count(0) < 0.1 * half:
        return "utf-16-le"
    if half >= 8 and start[::2].count(0) > 0.4 * half and start[1::2].count(0) < 0.1 * half:
        return "utf-16-be"
    return ""


def mostly_utf8(raw: bytes) -> bool:
    """UTF-8 with a few broken places: over five good letters outside ASCII for each. Other charsets have hardly any."""
    text = raw.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return len(text) - len(text.encode("ascii", "ignore")) - broken > 5 * broken


def guess(raw: bytes) -> str:
    """The text in the charset that chardet finds in the words of the page; cp1252 when it finds none."""
    try:
        import chardet  # only text without a true declaration needs it
    except ImportError:
        raise UserError("a text that is not UTF-8 and names no charset needs chardet: pip install chardet") from None
    foreign = re.search(rb"[\x80-\xff]", raw)
    start = max(0, foreign.start() - 1000) if foreign else 0
    words = re.sub(rb"<[^<>]*>", b" ", raw[start:start + GUESSED])
    return raw.decode(known(chardet.detect(words)["encoding"] or "") or "cp1252", "replace")

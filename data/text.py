r"""
Text at the borders of the project: one policy for what comes in, one for what goes to a terminal.

What comes in, from a file, a prompt on the command line or a line typed in a chat:

    half of a surrogate pair, \ud83d alone     U+FFFD, as the tokenizer has it: no file can hold it (whole)
    bytes that are not UTF-8                   a row of a data file: refused, its file and row are named; on the command
                                               line or typed: U+FFFD
    a byte order mark                          no part of the text where it begins a file or what is typed
    CRLF, NUL, other control characters        are text like any other. A line of a file ends with \n alone: U+2028,
                                               U+0085, form feeds stand inside of lines. A typed line loses its \r

What goes out: files and pipes get the text as it is. A terminal is shown control characters as \x1b, it does not obey
them (shown): a model or a column name may hold anything. Characters that an output's encoding lacks (cp1252, ascii)
become \u4e2d there; nothing that is printed ends a run (safe_streams).
"""
import re
import sys

# ESC, BEL and the others of ASCII but tab and line feed, those of Latin-1 (0x9b is ESC [ in one character), and those
# that turn the direction of the text around them, behind which a line can hide
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def whole(text: str) -> str:
    """text with U+FFFD for each half of a surrogate pair, which has no UTF-8 form."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def typed(text: str) -> str:
    """A line that somebody typed, or that came through a pipe: whole, without the ends that Windows gives a line."""
    return whole(text).removeprefix("\ufeff").rstrip("\r\n")


def shown(text: str, lines: bool = True) -> str:
    r"""
    text for a person's eyes: control characters stand as \x1b or \u202e. lines=False: line feeds too, as \n, for
    what has to stay one line. By hand: shown("a\x1b[2Jb") = r"a\x1b[2Jb", 8 characters.
    """
    text = CONTROL.sub(lambda c: repr(c.group())[1:-1], text)
    return text if lines else text.replace("\n", "\\n")


def for_stdout(text: str) -> str:
    """text as it goes to stdout: shown where that is a terminal, as it is where it is a file or a pipe."""
    return shown(text) if sys.stdout.isatty() else text


def safe_streams() -> None:
    """
    Printing and typing never end a run: what stdout and stderr cannot encode is written as \\u4e2d, bytes typed that
    are not UTF-8 become U+FFFD.
    """
    for stream, errors in ((sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace"), (sys.stdin, "replace")):
        if hasattr(stream, "reconfigure"):             # not a stream that a test or a notebook has put there
            stream.reconfigure(errors=errors)

"""The addresses that Wikipedia's articles give as references: what the positives of data_tools.train_quality are.

    python -m data_tools.reference_urls input=enwiki-pages-articles.xml.bz2 output=urls.txt

Every http(s) address between <ref> and </ref> counts, whatever the tag's attributes and however many lines it takes,
in a template or bare; RedPajama's expression sees neither <ref name=…> nor what spans lines. A copy in the Internet
Archive counts as the page itself. Each address comes once, in the order of the dump.
"""

import hashlib
import html
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from data_tools.documents import InputFile, find_inputs, input_list
from data_tools.records import Dropped
from data_tools.sources.wikipedia import FORMAT
from data_tools.sources.xml_records import Header, xml_records
from llamatrain.cli import run_command
from llamatrain.errors import ConfigError, DataError
from llamatrain.files import written_atomically

COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
REF = re.compile(r"""<ref(\s(?:[^<>"']|"[^"<\n]*"|'[^'<\n]*'|["'])*+)?>""", re.IGNORECASE)
REF_END = re.compile(r"</ref\s*>", re.IGNORECASE)
URL = re.compile(r"""https?://[^\s\[\]{}|<>"]+""", re.IGNORECASE)
ARCHIVE = re.compile(r"https?://web\.archive\.org/web/[^/]*/(?=https?://)", re.IGNORECASE)
ENDS_NO_URL = ".,;:!?'*"


@dataclass
class ReferenceUrlsSettings:
    input: Any = "???"  # pages-articles dumps: a file, directory or glob pattern, or a list of them
    output: str = "???"  # text file, an address a line
    max_document_bytes: int = 16 << 20  # of a page's XML; longer ones are skipped and counted
    overwrite: bool = False  # replace the output


def references(wikitext: str) -> Iterator[str]:
    """What stands in the <ref> … </ref> of an article. <ref name="x" /> only names one."""
    text, position = COMMENT.sub("", wikitext), 0
    while opened := REF.search(text, position):
        position = opened.end()
        if (opened[1] or "").rstrip().endswith("/"):
            continue
        closed = REF_END.search(text, position)
        if closed is None:
            return
        yield text[position : closed.start()]
        position = closed.end()


def urls(reference: str) -> Iterator[str]:
    """The addresses in a reference."""
    for match in URL.finditer(html.unescape(reference)):
        url = ARCHIVE.sub("", match[0]).rstrip(ENDS_NO_URL)
        while url.endswith(")") and url.count(")") > url.count("("):
            url = url[:-1].rstrip(ENDS_NO_URL)
        if len(url) > len("https://"):
            yield url


def _article_urls(file: InputFile, settings: ReferenceUrlsSettings, counts: dict[str, int]) -> Iterator[str]:
    for page in xml_records(file.path, file.name, FORMAT, settings.max_document_bytes):
        if isinstance(page, Header):
            continue
        counts["pages"] += 1
        if isinstance(page, Dropped):
            counts[page.reason] = counts.get(page.reason, 0) + 1
        elif page.findtext("ns", "0") == "0" and page.find("redirect") is None:
            counts["articles"] += 1
            for reference in references(page.findtext("revision/text", "")):
                counts["references"] += 1
                yield from urls(reference)


def _keep_first(found: Path, digests: array, output: IO[bytes]) -> int:
    """Write each address of the file once. Eight bytes an address are held."""
    is_first = np.zeros(len(digests), dtype=bool)
    is_first[np.unique(np.frombuffer(digests, dtype=np.uint64), return_index=True)[1]] = True
    with open(found, "rb") as file:
        for line, wanted in zip(file, is_first.tolist(), strict=True):
            if wanted:
                output.write(line)
    return int(is_first.sum())


def reference_urls(settings: ReferenceUrlsSettings) -> None:
    """Write the addresses, or say that they are there. Raises ConfigError and DataError."""
    if settings.output in ("", "???"):
        raise ConfigError("output is not set: output=FILE")
    if settings.max_document_bytes < 1:
        raise ConfigError(f"max_document_bytes={settings.max_document_bytes}: must be at least 1")
    files = find_inputs(input_list(settings.input))
    output = Path(settings.output)
    if output.exists() and not settings.overwrite:
        raise DataError(f"{output}: is there already; set overwrite=true to replace it, or another output")
    counts = dict.fromkeys(("pages", "articles", "references", "urls"), 0)
    digests = array("Q")
    found = output.with_name(f".{output.name}.{os.getpid()}.found.tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(found, "wb") as all_of_them, tqdm(desc="references", unit=" urls", mininterval=1) as bar:
            for url in (url for file in files for url in _article_urls(file, settings, counts)):
                line = url.encode("utf-8", "replace")
                digests.append(int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "big"))
                all_of_them.write(line + b"\n")
                bar.update()
        with written_atomically(output) as file:
            different = _keep_first(found, digests, file)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror})") from None
    finally:
        found.unlink(missing_ok=True)
    counts["urls"] = len(digests)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    print(f"wrote {different:,} different addresses to {output}")


def main() -> None:
    run_command(ReferenceUrlsSettings, "data_tools/reference_urls", reference_urls, help_text=__doc__)


if __name__ == "__main__":
    main()

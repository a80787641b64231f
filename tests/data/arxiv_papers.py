"""Papers and dumps in the form arXiv serves them, made by tests."""

import gzip
import io
import tarfile
from collections.abc import Mapping

PAPER = """\
\\documentclass{article}
\\newcommand{\\E}[1]{\\mathbb{E}\\left[#1\\right]}
\\begin{document}
\\title{On nothing}
\\section{Introduction}
The mean is $\\E{x}$. % or is it?
\\bibliography{refs}
\\end{document}
"""
CLEAN_PAPER = "\\section{Introduction}\nThe mean is $\\mathbb{E}\\left[x\\right]$.\n"


def tar(files: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar of the files; a TarInfo is put in as it is (links, devices)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, data in files.items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def packed(files: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A paper of several files: a gzipped tar."""
    return gzip.compress(tar(files), mtime=0)


def single(text: str | bytes) -> bytes:
    """A paper of one file: gzipped TeX."""
    return gzip.compress(text.encode() if isinstance(text, str) else text, mtime=0)


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member

"""Under which licence code stands, as an SPDX expression, and whether that is one of those wanted.

The paper keeps "projects that are distributed under the Apache, BSD and MIT licenses" (2.1). A licence is told by its
SPDX identifier, by BigQuery's names (`mit`, `bsd-3-clause`, `apache-2.0`), by what package metadata calls it ("Apache
Software License", "3-Clause BSD License"), or by the text of a LICENSE file. `A OR B` is permitted if one of them is,
`A AND B` only if both are; an exception (`WITH …`) only ever adds permissions. Of a text every licence in it counts,
so that a file that also holds the GPL, or a clause against commerce, is not taken for MIT.
"""

import re
from collections.abc import Collection
from email.parser import HeaderParser

FAMILIES = {
    "mit": ("MIT", "MIT-0"),
    "bsd": ("BSD", "0BSD", "BSD-1-Clause", "BSD-2-Clause", "BSD-3-Clause", "BSD-3-Clause-Clear", "BSD-4-Clause"),
    "apache": ("Apache", "Apache-1.0", "Apache-1.1", "Apache-2.0"),
    "isc": ("ISC",),
    "zlib": ("Zlib",),
    "unlicense": ("Unlicense",),
    "cc0": ("CC0-1.0",),
    "psf": ("PSF-2.0", "Python-2.0", "CNRI-Python"),
    "boost": ("BSL-1.0",),
    "mpl": ("MPL-2.0",),
    "lgpl": ("LGPL",),
    "gpl": ("GPL",),
    "agpl": ("AGPL",),
}
UNKNOWN = "NOASSERTION"  # SPDX's word for what cannot be told
OTHER = "LicenseRef-other"  # a known condition beyond the licence: against commerce, say

_FAMILY_OF = {identifier.lower(): family for family, identifiers in FAMILIES.items() for identifier in identifiers}
_SPELLING = {identifier.lower(): identifier for identifiers in FAMILIES.values() for identifier in identifiers}

# Names in metadata and classifiers, in lower case without "the", "license", "licence", "software" and punctuation.
_NAMES = (
    (r"mit(?: x11)?|expat|mit expat|x11 mit", "MIT"),
    (r"(?:simplified|2 clause|freebsd)(?: bsd)?|bsd (?:simplified|2(?: clause)?(?: simplified)?)", "BSD-2-Clause"),
    (r"(?:new|modified|revised|3 clause)(?: bsd)?|bsd (?:new|3(?: clause)?(?: new| revised)*)", "BSD-3-Clause"),
    (r"bsd(?: style| like| derived)?", "BSD"),
    (r"apache(?: version| v)? ?2(?: 0)?(?: only)?|asl 2(?: 0)?|al2|apache2(?: 0)?", "Apache-2.0"),
    (r"apache|apache s?f?", "Apache"),
    (r"isc(?: iscl)?", "ISC"),
    (r"zlib(?: libpng)?", "Zlib"),
    (r"psf(?: 2 0)?|python foundation|python(?: 2 0)?", "PSF-2.0"),
    (r"mpl(?: v)? ?2(?: 0)?|mozilla public(?: 2 0)?(?: mpl 2 0)?", "MPL-2.0"),
    (r"unlicense|public domain unlicense", "Unlicense"),
    (r"cc0(?: 1 0)?(?: universal)?(?: cc0 1 0 public domain dedication)?", "CC0-1.0"),
    (r"boost(?: 1 0)?(?: bsl 1 0)?", "BSL-1.0"),
)
_NOISE = re.compile(r"\b(?:the|licen[cs]es?|licen[cs]ed|software|version|under|osi approved)\b|[^a-z0-9]+")

# Texts, in lower case with every run of other characters as one blank.
_MIT = "permission is hereby granted free of charge to any person obtaining a copy of this software and associated"
_BSD = "redistribution and use in source and binary forms with or without modification are permitted"
_TEXTS = (
    ("apache license version 2 0 january 2004", "Apache-2.0"),
    ("licensed under the apache license version 2 0", "Apache-2.0"),
    ("redistribution and use of this software in source and binary forms with or without modification", "BSD"),
    ("python software foundation license version 2", "PSF-2.0"),
    ("mozilla public license version", "MPL-2.0"),
    ("mozilla public license v 2", "MPL-2.0"),
    ("boost software license version 1 0", "BSL-1.0"),
    ("this is free and unencumbered software released into the public domain", "Unlicense"),
    ("this software is provided as is without any express or implied warranty in no event will the authors be", "Zlib"),
    ("gnu affero general public license", "AGPL"),
    ("gnu lesser general public license", "LGPL"),
    ("gnu library general public license", "LGPL"),
    ("gnu general public license", "GPL"),
    ("eclipse public license", OTHER),
    ("common development and distribution license", OTHER),
    ("creative commons attribution", OTHER),
    ("commons clause", OTHER),
    ("business source license", OTHER),
    ("server side public license", OTHER),
    ("shall be used for good not evil", OTHER),
    ("non commercial", OTHER),
    ("noncommercial", OTHER),
    ("proprietary and confidential", OTHER),
)
_ISC = re.compile(
    r" permission to use copy modify and (?:or )?distribute this software for any purpose with or without fee"
    r"(?: is hereby granted)?( provided that)?"
)
# Licences that speak of others: those are not what the code is under.
_SPEAKS_OF = {
    "PSF-2.0": {"GPL"},
    "MPL-2.0": {"GPL", "LGPL", "AGPL"},
    "AGPL": {"GPL"},
    "LGPL": {"GPL"},
}
_TOKEN = re.compile(r"\(|\)|[A-Za-z0-9.+:-]+")
_SPDX_TAG = re.compile(r"SPDX-License-Identifier:[ \t]*([^\n]{1,200})", re.IGNORECASE)
_LICENCE_FILE = re.compile(
    r"(?:licen[cs]es?|copying(?:\.lesser|\.lib)?|unlicen[cs]e|copyright)(?:[-_.][\w.+-]*)?"
    r"|[\w.]*[-_.]licen[cs]e(?:\.txt|\.md|\.rst)?",
    re.IGNORECASE,
)
_CODE_SUFFIX = re.compile(r"\.(?!txt$|md$|rst$|html$|mit$|bsd$|gpl$|lgpl$|lib$|\d)\w{1,4}$", re.IGNORECASE)
CLASSIFIER = "License :: "


def is_permitted(expression: str | None, families: Collection[str]) -> bool:
    """Whether an SPDX expression allows use under licences of these families. An unknown licence does not."""
    tokens = _TOKEN.findall(expression or "")
    try:
        permitted, end = _disjunction(tokens, 0, families)
    except (IndexError, RecursionError):
        return False
    return permitted and end == len(tokens)


def licence_of_name(name: str) -> str | None:
    """An SPDX expression out of an identifier, an expression, or a licence's name in words; None if it is none."""
    name = name.strip()
    if not name or len(name) > 200:
        return None
    tokens = _TOKEN.findall(name)
    words = [token for token in tokens if token.upper() not in ("AND", "OR", "WITH", "(", ")")]
    if "".join(tokens) == re.sub(r"\s", "", name) and words and _spdx(words[0]) is not None and _is_expression(tokens):
        return " ".join(_spdx(token) or token for token in tokens)
    plain = _NOISE.sub(" ", name.lower())
    plain = " ".join(plain.split())
    for pattern, identifier in _NAMES:
        if re.fullmatch(pattern, plain):
            return identifier
    alternatives = re.split(r"\s+or\s+|\s*/\s*", name, flags=re.IGNORECASE)
    found = [licence_of_name(alternative) for alternative in alternatives] if len(alternatives) > 1 else []
    return " OR ".join(one for one in found if one) if found and all(found) else None


def licence_of_text(text: str) -> str | None:
    """Of a LICENSE file or a file's header: all licences found in it, joined by AND; None if there is none."""
    tags = [licence_of_name(tag.strip(" */->#")) or UNKNOWN for tag in _SPDX_TAG.findall(text)]
    plain = " " + re.sub(r"[^a-z0-9]+", " ", text.lower()) + " "
    found = {f"({tag})" if " " in tag else tag for tag in tags}
    if _MIT in plain:
        found.add("MIT" if "except as contained in this notice the name" not in plain else "X11")
    if _BSD in plain:
        found.add(_bsd_clauses(plain))
    found |= {"ISC" if condition else "0BSD" for condition in _ISC.findall(plain)}
    found |= {identifier for phrase, identifier in _TEXTS if phrase in plain}
    for identifier in sorted(found):
        found -= _SPEAKS_OF.get(identifier, set())
    if not found and len(plain) < 2_000:
        named = re.search(r" (mit|bsd|apache)(?: [23] clause| 2 0)?(?: software)? licen[cs]e ", plain)
        short = {"mit": "MIT", "bsd": "BSD", "apache": "Apache-2.0"}
        found = {short[named[1]]} if named is not None else set()
    return " AND ".join(sorted(found)) if found else None


def licence_of_metadata(metadata: str) -> str | None:
    """Of a Python distribution's METADATA: License-Expression, else License, else the classifiers; None if unsaid."""
    headers = HeaderParser().parsestr(metadata)
    if expression := headers.get("License-Expression"):
        return licence_of_name(str(expression)) or UNKNOWN
    field = str(headers.get("License") or "").strip()
    if field and (named := licence_of_name(field)) is not None:
        return named
    classifiers = [str(value) for value in headers.get_all("Classifier") or [] if str(value).startswith(CLASSIFIER)]
    names = [value.rsplit(" :: ", 1)[-1] for value in classifiers if value.startswith("License :: OSI Approved :: ")]
    if names:
        return " AND ".join(licence_of_name(re.sub(r"\s*\(.*\)$", "", name)) or UNKNOWN for name in names)
    if field.upper() not in ("", "UNKNOWN"):
        return licence_of_text(field) or UNKNOWN
    return None


def is_licence_file(name: str) -> bool:
    """Whether a file of this name states its directory's licence (COPYING.txt, LICENSE-MIT), and is no code."""
    return _LICENCE_FILE.fullmatch(name) is not None and _CODE_SUFFIX.search(name) is None


def _bsd_clauses(plain: str) -> str:
    if "all advertising materials mentioning" in plain:
        return "BSD-4-Clause"
    third = "neither the name" in plain or re.search(r" names? of .{0,150}may not be used to endorse", plain)
    return "BSD-3-Clause" if third else "BSD-2-Clause"


def _spdx(token: str) -> str | None:
    """The identifier as SPDX spells it; None for what is none of those known here."""
    plain = token.lower().removesuffix("+").removesuffix("-only").removesuffix("-or-later")
    if plain in _SPELLING:
        return _SPELLING[plain]
    for prefix, family in (("agpl-", "AGPL"), ("lgpl-", "LGPL"), ("gpl-", "GPL"), ("bsd-", token), ("mit-", token)):
        if plain.startswith(prefix):
            return family
    return token if re.fullmatch(r"[A-Za-z]+(?:-[A-Za-z]+)*-\d+(?:\.\d+)*[A-Za-z-]*", token) else None


def _is_expression(tokens: list[str]) -> bool:
    """Whether it reads IDENTIFIER (AND|OR|WITH IDENTIFIER)*, parentheses aside."""
    words = [token for token in tokens if token not in ("(", ")")]
    joints = all(word.upper() in ("AND", "OR", "WITH") for word in words[1::2])
    return joints and len(words) % 2 == 1


def _disjunction(tokens: list[str], at: int, families: Collection[str]) -> tuple[bool, int]:
    permitted, at = _conjunction(tokens, at, families)
    while at < len(tokens) and tokens[at].upper() == "OR":
        other, at = _conjunction(tokens, at + 1, families)
        permitted = permitted or other
    return permitted, at


def _conjunction(tokens: list[str], at: int, families: Collection[str]) -> tuple[bool, int]:
    permitted, at = _licence(tokens, at, families)
    while at < len(tokens) and tokens[at].upper() == "AND":
        other, at = _licence(tokens, at + 1, families)
        permitted = permitted and other
    return permitted, at


def _licence(tokens: list[str], at: int, families: Collection[str]) -> tuple[bool, int]:
    if tokens[at] == "(":
        permitted, at = _disjunction(tokens, at + 1, families)
        if tokens[at] != ")":
            raise IndexError
        return permitted, at + 1
    identifier = (_spdx(tokens[at]) or "").lower()
    family = _FAMILY_OF.get(identifier)
    if family is None and identifier.startswith("bsd-"):  # MIT-CMU and the like have other terms than MIT
        family = "bsd"
    at += 1
    if at < len(tokens) and tokens[at].upper() == "WITH":
        at += 2
    return family in families, at

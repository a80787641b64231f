"""Licence headers go, and nothing else: comments of many languages, and code that looks like comments."""

import ast
import io
import random
import re
import sysconfig
import tokenize
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.cleaning.code_headers import remove_headers
from data_tools.cleaning.comment_syntax import extension_of, syntax_of

APACHE = """Copyright 2020 The Authors. All Rights Reserved.

Licensed under the Apache License, Version 2.0 (the "License");
you may not use this file except in compliance with the License.
You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software
distributed under the License is distributed on an "AS IS" BASIS,
WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
See the License for the specific language governing permissions and
limitations under the License.
"""
MIT = """Copyright (c) 2009-2011 A. Person <a@example.org>

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, subject to the following conditions:

The above copyright notice and this permission notice shall be included in
all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM OR DAMAGES.
"""
BSD = """Copyright (C) 2001, The Regents
All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

  * Redistributions of source code must retain the above copyright notice,
    this list of conditions and the following disclaimer.
  * Neither the name of the University nor the names of its contributors may
    be used to endorse or promote products without specific prior permission.

THIS SOFTWARE IS PROVIDED BY THE AUTHORS "AS IS" AND ANY EXPRESS OR IMPLIED
WARRANTIES ARE DISCLAIMED. IN NO EVENT SHALL THE AUTHORS BE LIABLE.
"""
GPL = """This file is part of Frobnicate.

Copyright (C) 1999 A. Person

This program is free software: you can redistribute it and/or modify it under
the terms of the GNU General Public License as published by the Free Software
Foundation, either version 3 of the License, or any later version.

This program is distributed in the hope that it will be useful, but WITHOUT
ANY WARRANTY. See the GNU General Public License for more details.

You should have received a copy of the GNU General Public License along with
this program. If not, see <https://www.gnu.org/licenses/>.
"""
SPDX = "SPDX-FileCopyrightText: 2021 A. Person\nSPDX-License-Identifier: MIT\n"
NOTICES = {"apache": APACHE, "mit": MIT, "bsd": BSD, "gpl": GPL, "spdx": SPDX}


def lines_of(notice: str, mark: str) -> str:
    return "".join(f"{mark} {line}".rstrip() + "\n" for line in notice.splitlines())


def block_of(notice: str, opening: str, inner: str, closing: str) -> str:
    return f"{opening}\n" + lines_of(notice, inner) + f"{closing}\n"


def cleaned(text: str, path: str) -> str:
    return remove_headers(text, path).text


# name of a file, the header's form, code
FORMS = {
    "c block": ("a.c", lambda n: block_of(n, "/*", " *", " */"), "#include <stdio.h>\n#define X 1\nint main(void);\n"),
    "c starred": (
        "a.h",
        lambda n: block_of(n, "/" + "*" * 70, " *", " " + "*" * 70 + "/"),
        "#ifndef A_H\n#define A_H\n",
    ),
    "c lines": ("a.cpp", lambda n: lines_of(n, "//"), "#include <vector>\n// of numbers\nint x;\n"),
    "java": ("A.java", lambda n: block_of(n, "/**", " *", " */"), "package a.b;\n\n/** Does a. */\nclass A {}\n"),
    "python": ("a.py", lambda n: lines_of(n, "#"), '"""A module."""\n\nimport os\n'),
    "shell": ("a.sh", lambda n: lines_of(n, "#"), 'set -e\necho "# not a comment"\n'),
    "sql": ("a.sql", lambda n: lines_of(n, "--"), "select 1; -- one\n"),
    "lua": ("a.lua", lambda n: block_of(n, "--[[", "", "]]"), "local x = 1\n"),
    "haskell": ("A.hs", lambda n: block_of(n, "{-", "", "-}"), "module A where\n"),
    "tex": ("a.sty", lambda n: lines_of(n, "%%"), "\\ProvidesPackage{a}\n"),
    "lisp": ("a.el", lambda n: lines_of(n, ";;"), "(defun a () nil)\n"),
    "html": ("a.html", lambda n: block_of(n, "<!--", "", "-->"), "<!DOCTYPE html>\n<p>a</p>\n"),
    "css": ("a.css", lambda n: block_of(n, "/*!", " *", " */"), "p { color: red }\n"),
    "rust": ("a.rs", lambda n: lines_of(n, "//"), "#![no_std]\nfn main() {}\n"),
    "go": ("a.go", lambda n: lines_of(n, "//"), "// Package a does a.\npackage a\n"),
    "fortran": ("a.f90", lambda n: lines_of(n, "!"), "program a\nend\n"),
    "cmake": ("CMakeLists.txt", lambda n: lines_of(n, "#"), "project(a)\n"),
    "make": ("Makefile", lambda n: lines_of(n, "#"), "all:\n\techo a\n"),
    "batch": ("a.bat", lambda n: lines_of(n, "REM"), "@echo off\n"),
    "pascal": ("a.pas", lambda n: block_of(n, "{", "", "}"), "program A;\n"),
    "powershell": ("a.ps1", lambda n: block_of(n, "<#", "", "#>"), "$x = 1\n"),
    "basic": ("a.vb", lambda n: lines_of(n, "'"), "Module A\nEnd Module\n"),
    "ocaml": ("a.ml", lambda n: block_of(n, "(*", "", "*)"), "let a = 1\n"),
    "vim": ("a.vim", lambda n: lines_of(n, '"'), "set a\n"),
}


@pytest.mark.parametrize("notice", NOTICES)
@pytest.mark.parametrize("form", FORMS)
def test_the_notice_goes_and_the_code_stays(form: str, notice: str) -> None:
    path, header, code = FORMS[form]
    found = remove_headers(header(NOTICES[notice]) + "\n" + code, path)
    assert found.text == code
    assert found.lines >= len(NOTICES[notice].splitlines())


# What RedPajama's cleaning loses: without a block comment it deletes every leading line that begins with //, #, -- or
# is blank.


def test_includes_and_definitions_stay() -> None:
    for code in ("#include <stdio.h>\n#define X\n", "// a counter\n#include <stdio.h>\n", "#pragma once\nint x;\n"):
        assert cleaned(code, "a.c") == code
    assert (
        cleaned(lines_of(MIT, "//") + "\n#include <stdio.h>\n#define X 1\n", "a.c")
        == "#include <stdio.h>\n#define X 1\n"
    )


def test_shebangs_and_encoding_lines_stay() -> None:
    top = "#!/usr/bin/env python3\n# -*- coding: latin-1 -*-\n"
    assert cleaned(top + lines_of(APACHE, "#") + "import os\n", "a.py") == top + "import os\n"
    assert cleaned("#!/bin/sh\necho a\n", "a.sh") == "#!/bin/sh\necho a\n"
    assert cleaned("#!/bin/sh\n# Copyright 2020 A. Person\necho a\n", "a.sh") == "#!/bin/sh\necho a\n"


def test_headings_of_markdown_stay() -> None:
    for text in ("# My Readme\n\n## Install\ntext\n", "# Copyright 2020 A. Person\n\n# License\n\nMIT License\n"):
        assert cleaned(text, "README.md") == text
    assert cleaned("<!-- Copyright 2020 A. Person -->\n# Readme\n", "README.md") == "# Readme\n"


def test_comments_without_licence_stay() -> None:
    for path, code in {
        "a.py": "# This module checks license keys.\n# It is used as is by the warranty desk.\nimport os\n",
        "b.py": "# Check copyright headers of all files.\nimport os\n",
        "a.js": "// eslint-disable-next-line\n'use strict';\n",
        "a.c": "/* The patent office's format, see the notice board. */\nint x;\n",
        "a.lua": "-- a table\nreturn {}\n",
    }.items():
        assert cleaned(code, path) == code


def test_a_notice_behind_another_comment_is_found() -> None:
    """RedPajama looks at the first block comment only."""
    first = "/* Frobnicates the widgets. */\n"
    assert cleaned(first + "\n" + block_of(BSD, "/*", " *", " */") + "int x;\n", "a.c") == first + "\nint x;\n"
    several = (
        block_of(MIT, "/*", " *", " */") + "\n" + first + lines_of(APACHE, "//") + "\n" + block_of(BSD, "/*", "", "*/")
    )
    assert cleaned(several + "int x;\n", "a.c") == first + "\nint x;\n"
    directives = '#ifndef A_H\n#define A_H\n#include "b.h"\n\n'
    assert cleaned(directives + lines_of(GPL, "//") + "int x;\n", "a.h") == directives + "int x;\n"
    docstring = '"""Frobnicates.\n\nCopyright is not a comment here: 2020.\n"""\n\n'
    assert cleaned(docstring + lines_of(MIT, "#") + "import os\n", "a.py") == docstring + "import os\n"


def test_nothing_is_cut_in_the_middle_of_a_line() -> None:
    """dolma's port adds up the lengths of lines without their newlines, and cuts inside the text."""
    code = "".join(f"line_{number} = {number}\n" for number in range(40))
    assert cleaned(lines_of(BSD, "#") + code, "a.py") == code


def test_what_else_a_comment_says_stays() -> None:
    text = "/* frob.c -- frobnicate a widget\n * Copyright (C) 1995 A. Person\n * see the file COPYING\n */\nint x;\n"
    assert cleaned(text, "a.c") == "/* frob.c -- frobnicate a widget\n */\nint x;\n"
    text = "/*\n * Copyright 2020 A. Person\n *\n * Frobnicates the widgets.\n */\nint x;\n"
    assert cleaned(text, "a.c") == "/*\n * Frobnicates the widgets.\n */\nint x;\n"
    text = "#\n# Frobnicates.\n#\n# a.py\n#\n# Copyright (c) 2006 A. Person\n# Licensed to PSF.\n#\n\nimport os\n"
    assert cleaned(text, "a.py") == "#\n# Frobnicates.\n#\n# a.py\n\nimport os\n"
    text = "// Copyright 2020 A. Person\n//go:build linux\n\n// Package a is free.\npackage a\n"
    assert cleaned(text, "a.go") == "//go:build linux\n\n// Package a is free.\npackage a\n"


def test_code_that_looks_like_a_header_stays() -> None:
    for path, code in {
        "a.c": "/* Copyright 2020 A. Person */ int x;\n",  # code behind the comment
        "b.c": "// Copyright 2020 A. Person \\\n   still the comment\nint x;\n",  # the next line belongs to it
        "c.c": "/* Copyright 2020 /* A. Person\n*/\nint x;\n",  # nested, or not
        "d.c": "#define NOTICE 1 /* begins\n// Copyright 2020 A. Person\n*/\nint x;\n",
        "e.c": "/* Copyright 2020, without end\nint x;\n",
        "f.c": "int x;\n/* Copyright 2020 A. Person */\nint y;\n",  # not at the top
        "a.py": 'NOTICE = """\n# Copyright 2020 A. Person\n"""\n',
        "b.py": '"""\n# Copyright 2020 A. Person\n"""\nimport os\n',
        "a.lua": "--[==[\n-- Copyright 2020 A. Person\n]==]\nreturn 1\n",
        "a.hs": "{-# LANGUAGE CPP #-}\n-- code\nmodule A where\n",
        "a.php": "# Copyright 2020 A. Person\n<?php\necho 1;\n",  # text before <?php is printed
        "a.pl": "%licences = (mit => 'MIT License');\n",
        "a.json": '{"a": "// Copyright 2020 A. Person"}\n',
        "a.txt": "# Copyright 2020 A. Person\n",
        "LICENSE": "Copyright 2020 A. Person\n",
    }.items():
        found = remove_headers(code, path)
        assert found.text == code and found.lines == 0, path


def test_lines_that_stand_before_headers_stay() -> None:
    for path, top, header in (
        ("a.php", "<?php\n", lines_of(MIT, "//")),
        ("a.xml", '<?xml version="1.0"?>\n', block_of(MIT, "<!--", "", "-->")),
        ("a.vue", "<template>\n", block_of(MIT, "<!--", "", "-->")),
        ("a.js", "'use strict';\n", lines_of(MIT, "//")),
        ("a.bat", "@echo off\n", lines_of(MIT, "::")),
    ):
        assert cleaned(top + header + "x\n", path) == top + "x\n"


def test_a_file_of_nothing_but_a_notice_becomes_empty() -> None:
    assert cleaned(lines_of(APACHE, "#"), "a.py").strip() == ""
    assert cleaned("", "a.py") == ""


def test_languages_are_told_by_extension_and_name() -> None:
    assert (
        extension_of("a/b.PY") == ".py"
        and extension_of("a/Makefile") == "Makefile"
        and extension_of(".bashrc") == ".bashrc"
    )
    for path in ("Dockerfile", "a/CMakeLists.txt", "Makefile", "x.rs", "a.b.c.ts"):
        assert syntax_of(path) is not None
    for path in ("a.json", "a.unknown", "README", "a.txt", ""):
        assert syntax_of(path) is None


# Properties

LINES = (
    "/* Copyright 2020 A */|/*|*/| * Copyright (c) 2020 A|// Copyright 2020|// b||#include <a>|int x; /* c */|"
    "# Copyright 2020 A|#!/bin/sh|\"\"\"|'''|x = 1|# coding: utf-8|\\| * b|/* b|-- Copyright 2020|--[[|]]|"
    "<!-- Copyright 2020 -->|<!--|-->|SPDX-License-Identifier: MIT|<?php"
)
PIECES = st.sampled_from(LINES.split("|"))


def without_c_comments(text: str) -> list[str]:
    strings_or_comments = r'("(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')|/\*.*?(?:\*/|\Z)|//(?:\\\n|[^\n])*'
    return re.sub(strings_or_comments, lambda found: found[1] or " ", text, flags=re.DOTALL).split()


@settings(deadline=None)
@given(st.lists(PIECES, max_size=14))
def test_c_without_its_comments_is_the_same(pieces: list[str]) -> None:
    text = "\n".join(pieces)
    assert without_c_comments(cleaned(text, "a.c")) == without_c_comments(text)


def python_tokens(text: str) -> list[tuple[int, str]] | None:
    try:
        found = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER)
    return [(token.type, token.string.strip()) for token in found if token.type not in blank]


@settings(deadline=None)
@given(st.lists(PIECES, max_size=14))
def test_python_without_its_comments_is_the_same(pieces: list[str]) -> None:
    text = "\n".join(pieces)
    assert python_tokens(cleaned(text, "a.py")) == python_tokens(text)


@settings(deadline=None)
@given(st.text(max_size=200), st.sampled_from(["a.py", "a.c", "a.html", "a.lua", "a.php", "README.md", "a.hs", "a"]))
def test_any_text_is_survived_and_only_whole_lines_go(text: str, path: str) -> None:
    text = text.replace("\r", "")
    rest = iter(text.split("\n"))
    kept = cleaned(text, path).split("\n")
    assert all(line in rest for line in kept if line.strip())  # the lines that stay are the file's, in its order


@settings(deadline=None)
@given(st.lists(PIECES.filter(lambda line: not line.startswith("#!")), max_size=10), st.sampled_from(["a.py", "a.c"]))
def test_twice_is_once(pieces: list[str], path: str) -> None:
    once = cleaned("\n".join(pieces), path)
    assert cleaned(once, path).split() == once.split()


# Real code


def test_the_standard_library_stays_the_same_program() -> None:
    library = Path(sysconfig.get_path("stdlib"))
    folders = (library, library / "logging", library / "multiprocessing", library / "lib2to3", library / "importlib")
    paths = [path for folder in folders for path in sorted(folder.glob("*.py")) if path.stat().st_size < 60_000]
    paths = [*random.Random(1).sample(paths, min(len(paths), 50)), library / "logging" / "config.py"]
    changed = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.dump(ast.parse(text))
        except (UnicodeDecodeError, SyntaxError):
            continue
        found = remove_headers(text, path.name)
        if found.lines:
            changed += 1
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert ast.dump(ast.parse(found.text)) == tree, path
    assert changed > 5
    logging = remove_headers((library / "logging" / "__init__.py").read_text(encoding="utf-8"), "logging/__init__.py")
    assert logging.text.startswith('"""\nLogging package for Python.')
    assert logging.removed.startswith("# Copyright") and logging.removed.endswith("THIS SOFTWARE.")


def test_a_header_that_cmake_fills_in_is_one_of_c() -> None:
    assert syntax_of("src/config.h.cmake") == syntax_of("x.h") != syntax_of("FindX.cmake")

"""How a language writes comments, by the file's name, and the lines that may stand before a file's header.

Only what cannot be code at the top of a file is a comment here: `#` is one in Python and none in C, where it begins
an `#include`, and none in Markdown, where it begins a heading.
"""

import re
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Syntax:
    line: tuple[str, ...] = ()  # what begins a comment that ends with the line; longer ones first
    block: tuple[tuple[str, str], ...] = ()  # what begins and ends a comment of several lines
    passed: re.Pattern[str] | None = None  # a line of code that may stand before the header
    begins: str = ""  # what the file must begin with for comments to be comments


_C_PASSED = re.compile(
    r"\s*(?:#\s*(?:pragma|ifndef|ifdef|if|define|undef|include|import|error|endif|else|elif)\b.*"
    r"|(?:package|module|namespace|import|using)\s[\w.:\\* \"{},-]+;?|['\"]use strict['\"];?|#!\[.*\])\s*"
)
_PHP_PASSED = re.compile(r"\s*(?:<\?(?:php)?|declare\s*\(.*\);|namespace\s[\w\\]+;|use\s[\w\\]+;)\s*")
_XML_PASSED = re.compile(r"\s*(?:<\?xml.*\?>|<!doctype[^>]*>|<html[^>]*>|<template[^>]*>)\s*", re.IGNORECASE)
_SHELL_PASSED = re.compile(r"\s*set\s+[-+][\w ]+")
_BATCH_PASSED = re.compile(r"\s*@?echo\s+off\s*", re.IGNORECASE)
_ASM_PASSED = re.compile(r"\s*#\s*include\b.*")
_TEX_PASSED = re.compile(r"\s*\\(?:NeedsTeXFormat|ProvidesPackage|documentclass)\b.*")

_C = Syntax(("//",), (("/*", "*/"),), _C_PASSED)
_HASH = Syntax(("#",))
_DASH = Syntax(("--",))
_PERCENT = Syntax(("%",), (), _TEX_PASSED)
_XML = Syntax((), (("<!--", "-->"),), _XML_PASSED)

_SYNTAXES: tuple[tuple[str, Syntax], ...] = (
    ("c h cc cpp cxx c++ hh hpp hxx h++ inl ipp tpp m mm java js mjs cjs jsx ts tsx go rs swift kt kts scala sc", _C),
    ("cs d dart groovy gradle proto thrift fbs cu cuh cl glsl hlsl vert frag metal zig sol v sv svh vala hx as", _C),
    ("less scss sass styl jsonc json5 pcss", _C),
    ("css", Syntax((), (("/*", "*/"),))),
    ("php php3 php4 php5 phps phpt phtml", Syntax(("//", "#"), (("/*", "*/"),), _PHP_PASSED, begins="<?")),
    ("py pyi pyx pxd pxi pyw bzl star sage gyp", _HASH),
    ("sh bash zsh fish ksh command bats", Syntax(("#",), (), _SHELL_PASSED)),
    ("rb rake gemspec ru", Syntax(("#",), (("=begin", "=end"),))),
    ("pl pm perl t pod r R tcl awk sed nim cr ex exs coffee yaml yml toml mk mak am ac m4 conf cfg properties", _HASH),
    ("tf hcl", Syntax(("#", "//"), (("/*", "*/"),))),
    ("ini desktop service", Syntax((";", "#"))),
    ("cmake", Syntax(("#",), (("#[[", "]]"),))),
    ("jl", Syntax(("#",), (("#=", "=#"),))),
    ("ps1 psm1 psd1", Syntax(("#",), (("<#", "#>"),))),
    ("nix", Syntax(("#",), (("/*", "*/"),))),
    ("gd graphql gql dockerfile po pot rego", _HASH),
    ("sql pgsql plsql", Syntax(("--",), (("/*", "*/"),))),
    ("lua", Syntax(("--",), (("--[[", "]]"),))),
    ("hs lhs elm purs agda idr", Syntax(("--",), (("{-", "-}"),))),
    ("vhd vhdl adb ads ada", _DASH),
    ("tex sty cls bib ltx dtx erl hrl", _PERCENT),
    ("lisp lsp el clj cljs cljc edn scm ss rkt asd", Syntax((";",))),
    ("asm s S nasm inc", Syntax((";", "//"), (("/*", "*/"),), _ASM_PASSED)),
    ("ml mli mll mly sml fun v8 thy", Syntax((), (("(*", "*)"),))),
    ("fs fsi fsx", Syntax(("//",), (("(*", "*)"),))),
    ("pas pp dpr", Syntax(("//",), (("(*", "*)"), ("{", "}")))),
    ("f90 f95 f03 f08 f for f77 fpp", Syntax(("!",))),
    ("vb vbs bas", Syntax(("'",))),
    ("bat cmd", Syntax(("::", "rem ", "REM ", "@rem ", "Rem "), (), _BATCH_PASSED)),
    ("vim vimrc", Syntax(('"',))),
    ("html htm xhtml xml xsl xslt xsd svg vue svelte plist xaml csproj vcxproj props targets pom", _XML),
    ("md markdown mdown mkd", Syntax((), (("<!--", "-->"),))),
    ("jinja jinja2 j2", Syntax((), (("{#", "#}"), ("<!--", "-->")), _XML_PASSED)),
)
_BY_EXTENSION = {extension: syntax for names, syntax in _SYNTAXES for extension in names.split()}
_HASH_NAMES = (
    "makefile gnumakefile dockerfile containerfile rakefile gemfile vagrantfile podfile sconstruct sconscript build "
    "workspace meson.build configure.ac kconfig justfile brewfile procfile cmakelists.txt"
)
_BY_NAME = {**dict.fromkeys(_HASH_NAMES.split(), _HASH), "jenkinsfile": _C}


def extension_of(path: str) -> str:
    """`.py` of a/b.py in lower case; the whole name where there is none, as with Makefile."""
    name = PurePosixPath(path).name
    return PurePosixPath(name).suffix.lower() or name


def syntax_of(path: str) -> Syntax | None:
    """None for files whose comments are not known."""
    name = PurePosixPath(path).name.lower()
    if re.search(r"\.(?:h|hh|hpp|hxx)\.cmake$", name):  # a header that CMake fills in
        return _C
    return _BY_NAME.get(name) or _BY_EXTENSION.get(extension_of(path).removeprefix("."))

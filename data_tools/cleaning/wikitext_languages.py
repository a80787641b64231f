"""What cleaning wikitext must know about a language: names of namespaces, of closing sections, of a few templates.

Covers the paper's 20 languages (section 2.1: "bg, ca, cs, da, de, en, es, fr, hr, hu, it, nl, pl, pt, ro, ru, sl, sr,
sv, uk"). The names of namespaces of today stand in a dump itself; the tables here hold the former ones, which pages
still use and MediaWiki still understands (`$namespaceAliases`). All names are compared in lower case.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

FILE_NAMESPACE = 6
CATEGORY_NAMESPACE = 14
ENGLISH_FILES = "file|image"  # understood by every Wikipedia
ENGLISH_CATEGORIES = "category"

FILES = {
    "bg": "файл|картинка",
    "ca": "fitxer|imatge",
    "cs": "soubor|obrázek",
    "da": "fil|billede",
    "de": "datei|bild",
    "en": "",
    "es": "archivo|imagen",
    "fr": "fichier",
    "hr": "datoteka|slika",
    "hu": "fájl|kép",
    "it": "immagine",
    "nl": "bestand|afbeelding",
    "pl": "plik|grafika",
    "pt": "ficheiro|arquivo|imagem",
    "ro": "fișier|fişier|imagine",
    "ru": "файл|изображение",
    "sl": "slika|datoteka",
    "sr": "датотека|слика|datoteka|slika",
    "sv": "fil|bild",
    "uk": "файл|зображення|изображение",
}

LANGUAGES = tuple(FILES)

CATEGORIES = {
    "bg": "категория",
    "ca": "categoria",
    "cs": "kategorie",
    "da": "kategori",
    "de": "kategorie",
    "en": "",
    "es": "categoría",
    "fr": "catégorie",
    "hr": "kategorija",
    "hu": "kategória",
    "it": "categoria",
    "nl": "categorie",
    "pl": "kategoria",
    "pt": "categoria",
    "ro": "categorie",
    "ru": "категория",
    "sl": "kategorija",
    "sr": "категорија|kategorija",
    "sv": "kategori",
    "uk": "категорія|категория",
}

# Sections of notes, lists of links and of books: what stands at an article's end and is no prose.
TRAILING = {
    "bg": "източници|външни препратки|вижте също|виж също|бележки|литература|бележки и източници|препратки|виж още"
    "|вижте още|галерия|използвана литература|външни връзки",
    "ca": "referències|enllaços externs|enllaç extern|vegeu també|bibliografia|notes|notes i referències"
    "|referències i notes|fonts|galeria|bibliografia complementària",
    "cs": "reference|odkazy|externí odkazy|externí odkaz|související články|literatura|poznámky|zdroje|viz též"
    "|galerie|poznámky a reference|prameny|související stránky",
    "da": "referencer|kilder|eksterne henvisninger|ekstern henvisning|se også|noter|litteratur|fodnoter|henvisninger"
    "|kilder og henvisninger|kilder/henvisninger|eksterne kilder/henvisninger|eksterne links|noter og referencer"
    "|galleri",
    "de": "einzelnachweise|weblinks|weblink|literatur|siehe auch|quellen|anmerkungen|fußnoten|quellen und literatur"
    "|literatur und quellen|einzelbelege|belege|nachweise|anmerkungen und einzelnachweise|galerie|referenzen"
    "|quellenangaben",
    "en": "references|see also|external links|external link|further reading|notes|bibliography|sources|footnotes"
    "|citations|notes and references|references and notes|works cited|cited sources|references and sources"
    "|sources and references|general references|explanatory notes|notes and citations|citations and references"
    "|endnotes|external sources|gallery|references and further reading|external links and references",
    "es": "referencias|véase también|enlaces externos|enlace externo|bibliografía|notas|notas y referencias"
    "|referencias y notas|fuentes|lecturas adicionales|galería|bibliografía adicional|notas al pie",
    "fr": "références|notes et références|voir aussi|liens externes|lien externe|bibliographie|notes"
    "|articles connexes|annexes|sources|source|références et notes|sources et bibliographie|galerie"
    "|pour approfondir",
    "hr": "izvori|izvor|vanjske poveznice|bilješke|literatura|povezani članci|vidi još|vidi i|vidite i|poveznice"
    "|reference|vanjske veze|galerija|bilješke i literatura|napomene",
    "hu": "források|forrás|jegyzetek|jegyzet|hivatkozások|további információk|külső hivatkozások|külső hivatkozás"
    "|kapcsolódó szócikkek|kapcsolódó cikkek|lásd még|irodalom|lábjegyzetek|megjegyzések|források és jegyzetek"
    "|jegyzetek, hivatkozások|galéria|képgaléria|felhasznált irodalom|ajánlott irodalom|további irodalom",
    "it": "note|bibliografia|voci correlate|altri progetti|collegamenti esterni|fonti|riferimenti"
    "|galleria d'immagini|galleria",
    "nl": "zie ook|externe links|externe link|bronnen|bron|referenties|referentie|literatuur|noten|voetnoten"
    "|bronnen, noten en/of referenties|bronnen, noten en referenties|bronvermelding|verder lezen"
    "|externe koppelingen|galerij|afbeeldingen",
    "pl": "przypisy|bibliografia|linki zewnętrzne|link zewnętrzny|zobacz też|uwagi|literatura|źródła|galeria"
    "|literatura dodatkowa",
    "pt": "referências|ver também|veja também|ligações externas|ligação externa|links externos|bibliografia|notas"
    "|notas e referências|leitura adicional|leituras adicionais|fontes|galeria|referências bibliográficas",
    "ro": "note|referințe|legături externe|vezi și|bibliografie|surse|note și referințe|note de completare"
    "|lectură suplimentară|galerie",
    "ru": "примечания|литература|ссылки|см. также|см.также|источники|комментарии|сноски|галерея|библиография",
    "sl": "sklici|viri|zunanje povezave|zunanja povezava|glej tudi|glejte tudi|opombe|literatura|opombe in sklici"
    "|sklici in opombe|reference|galerija|opombe in reference|nadaljnje branje",
    "sr": "референце|спољашње везе|спољне везе|литература|види још|види и|напомене|извори|белешке|галерија|фусноте"
    "|reference|spoljašnje veze|spoljne veze|literatura|vidi još|vidi i|napomene|izvori|beleške|galerija",
    "sv": "referenser|källor|externa länkar|extern länk|se även|noter|litteratur|fotnoter|vidare läsning"
    "|källhänvisningar|källförteckning|tryckta källor|webbkällor|anmärkningar|galleri|bilder",
    "uk": "примітки|література|посилання|див. також|дивіться також|джерела|виноски|зноски|галерея|бібліографія"
    "|примітки та джерела|джерела та література",
}

# Templates that make a page a list of meanings, and what such a title says in brackets. A page of any language may
# use the English ones.
DISAMBIGUATION_TEMPLATES = {
    "bg": "пояснение",
    "ca": "desambiguació",
    "cs": "rozcestník[^|{}\n]{0,60}",
    "da": "flertydig",
    "de": "begriffsklärung",
    "en": "dab|disam|disamb|hndis|geodis|numberdis|mathdab|roaddis|schooldis|hospitaldis|letterdisambig"
    "|[^|{}\n]{1,60}[ _]disambiguation",
    "es": "desambiguación|desambiguacion|desambig",
    "fr": "homonymie[^|{}\n]{0,60}|paronymie",
    "hr": "razdvojba1?",
    "hu": "egyért[^|{}\n]{0,60}",
    "it": "disambigua",
    "nl": "dp|doorverwijspagina|dpintro",
    "pl": "ujednoznacznienie",
    "pt": "desambiguação|desambig",
    "ro": "dezambiguizare|dezambig",
    "ru": "неоднозначность|многозначность",
    "sl": "razločitev",
    "sr": "вишезначна[ _]одредница|višeznačna[ _]odrednica",
    "sv": "förgrening|förgreningssida|gren|grensida",
    "uk": "неоднозначність|багатозначність",
}
DISAMBIGUATION_TITLES = {
    "bg": "пояснение",
    "ca": "desambiguació",
    "cs": "rozcestník",
    "da": "flertydig",
    "de": "begriffsklärung",
    "en": "disambiguation",
    "es": "desambiguación",
    "fr": "homonymie",
    "hr": "razdvojba",
    "hu": "egyértelműsítő lap",
    "it": "disambigua",
    "nl": "doorverwijspagina",
    "pl": "ujednoznacznienie",
    "pt": "desambiguação",
    "ro": "dezambiguizare",
    "ru": "значения",
    "sl": "razločitev",
    "sr": "вишезначна одредница",
    "sv": "olika betydelser",
    "uk": "значення",
}

REDIRECT = re.compile(
    r"\s*#\s*(?:redirect|redirection|redirección|redireccion|redirecionamento|weiterleitung|rinvia|rinvio|patrz|tam"
    r"|doorverwijzing|przekieruj|przekierowanie|перенаправление|перенаправлення|перенапр|пренасочване|виж"
    r"|преусмери|preusmeri|preusmeritev|preusmjeri|omdirigering|omdirigera|omdirigér|přesměruj|redirecteaza"
    r"|átirányítás|redirecció)\s*:?\s*\[\[",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kept:
    """What a template leaves: parameters by position (-1: the last; none: all of them)."""

    positions: tuple[int, ...]
    between: str = " "
    before: str = ""
    after: str = ""


def _keeping(names: str, *positions: int, between: str = " ", before: str = "", after: str = "") -> dict[str, Kept]:
    return {name: Kept(positions, between, before, after) for name in names.split("|")}


# Templates that carry words of the sentence they stand in. Without these "the road is {{convert|10|km}} long" loses
# its number. All others go.
TEXT_TEMPLATES: dict[str, Kept] = {
    **_keeping("nowrap|nobr|small|smaller|big|sc|smallcaps|mono|code|kbd|keypress|em|strong|abbr|abréviation", 1),
    **_keeping("math|mvar|val|formatnum|chem2|angbr|ipa|nihongo|script/arabic|script/hebrew|lien|ill|illm", 1),
    **_keeping("quote|cquote|blockquote|quotation|zitat|citation bloc|cytat", 1),
    **_keeping("lang|langue", 2),
    **_keeping("transl|transliteration", -1),
    **_keeping("convert|cvt|unité|unité/2", 1, 2),
    **_keeping("date|date-", 1, 2, 3, 4),
    **_keeping("frac|sfrac|fraction", between="/"),
    **_keeping("chem", between=""),
    **_keeping("as of", 1, before="As of "),
    **_keeping("uss", 1, before="USS "),
    **_keeping("hms", 1, before="HMS "),
}
LANGUAGE_TEMPLATES: dict[str, dict[str, Kept]] = {
    "ca": _keeping("segle", 1, before="segle "),
    "es": _keeping("siglo|cita", 1),
    "fr": _keeping("s|-s", 1, 2, between="", after=" siècle")
    | _keeping("s-", 1, 2, between="")
    | _keeping("nombre", 1, 2)
    | _keeping("citation", 1)
    | _keeping("citation étrangère", 2),
    "it": _keeping("citazione", 1),
    "pt": _keeping("séc", 1, before="século "),
    "ru": _keeping("нп|нп3|нп5|не переведено|не переведено 5", 2) | _keeping("s|число", 1),
}
TONGUES = ("lang-", "јез-", "jez-")  # {{lang-fr|mot}}: the rest of the name is a language, the word comes first
CHARACTER_TEMPLATES = {
    **dict.fromkeys(("ndash", "–", "endash", "en dash"), "–"),
    **dict.fromkeys(("snd", "spnd", "sndash", "spaced ndash", "spaced en dash"), " – "),
    **dict.fromkeys(("mdash", "—", "emdash", "em dash"), "—"),
    **{"'": "'", "!": "|", "=": "=", "nbsp": " ", "·": " · ", "•": " • ", "1er": "1er", "1/2": "½"},
}
_CENTURIES = "Ier IIe IIIe IVe Ve VIe VIIe VIIIe IXe Xe XIe XIIe XIIIe XIVe XVe XVIe XVIIe XVIIIe XIXe XXe XXIe"
CHARACTER_TEMPLATES |= {f"{name} siècle".lower(): f"{name} siècle" for name in _CENTURIES.split()}  # in French


@dataclass(frozen=True)
class Site:
    """What the cleaner needs to know of one Wikipedia. Names in lower case."""

    file_names: frozenset[str]
    category_names: frozenset[str]
    trailing_sections: frozenset[str]
    text_templates: Mapping[str, Kept]
    disambiguation_template: re.Pattern[str]
    disambiguation_title: str


def site_of(language: str, namespaces: Mapping[int, str] | None = None) -> Site:
    """The names of a language's Wikipedia; `namespaces` are those its dump states, number to name.

    A language outside the table gets the English names beside those of its dump.
    """
    stated = namespaces or {}
    templates = [t for t in ("disambig|disambiguation", DISAMBIGUATION_TEMPLATES.get(language, "")) if t]
    return Site(
        file_names=_names(ENGLISH_FILES, FILES.get(language, ""), stated.get(FILE_NAMESPACE, "")),
        category_names=_names(ENGLISH_CATEGORIES, CATEGORIES.get(language, ""), stated.get(CATEGORY_NAMESPACE, "")),
        trailing_sections=_names(TRAILING["en"], TRAILING.get(language, "")),
        text_templates=TEXT_TEMPLATES | LANGUAGE_TEMPLATES.get(language, {}),
        disambiguation_template=re.compile(r"\{\{[ \t]*(?:" + "|".join(templates) + r")[ \t\n]*[|}]", re.IGNORECASE),
        disambiguation_title=f"({DISAMBIGUATION_TITLES.get(language, 'disambiguation')})",
    )


def _names(*alternatives: str) -> frozenset[str]:
    return frozenset(name.lower() for group in alternatives for name in group.split("|") if name)

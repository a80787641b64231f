"""What would go wrong after hours, found before a preparation begins: models, tokenizers, the order of filters."""

from collections.abc import Sequence

from data_tools.engine.components import filter_of, reader_of
from data_tools.engine.plan import Plan
from data_tools.engine.settings import PrepareSettings
from data_tools.engine.stages import tokenize_settings
from llamatrain.errors import ConfigError


def check_ahead(plan: Plan) -> None:
    """Raises ConfigError and DataError."""
    settings = plan.settings
    reader = reader_of(settings.reader, settings.read)
    for check in reader.checks:
        try:
            check(reader.settings)
        except ConfigError as error:
            raise ConfigError(f"read.{error}") from None
    _check_order([*settings.before, *settings.after], settings)
    if settings.stage is None:
        _check_models(settings)
        _check_languages(settings)
    if settings.tokenizer is not None:
        from llamatrain.tokenizer import Tokenizer  # here: SentencePiece is for those who tokenize

        tokenize_settings(plan, workers=1, overwrite=False)
        Tokenizer(settings.tokenizer)


def check_used(settings: PrepareSettings, overrides: Sequence[str]) -> None:
    """That every filter that the command line has settings for is used. Raises ConfigError.

    Those of a preset may be there for nothing: `after=[language]` leaves the others out.
    """
    used = [*settings.before, *settings.after]
    for override in overrides:
        key, equals, _ = override.lstrip("+").partition("=")
        name = key.removeprefix("filters.")
        if not equals or name == key or any(f"{name}.".startswith(f"{other}.") for other in used):
            continue
        shown = name if name in settings.filters else name.partition(".")[0]
        raise ConfigError(
            f"{key} is set, but {shown} is in neither before=[{','.join(settings.before)}] nor after="
            f"[{','.join(settings.after)}]: add it to one of them, as after=[{','.join([*settings.after, shown])}]"
        )


def _check_order(names: Sequence[str], settings: PrepareSettings) -> None:
    for place, name in enumerate(names):
        for other in filter_of(name, settings.filters.get(name) or {}).comes_after:
            if other in names[place + 1 :] and other not in names[:place]:
                raise ConfigError(f"before, after: {name} needs what {other} finds out: put {other} in front of {name}")


def _check_models(settings: PrepareSettings) -> None:
    for name in {*settings.before, *settings.after}:
        try:
            filter_of(name, settings.filters.get(name) or {}).make()
        except ConfigError as error:
            raise ConfigError(f"filters.{name}: {error}; or leave {name} out of before=[…] and after=[…]") from None


def _check_languages(settings: PrepareSettings) -> None:
    """That each language to keep has a model to be graded by. Raises ConfigError."""
    if not {"language", "perplexity"} <= {*settings.before, *settings.after}:
        return
    from data_tools.filters.perplexity import find_models

    languages = filter_of("language", settings.filters.get("language") or {}).settings.languages
    perplexity = filter_of("perplexity", settings.filters.get("perplexity") or {}).settings
    graded = {language for language, model in find_models(perplexity).items() if model.cutoffs is not None}
    without = [language for language in languages if language not in graded]
    if without and "all" not in perplexity.keep:
        raise ConfigError(
            f"filters.language.languages=[{','.join(languages)}]: {perplexity.models} has no model with cut-offs of "
            f"{', '.join(without)}, and every such page would be dropped as perplexity_all; train one with python -m "
            f"data_tools.train_ngrams, or keep them ungraded with filters.perplexity.keep=["
            f"{','.join([*perplexity.keep, 'all'])}]"
        )

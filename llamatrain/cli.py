"""From the command line to a dataclass: the only file that knows Hydra. No torch is imported here.

Hydra composes the YAML of conf/ with the overrides; `llamatrain.config.build` then refuses what the schema does
not know. So that this one checker gives every message, overrides reach Hydra as forced ones (`++key=value`), and
a value that Hydra's grammar would choke on is quoted: nobody needs to know when Hydra wants a plus or a quote.
"""

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from llamatrain.config.build import build, plain, text_keys
from llamatrain.errors import ConfigError, LlamatrainError
from llamatrain.process import speaks_for_its_node, write_error_file

T = TypeVar("T")

INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C
PIPE_CLOSED = 141  # and for one whose reader has left

# Hydra is to compose and nothing else: no output folders, no change of directory, no logging of its own.
QUIET = [
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "hydra.sweep.dir=runs/multirun",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
]

# Hydra's own script completes `python file.py`, not `python -m module`.
BASH_COMPLETION = r"""
_llamatrain_complete() {
  local pattern='^ *([^ ]*python[0-9.]*) +-m +((llamatrain|data_tools|launch)\.[a-z_]+) +(.*)$'
  [[ "$COMP_LINE" =~ $pattern ]] || return
  local interpreter="${BASH_REMATCH[1]}" module="${BASH_REMATCH[2]}" rest="${BASH_REMATCH[4]}"
  local choices="$(COMP_LINE="llamatrain $rest" "$interpreter" -m "$module" -sc query=bash)"
  COMPREPLY=($(compgen -W "$choices" -- "${rest##* }"))
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o nospace -o default -o bashdefault -F _llamatrain_complete python python3
"""


def run_command(schema: type[T], config_name: str, function: Callable[[T], None], *, help_text: str | None) -> None:
    """Compose conf/<config_name>.yaml with the command line into `schema`, call `function`, exit with its status.

    The groups to choose from are the folders beside that file; --help shows `help_text` and what `help_page` adds to
    it. A LlamatrainError is printed as one line (with the traceback if LLAMATRAIN_TRACEBACK=1) and sets the exit code;
    any other exception is a defect. Under --multirun each job gets a run directory of its own, named by its changes.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed by Hydra
    if sys.argv[1:] in (["-sc", "install=bash"], ["--shell-completion", "install=bash"]):
        print(BASH_COMPLETION)
        return
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_page(config_name, help_text or "", sys.argv[1:]))
        return
    ConfigStore.instance().store(name="defaults", node=OmegaConf.create(plain(schema())))
    directory = (config_directory() / config_name).parent
    groups = {path.name for path in directory.iterdir() if path.is_dir()}
    for argument in sys.argv[1:]:
        group, _, choice = argument.partition("=")
        if group in groups and (choice in ("", "null") or "/" in choice or choice.endswith(".yaml")):
            _fail(_no_choice(group, choice, directory), ConfigError.exit_code)
    sys.argv[1:] = command_line(sys.argv[1:], groups=groups, texts=text_keys(schema))
    printing, resolved = "--cfg" in sys.argv or "-c" in sys.argv, "--resolve" in sys.argv
    if printing and "job" in sys.argv:  # Hydra would print what the schema refuses
        sys.argv[1:] = [argument for argument in sys.argv[1:] if argument not in ("--cfg", "-c", "job", "--resolve")]
    else:
        printing = False
    swept = {argument.partition("=")[0].lstrip("+") for argument in sys.argv[1:] if is_sweep(argument)}

    def job(composed: DictConfig) -> None:
        try:
            if HydraConfig.get().mode == RunMode.MULTIRUN and os.environ.get("WORLD_SIZE"):
                raise ConfigError(
                    "--multirun under torchrun: every job of a sweep needs processes of its own; sweep without torchrun"
                )
            config = build(schema, plain_values(composed, swept))
            if printing:
                print(OmegaConf.to_yaml(composed, resolve=resolved), end="")
                return
            function(config)
        except LlamatrainError as error:
            _fail(str(error), error.exit_code)
        except InterpolationKeyError as error:
            hint = r"${…} means another setting; write \${…} for the characters themselves"
            _fail(f"{str(error).splitlines()[0]}: {hint}", ConfigError.exit_code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # `| head` has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(PIPE_CLOSED)

    try:
        hydra.main(version_base="1.3", config_path=str(directory), config_name=Path(config_name).name)(job)()
    except MissingConfigException as error:
        _fail(_missing_option(error, directory), ConfigError.exit_code)
    except OverrideParseException as error:
        override = (error.override or "").lstrip("+")
        _fail(f"{override}: cannot be understood; write it as key=value", ConfigError.exit_code)
    except yaml.YAMLError as error:
        _fail(f"a configuration file is no YAML: {' '.join(str(error).split())}", ConfigError.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        causes = dict.fromkeys(str(e).splitlines()[0] for e in (error, error.__cause__) if e is not None)
        _fail(_unset_group(error, directory) or ": ".join(causes), ConfigError.exit_code)


def config_directory() -> Path:
    """Where the YAML tree lies: inside the installed package, or beside it in a source tree."""
    package = Path(str(files("llamatrain")))
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def command_line(arguments: list[str], *, groups: set[str], texts: set[str]) -> list[str]:
    """Flags first, then Hydra's own settings, then overrides as forced ones; choices of a group stay as they are.

    Values of the settings in `texts` and names of choices are texts even if they look like numbers, and so is what
    Hydra's grammar does not take.
    """
    if any(argument in ("-sc", "--shell-completion") for argument in arguments):
        return arguments
    sweeping = any(argument in ("-m", "--multirun") for argument in arguments)
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        plain_override = re.fullmatch(r"[A-Za-z_][\w.\-]*", key) and equals
        text = (key in texts and value != "null" and value[:1] not in "'\"[") or (key in groups and value.isdecimal())
        looks_plain = _is_understood(argument) and not (is_sweep(argument) or text)
        if plain_override and not looks_plain and not (sweeping and is_sweep(argument)):
            argument = f"{key}={_quoted(value)}"
        if plain_override and key not in groups and key.partition(".")[0] != "hydra":
            argument = f"++{argument}"
        is_flag = argument.startswith("-") or (not equals and not argument.startswith("~"))
        (flags if is_flag else overrides).append(argument)
    if flags and flags[-1] in ("--info", "-i"):
        flags.append("all")
    return [*flags, *QUIET, *overrides]


def given_overrides() -> list[str]:
    """While a command runs: what of its settings was given on the command line, as KEY=VALUE."""
    return [override.lstrip("+") for override in HydraConfig.get().overrides.task]


def is_sweep(argument: str) -> bool:
    """Whether an argument is an override with several values to try."""
    if "=" not in argument or argument.startswith("-") or not _is_understood(argument):
        return False
    return OverridesParser.create().parse_override(argument).is_sweep_override()


def _is_understood(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    """The value as a quoted string of Hydra's grammar, where backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + found[2].replace("'", r"\'"), value) + "'"


def plain_values(composed: DictConfig, swept: set[str]) -> dict[str, Any]:
    """Resolved plain values of a composed configuration; the jobs of a sweep get a run directory each."""
    settings = HydraConfig.get()
    if settings.mode == RunMode.MULTIRUN and "run_dir" in composed:
        overrides = [override.lstrip("+") for override in settings.overrides.task]
        label = ",".join(override for override in overrides if override.partition("=")[0] in swept)
        composed.run_dir = f"{composed.run_dir}/{re.sub(r'[^A-Za-z0-9_.=,-]+', '_', label) or 'single'}"
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def help_page(config_name: str, text: str, arguments: list[str]) -> str:
    """What --help shows: `text`, then the command's YAML where there is nothing to compose it of.

    Where a group must be chosen from (`source: ???`), its choices with the comments they begin with; if one is among
    the arguments, that file and the command's.
    """
    file = config_directory() / f"{config_name}.yaml"
    settings = file.read_text(encoding="utf-8")
    parts = [text.strip()]
    if "defaults:" not in settings:
        parts.append(settings.strip())
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    for group in re.findall(r"^  - (\w+): \?\?\?$", settings, re.MULTILINE):
        choices = _choices(file.parent / group)
        if (chosen := given.get(group)) in choices:
            content = (file.parent / group / f"{chosen}.yaml").read_text(encoding="utf-8").strip()
            own = re.sub(r"^defaults:\n(?:  .*\n)+\n?", "", settings, flags=re.MULTILINE).strip()
            parts += [f"{group}={chosen}:", content.removeprefix("# @package _global_\n"), "With any choice:", own]
        else:
            width = max(map(len, choices), default=0)
            listed = "\n".join(f"  {name:<{width}}  {line}" for name, line in choices.items())
            parts.append(f"{group}=NAME, one of these; `{group}=NAME --help` shows its settings:\n\n{listed}")
    return "\n\n".join(parts)


def _choices(folder: Path) -> dict[str, str]:
    """The files of a group, and what the comment that each begins with says first."""
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        comment = re.match(r"(?:# @.*\n)?((?:#.*\n)*)", path.read_text(encoding="utf-8"))
        said = " ".join(line.removeprefix("#").strip() for line in comment[1].splitlines()) if comment else ""
        found[path.stem] = re.split(r"(?<=\.)\s|;\s", said)[0]
    return found


def _no_choice(group: str, given: str, directory: Path) -> str:
    """What a group takes, said to somebody who gave it nothing, or a path."""
    return (
        f"{group}={given}: {group} takes the name of one of {', '.join(_choices(directory / group))}; a file of your "
        f"own, DIRECTORY/{group}/NAME.yaml, is chosen by --config-dir DIRECTORY {group}=NAME, and a setting of it is "
        f"{group}.SETTING=VALUE"
    )


def _missing_option(error: MissingConfigException, directory: Path) -> str:
    wanted = (error.missing_cfg_file or "").replace("\\", "/")
    group, _, option = wanted.rpartition("/")
    options = error.options or []
    if not group or not options:
        return str(error).splitlines()[0]
    longer = [name for name in options if name.startswith(option.lower())]
    nearest = longer or difflib.get_close_matches(option.lower(), options, n=1)
    hint = f"did you mean {group}={nearest[0]}? " if nearest else ""
    folder = (Path("conf") / directory.relative_to(config_directory()) / group).as_posix()
    return f"{group}={option}: there is no such choice; {hint}{folder} has {', '.join(options)}"


def _unset_group(error: Exception, directory: Path) -> str | None:
    """In words, if the error is that a group has to be chosen from."""
    found = re.match(r"You must specify '(\w+)'", str(error))
    if found is None:
        return None
    return f"{found[1]} is not set: {found[1]}=NAME, one of {', '.join(_choices(directory / found[1]))}; see --help"


def _fail(message: str, exit_code: int) -> None:
    """Exit with a message; of many ranks that fail alike, one a node prints it, and torchrun hears it from each."""
    if os.environ.get("LLAMATRAIN_TRACEBACK") == "1":
        traceback.print_exc()
    write_error_file(message)
    if speaks_for_its_node():
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)

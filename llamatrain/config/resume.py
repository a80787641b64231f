"""Which of a setting's two values counts when a run is resumed: the one typed now, or the one it had.

`TABLE` says so for every setting. Where it says `checkpoint`, an `auto` or null typed now stands for what the start
settled on. What the weights or the samples are is refused if it has changed; some of it may be changed all the same by
`train.resume_allow`, which names it, and the table says what then holds; of the rest it says why it cannot work.

`python -m llamatrain.config.resume` prints the table as docs/resume-policy.md has it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llamatrain.config.run import RunConfig
from llamatrain.errors import ConfigError

CONFIG, CHECKPOINT, BY_NAME, NEVER = "config", "checkpoint", "by name", "never"
MEANINGS = {
    CONFIG: "what is typed now counts, and the difference is told",
    CHECKPOINT: "what is typed now counts, too; `auto` and null stand for what was settled at the run's start",
    BY_NAME: "a change is refused, unless `train.resume_allow` names it",
    NEVER: "a change is refused",
}


@dataclass(frozen=True)
class Rule:
    """What holds for some settings."""

    wins: str
    listed: str  # the settings, with spaces between them
    note: str = ""  # what follows from a change, or why there can be none

    @property
    def settings(self) -> list[str]:
        return self.listed.split()


TABLE = (
    Rule(CONFIG, "name run_dir", "where the run lives: not compared"),
    Rule(
        CHECKPOINT,
        "train.device train.precision train.compile model.attention parallel.recompute",
        "with another choice the course is the same up to rounding, not bit for bit",
    ),
    Rule(
        NEVER,
        "model.dim model.n_layers model.n_heads model.n_kv_heads model.ffn_dim model.ffn_multiple_of model.vocab_size "
        "model.tied_embeddings",
        "the saved weights are those of another model",
    ),
    Rule(CHECKPOINT, "init.sha256", "what it was at the start; the weights it is of are read no more"),
    Rule(NEVER, "init.from", "the run began with those weights, and reads them no more"),
    Rule(
        NEVER,
        "model.init_std model.init_depth_scaled train.seed",
        "the initial weights were drawn with it, and are drawn no more",
    ),
    Rule(
        NEVER,
        "data.seq_len data.seed",
        "every source would be cut or shuffled anew, and what the run has read of it would be read again or never",
    ),
    Rule(
        BY_NAME,
        "model.max_seq_len model.rope_theta model.norm_eps",
        "the weights fit; from here on the model computes something else with them",
    ),
    Rule(
        BY_NAME,
        "train.global_batch_tokens",
        "samples go on without a gap, the next step has more or fewer of them; steps go on counting, so the length "
        "must be given as train.steps",
    ),
    Rule(
        BY_NAME,
        "data.sources.NAME.weight",
        "the new mixture from the next sample on; each source goes on where it is, one may be added or left out",
    ),
    Rule(BY_NAME, "data.document_mask", "the same samples, from here on with other targets and another attention"),
    Rule(CONFIG, "data.sources.NAME.path data.tokenizer", "it may have moved; its content must be the same"),
    Rule(
        CONFIG,
        "train.steps train.tokens optim.schedule_steps",
        "without optim.schedule_steps, the learning rate's schedule is stretched to the new length",
    ),
    Rule(
        CONFIG,
        "optim.lr optim.beta1 optim.beta2 optim.eps optim.weight_decay optim.decay optim.clip_norm optim.warmup_steps "
        "optim.min_lr_ratio",
        "from the next step on",
    ),
    Rule(
        CONFIG,
        "train.micro_batch train.deterministic parallel.sharding parallel.dp_shard parallel.dp_replicate parallel.tp "
        "parallel.cp parallel.pp parallel.pipeline_schedule parallel.reshard_after_forward parallel.reduce_dtype "
        "parallel.forward_prefetch parallel.backward_prefetch parallel.reduce_scatter parallel.all_reduce "
        "parallel.recompute_save parallel.recompute_budget_gib",
        "the same samples, and the same course up to rounding, not bit for bit",
    ),
    Rule(
        CONFIG,
        "resilience.spike_action resilience.spike_sigma resilience.spike_window resilience.rollback_skip_steps "
        "resilience.max_bad_steps resilience.max_rollbacks",
        "from the next step on; what was decided before stays decided",
    ),
    Rule(
        CONFIG,
        "evaluation.every_steps evaluation.max_tokens evaluation.micro_batch",
        "losses of validation compare with those of the same evaluation.max_tokens only",
    ),
    Rule(
        CONFIG,
        "data.prefetch_steps data.verify_hashes train.collect_garbage_every_steps train.stop_after_step "
        "train.resume_allow train.same_environment train.max_starts_without_progress train.dry_run "
        "parallel.bandwidth_gib_s parallel.replicate_bandwidth_gib_s parallel.timeout_s parallel.host_timeout_s "
        "checkpoint.every_steps checkpoint.every_minutes checkpoint.asynchronous checkpoint.retries "
        "checkpoint.max_failures checkpoint.keep_last checkpoint.keep_every_steps checkpoint.hours_between_failures "
        "checkpoint.verify_hashes logging.every_steps logging.straggler_factor logging.wandb logging.wandb_project "
        "logging.wandb_entity logging.profile_steps logging.profile_after_steps logging.profile_traces "
        "resilience.compare_copies_every_steps train.replay_check_every_steps "
        "resilience.preflight resilience.hang_timeout_s resilience.hang_timeout_at_start_s "
        "evaluation.samples evaluation.sample_tokens evaluation.tasks evaluation.tasks_every_steps evaluation.data "
        "evaluation.max_questions",
        "training computes the same",
    ),
    Rule(CONFIG, "init.allow", "looked at when a run begins"),
)
_RULES = {setting: rule for rule in TABLE for setting in rule.settings}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _in_table(key: str) -> str:
    """A setting as the table has it, whatever its source's name is."""
    parts = key.split(".")
    return ".".join(["data.sources.NAME", *parts[3:]]) if parts[:2] == ["data", "sources"] and parts[2:] else key


def rule_of(key: str) -> Rule:
    """The rule of a setting."""
    return _RULES[_in_table(key)]


def is_structural(key: str) -> bool:
    """Whether a change of the setting is another model or other samples."""
    return rule_of(key).wins in (BY_NAME, NEVER)


def keep_auto_choices(config: RunConfig, earlier: RunConfig) -> RunConfig:
    """`config` with what it leaves to the program set as at the run's start."""
    for group, _, name in (key.partition(".") for rule in TABLE if rule.wins == CHECKPOINT for key in rule.settings):
        if getattr(getattr(config, group), name) in ("auto", None):
            chosen = getattr(getattr(earlier, group), name)
            config = replace(config, **{group: replace(getattr(config, group), **{name: chosen})})
    return config


def check_allowed(config: RunConfig) -> None:
    """Raises ConfigError for a name in train.resume_allow that allows nothing."""
    possible = [key for key, rule in _RULES.items() if rule.wins == BY_NAME]
    for name in config.train.resume_allow:
        if not any(_covers(_in_table(name), key) for key in possible):
            rule = _RULES.get(name)
            reason = f" ({rule.note})" if rule is not None and rule.wins == NEVER else ""
            raise ConfigError(
                f"train.resume_allow={name}: there is nothing to allow{reason}; what can be allowed: "
                f"{', '.join(possible)}"
            )


def _covers(name: str, key: str) -> bool:
    """Whether allowing `name`, a setting or a group of them, allows a change of `key`."""
    return key == name or key.startswith(f"{name}.")


def changes(config: RunConfig, earlier: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ: key -> (then, now)."""
    now, then = flatten(config.as_dict()), flatten(earlier.as_dict())
    return {
        key: (then.get(key), now.get(key))
        for key in sorted({**then, **now})
        if then.get(key) != now.get(key) and key not in ("name", "run_dir")
    }


def differences(config: RunConfig, earlier: RunConfig, *, allowed: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
    """`changes`, if the table allows them all. Raises ConfigError naming the structural ones it does not.

    `allowed` are settings that may differ besides those that `train.resume_allow` names.
    """
    changed = changes(config, earlier)
    names = [*config.train.resume_allow, *allowed]
    never, nameless = [], []
    for key, (then, now) in changed.items():
        rule, told = rule_of(key), f"{key} was {then}, is {now}"
        if rule.wins == NEVER:
            never.append(f"{told}: {rule.note}")
        elif rule.wins == BY_NAME and not any(_covers(name, key) for name in names):
            nameless.append(key)
    if never or nameless:
        told = "; ".join([*(f"{key} was {changed[key][0]}, is {changed[key][1]}" for key in nameless), *never])
        way = f", or change them from here on with train.resume_allow=[{','.join(nameless)}]" if not never else ""
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings ({told}): "
            f"set them back, or start another run with name=…{way}"
        )
    return changed


def environment_changes(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs of the machine and the versions, of what both have noted: name -> (then, now); not the host."""
    ours, theirs = flatten(now), flatten(then)
    return {
        name: (theirs[name], ours[name])
        for name in sorted(ours.keys() & theirs.keys() - {"host"})
        if ours[name] != theirs[name]
    }


def as_markdown() -> str:
    """The table, as docs/resume-policy.md has it."""
    lines = [
        "# What a resumed run may change",
        "",
        "The same command again resumes a run. Another one may: every setting is in this table, which is that of",
        "`llamatrain/config/resume.py` (`python -m llamatrain.config.resume` prints it, a test compares).",
        "",
        *(f"- **{wins}**: {meaning}." for wins, meaning in MEANINGS.items()),
        "",
        "| on resumption | settings | |",
        "|---|---|---|",
        *(f"| {rule.wins} | {', '.join(f'`{key}`' for key in rule.settings)} | {rule.note} |" for rule in TABLE),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(as_markdown(), end="")

"""data_tools.prepare as job arrays of a real SLURM: no driver stays, a task is requeued, and the bytes are those of a
preparation on one machine."""

import json
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from data_tools.audit import AuditSettings, audit
from data_tools.engine.executors import units_of_part
from data_tools.engine.plan import read_plan
from data_tools.engine.slurm import NotSubmitted, submit
from data_tools.prepare import prepare
from tests.data.preparing import documents_of, files_of, prepared, settings_for, write_corpus
from tests.data.wet_writer import warcinfo, wet_page, write_archive
from tests.slurm.cluster import Cluster, Job, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(300)]

PATIENCE_S = 150.0
SLURM: dict[str, Any] = {
    "time": "00:05:00",
    "cpus_per_task": 1,
    "array_tasks": 2,
    "patience_s": 2,
    "setup": ["export OMP_NUM_THREADS=1"],
}
# The second task of an array takes its time when it runs for the first time.
SLOW = "[[ ${SLURM_ARRAY_TASK_ID:-0} == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]] && export TOY_SLOW_S=0.1"
ENGLISH = ["The harbour was quiet when we came back from the islands.", "Nobody had seen the boat since the storm."]
FRENCH = ["Le port était calme quand nous sommes revenus des îles.", "Personne n'avait vu le bateau depuis l'orage."]


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """With the SLURM commands of this very process meant for the cluster."""
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return cluster


def write_crawl(directory: Path) -> Path:
    """Six WET files: pages in two languages, with lines of their own and lines that are everywhere."""
    directory.mkdir()
    generator = random.Random(0)
    for number in range(6):
        pages = [warcinfo()]
        for page in range(20):
            sentences = generator.choice([ENGLISH, ENGLISH, FRENCH])
            words = [word for sentence in sentences for word in sentence.rstrip(".").split()]
            lines = [" ".join(generator.choices(words, k=12)) + "." for _ in range(8)]
            text = "\n".join(["Home | About | Contact", *lines, sentences[0]])
            pages.append(wet_page(f"Page {page}", text, url=f"http://example.com/{number}/{page}"))
        write_archive(directory / f"{number}.warc.wet.gz", *pages)
    return directory


def crawl_settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "common_crawl",
        "reader": "common_crawl",
        "before": ["tests.data.deadly_filters"],
        "after": ["language"],
        "unit_bytes": 1,
        "dedup": {"level": "line", "policy": "drop_all", "partitions": 3},
        **changes,
    }


def submitted(output: Path) -> list[int]:
    return [int(number) for number in json.loads((output / "slurm" / "jobs.json").read_text())]


def task(cluster: Cluster, job: int, number: int) -> dict[str, str]:
    """What SLURM says of a task of an array; nothing while it is not yet a job of its own."""
    for line in cluster.command("scontrol", "show", "job", "--oneliner", str(job)).splitlines():
        fields = dict(re.findall(r"(\S+?)=(\S*)", line))
        if fields.get("ArrayTaskId") == str(number):
            return fields
    return {}


def wait_for_the_end(cluster: Cluster, jobs: list[int], output: Path) -> None:
    def none_left() -> bool:
        return not cluster.command("squeue", "-h", "-o", "%i", "-j", ",".join(map(str, jobs))).strip()

    wait_until(none_left, "all jobs have ended", PATIENCE_S, lambda: told(cluster, output))


def told(cluster: Cluster, output: Path) -> str:
    outputs = "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in (output / "slurm").glob("*.out"))
    return f"{cluster.command('squeue')}\n{outputs}\n{cluster.logs()}"


@pytest.mark.parametrize("how", ["requeued", "signalled"])
def test_the_common_crawl_chain_with_a_task_killed_and_requeued_writes_the_bytes_of_one_machine(
    on_cluster: Cluster, tmp_path: Path, how: str
) -> None:
    crawl = write_crawl(tmp_path / "in")
    whole = prepared(crawl, tmp_path / "whole", **crawl_settings())
    assert {document["language"] for document in documents_of(whole)} == {"en"}
    output = tmp_path / "a 'quoted' 50% out"
    slow = {**SLURM, "setup": [*SLURM["setup"], SLOW]}
    prepare(settings_for(crawl, output, **crawl_settings(executor="slurm", slurm=slow)))
    jobs = submitted(output)
    assert len(jobs) == 5  # clean, hash, mark, filter, audit
    with pytest.raises(NotSubmitted, match=f"jobs {jobs[0]} "):
        submit(read_plan(output))

    clean = jobs[0]
    of_second = {unit.id for unit in units_of_part(read_plan(output).stage("clean"), (1, 2))}

    def made() -> set[str]:
        return of_second & {path.stem for path in (output / "ledger" / "clean").glob("*.json")}

    wait_until(lambda: bool(made()), "the second task has made a unit", PATIENCE_S, lambda: told(on_cluster, output))
    if how == "requeued":
        on_cluster.command("scontrol", "requeue", f"{clean}_1")  # kills it, as preemption does
    else:
        on_cluster.command("scancel", "--signal=USR1", "--batch", f"{clean}_1")  # as near the time limit
    assert made() < of_second  # it was in the middle
    wait_until(lambda: task(on_cluster, clean, 1).get("Restarts") == "1", "the task is requeued", PATIENCE_S)
    time.sleep(2)  # see Job.wait_for_requeue
    if task(on_cluster, clean, 1).get("JobState") == "PENDING":
        on_cluster.command("scontrol", "update", f"jobid={clean}_1", "StartTime=now")
    wait_for_the_end(on_cluster, jobs, output)
    assert Job(on_cluster, jobs[-1]).state == "COMPLETED", told(on_cluster, output)
    assert files_of(output) == files_of(whole), told(on_cluster, output)
    assert "every document is accounted for" in (output / "slurm" / f"audit-{jobs[-1]}.out").read_text()
    audit(AuditSettings(output=str(output), inputs=True))


def test_a_unit_that_cannot_be_made_stops_the_chain_fails_the_audit_and_is_made_when_started_again(
    on_cluster: Cluster, tmp_path: Path, tiny_tokenizer: Path
) -> None:
    corpus = write_corpus(tmp_path / "in", files=3)
    changes: dict[str, Any] = {
        "unit_bytes": 1,
        "before": ["tests.data.deadly_filters"],
        "dedup": {},
        "tokenizer": str(tiny_tokenizer),
    }
    whole = prepared(corpus, tmp_path / "whole", **changes)
    output = tmp_path / "out"
    dies = {**SLURM, "setup": [*SLURM["setup"], "(( SLURM_ARRAY_TASK_ID == 1 )) && export TOY_DIES=1"]}
    prepare(settings_for(corpus, output, executor="slurm", slurm=dies, **changes))
    jobs = submitted(output)
    wait_for_the_end(on_cluster, jobs, output)
    assert Job(on_cluster, jobs[-1]).state == "FAILED", told(on_cluster, output)
    assert "missing (no entry" in (output / "slurm" / f"audit-{jobs[-1]}.out").read_text()
    assert "clean is not complete" in (output / "slurm" / f"tokenize-{jobs[1]}_0.out").read_text()

    prepare(settings_for(corpus, output, executor="slurm", slurm=SLURM, **changes))
    jobs = submitted(output)
    wait_for_the_end(on_cluster, jobs, output)
    assert Job(on_cluster, jobs[-1]).state == "COMPLETED", told(on_cluster, output)
    assert files_of(output) == files_of(whole)

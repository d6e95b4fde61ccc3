"""The run directory: who may write, in which order, and what counts as done.

    runs/<name>/
        lock, owner.json       of the one process that works on the run
        run.json, config.yaml  schema_version, name, seed, versions, created; the resolved recipe
        events.jsonl           what happened when: for people, no stage reads it
        00-reset/              1-reset, 2-evaluate
        round-01/              1-red_team, 2-sample, 3-judge, 4-pair, 5-train, 6-evaluate
        round-02/ ...
        report/

The order of writes is the design; whatever the moment of a crash, the next run goes on from it:

1. `.begun.json` names the settings and inputs of a stage before its first file exists, so that
   unfinished work is only taken up by the same recipe.
2. A journal grows by whole lines, fsynced: at most its last line is torn, and opening it cuts
   that off. Every other file appears by rename, whole or not at all.
3. Files and folders are fsynced, then `stage.json` appears by rename: the only meaning of "done".
4. Undoing goes backwards: first the seals, the latest first; then each folder leaves its place by
   one rename and is deleted.
5. `deleted.json` names outputs that go on purpose before the first of them goes.

`files` has what writes single files, `stage` the folder of a stage, `run` that of a run. Left
out: checksums inside a journal (a seal has them), and any writer beside the one that holds the
lock.
"""

from selfmoa.rundir.files import (
    KILL_POINTS,
    Journal,
    digest_file,
    digest_tree,
    kill_point,
    kill_scope,
    read_jsonl,
    write_atomic,
    write_jsonl,
)
from selfmoa.rundir.run import SCHEMA_VERSION, RunDir
from selfmoa.rundir.stage import (
    RESET_STAGES,
    ROUND_STAGES,
    StageKey,
    fingerprint,
    stage_name,
)

__all__ = [
    "KILL_POINTS",
    "RESET_STAGES",
    "ROUND_STAGES",
    "SCHEMA_VERSION",
    "Journal",
    "RunDir",
    "StageKey",
    "digest_file",
    "digest_tree",
    "fingerprint",
    "kill_point",
    "kill_scope",
    "read_jsonl",
    "stage_name",
    "write_atomic",
    "write_jsonl",
]

"""Train a policy on a file of pairs, without a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import click

from selfmoa.commands.shared import A_PATH, Job, print_json, settings, shown, working


@click.command()
@click.argument("pairs", metavar="PAIRS", type=A_PATH)
@settings
@click.option("--model", required=True, help="A folder, or a name on the model hub.")
@click.option("--revision", help="Of a model on the hub: a commit, tag or branch.")
@click.option("--out", type=A_PATH, required=True, help="Folder of the trained policy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of every random number.")
@click.option(
    "--launch",
    metavar="NAME|FILE",
    help="Train in the processes of an accelerate configuration: a file, or cpu, multi-gpu, fsdp, "
    "deepspeed.",
)
@shown
def train(
    job: Job,
    pairs: Path,
    overrides: Sequence[str],
    model: str,
    revision: str | None,
    out: Path,
    seed: int,
    launch: str | None,
    as_json: bool,
    **how: bool,
) -> None:
    """Train a model on a file of preference pairs.

    PAIRS is a preference file as TRL takes it (JSONL, JSON or Parquet). KEY=VALUE changes a
    setting, as in train.loss=dpo or policy.adapter=full.
    """
    from selfmoa.config import ONE_TRAINING, Training
    from selfmoa.recipes import adjust

    chosen = adjust(Training, ONE_TRAINING, overrides)
    if launch:
        from selfmoa.training.fitting import read_pairs
        from selfmoa.training.launch import launch_again

        read_pairs(pairs, chosen.train)  # so that one process says what is wrong, not each
        launch_again(launch)
    is_first = os.environ.get("RANK", "0") == "0"
    with working(job, out, **how if is_first else {"quiet": True, "plain": True}) as view:
        from selfmoa.training.fitting import train as fit
        from selfmoa.training.processes import leave

        done = fit(
            pairs,
            model,
            out,
            revision=revision,
            seed=seed,
            progress=lambda done, total, unit: view.listen(
                "training", what=out.name, done=done, total=total, unit=unit
            ),
            say=lambda text: view.listen("remark", text=text),
            **dict(chosen.train),
            **dict(chosen.policy),
        )
        leave()
    if not is_first:
        return
    last = {k: done.log[-1][k] for k in ("loss", "accuracy") if k in done.log[-1]}
    if as_json:
        facts = {"out": str(out), "steps": len(done.log), "dropped": done.dropped}
        print_json(facts | {"layout": done.layout, "last_step": last})
    else:
        told = ", ".join(f"{name} {value:.3f}" for name, value in last.items())
        click.echo(f"{len(done.log)} steps, at the last one {told}.\nPolicy: {out}")

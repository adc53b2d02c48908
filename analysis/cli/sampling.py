"""`loopmdm sample`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loopmdm.analysis.cli.completion import among, model_names
from loopmdm.analysis.cli.printing import show, tsv
from loopmdm.analysis.cli.shared import LOOK, MODEL, app, check_out, integer, integers, interruptible, opens
from loopmdm.analysis.cli.waiting import err, working
from loopmdm.model.errors import UsageError

if TYPE_CHECKING:
    from loopmdm.analysis.measures.access import Access


@app.command(rich_help_panel=LOOK, epilog="Example: loopmdm sample markov-loop --steps 8")
@opens(text=False)
def sample(
    model: Annotated[str, typer.Argument(help=MODEL, autocompletion=among(model_names))],
    n: Annotated[int, typer.Option(help="sequences")] = 1,
    length: Annotated[int | None, typer.Option(help="tokens of a text; default: as many as fit")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 64,
    n_loops: Annotated[int | None, typer.Option(help="loops, or with --stop the most; default S_max")] = None,
    stop: Annotated[str, typer.Option(help="stopping rule, such as state-delta:0.03")] = "",
    order: Annotated[
        str, typer.Option(help="random, confidence, threshold:0.9, blocks:8, blocks:8:threshold:0.9, ...")
    ] = "random",
    infill: Annotated[str, typer.Option(help="a whole text with [MASK] for each token to fill")] = "",
    prompt: Annotated[str, typer.Option(help="text to begin with")] = "",
    clues: Annotated[
        str, typer.Option(help="POSITION:ID,.. that stay; a Sudoku model also takes a board, 0 or . where empty")
    ] = "",
    temperature: Annotated[float, typer.Option(help="0 takes the best token")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="this many most probable tokens; default all")] = None,
    top_p: Annotated[float, typer.Option(help="smallest set of tokens with this probability")] = 1.0,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance towards prompt and clues")] = 0.0,
    suppress: Annotated[str, typer.Option(help="ID,.. that are never drawn")] = "",
    end: Annotated[str, typer.Option(help="ID,.. that end a text: nothing is drawn behind them")] = "",
    seed: Annotated[int, typer.Option(help="same seed, same sample")] = 0,
    first_index: Annotated[int, typer.Option(help="number of the first sequence, to shard a job")] = 0,
    partial: Annotated[bool, typer.Option(help="on Ctrl-C give the finished batches")] = False,
    out: Annotated[Path | None, typer.Option(help="TSV file; default standard output")] = None,
    *,
    how: "Access",
) -> None:
    """Sample sequences: text, loops and forwards of each."""
    from loopmdm.model.diffusion.sampling import sample as run
    from loopmdm.model.files import write_atomic
    from loopmdm.model.stopping.rules import parse_rule
    from loopmdm.model.tasks.sudoku import board_of_model

    check_out(out)
    m = how.open(model)
    m.facts.need("masks", "bidirectional", by="sample")
    rule = parse_rule(stop, m.cfg.max_loops if n_loops is None else n_loops) if stop else None
    board = board_of_model(m.cfg)
    given = clues if board and ":" not in clues and len(clues) > board.size else _clues(clues)
    waiting = nullcontext() if err.is_terminal else working(f"sampling {model}")  # a terminal gets a bar of steps
    with interruptible("nothing was written; --partial keeps the finished batches"), waiting:
        r = run(
            m,
            n=n,
            length=length,
            steps=steps,
            n_loops=None if rule else n_loops,
            stop=rule,
            order=order,
            prompt=prompt or None,
            clues=given,
            infill=infill or None,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
            suppress=_ids(suppress, "--suppress"),
            end=_ids(end, "--end"),
            seed=seed,
            first_index=first_index,
            partial=partial,
            progress=err.is_terminal,
        )
    ran = r.loops_used > 0
    columns = ["sequence", "forwards", "mean_loops", "flops", "text"]
    rows = []
    for index, ids in enumerate(r.tokens):
        forwards = int(ran[:, index].sum())
        loops = int(r.loops_used[:, index].sum()) / forwards if forwards else float("nan")
        text = m.to_string(ids) if m.tokenizer else " ".join(map(str, ids.tolist()))
        rows.append((first_index + index, forwards, loops, float(r.step_flops[:, index].sum()), text))
    if out is None:
        show(columns, rows)
        return
    write_atomic(out, lambda path: path.write_text(tsv([columns, *rows]), encoding="utf-8"))
    print(out)


def _ids(text: str, option: str) -> list[int]:
    return integers(text, option, "3,7") if text else []


def _clues(text: str) -> dict[int, int] | None:
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"--clues takes POSITION:ID pairs such as 0:3,7:1; got {text!r:.80}")
    found: dict[int, int] = {}
    for place, token in ((integer(a, "--clues", "0:3"), integer(b, "--clues", "0:3")) for a, b in pairs):
        if found.setdefault(place, token) != token:
            raise UsageError(f"--clues gives position {place} both {found[place]} and {token}; give it one id")
    return found or None

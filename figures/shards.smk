# One measure of one model in shards, each a job of its own, merged to one table. PIPELINE.md says how to run it.
#
# A part is whole or not there, so that a job that was killed is done again alone; what is there is kept as long as
# measure, model, options and the number of shards stay what they are.
import shlex
import sys

PROGRAM = f"{shlex.quote(sys.executable)} -m loopmdm.analysis.cli"
# `options` are the measure's, as `loopmdm measure` takes them: "--n 5000 --n-loops 12".
OPTIONS = {"measure": "", "model": "", "shards": 8, "options": "", "out": "", "loopmdm": PROGRAM, "setup": ""}


def stop(message):
    print(message, file=sys.stderr)
    raise SystemExit(2)


for key in config:
    if key not in OPTIONS:
        stop(f"error: unknown config key {key!r}; known: {', '.join(OPTIONS)}")
options = OPTIONS | config
for key in ("measure", "model", "out"):
    if not options[key]:
        stop(f"error: --config {key}= is missing; such as measure=settled model=sotu-loop shards=4 out=settled.parquet")
if not str(options["shards"]).isdigit() or not int(options["shards"]):
    stop(f"error: --config shards= takes a number such as 8, got {options['shards']!r}")
OUT, OF = str(options["out"]), int(options["shards"])
PARTS = f"{OUT}.parts"
ASKED = shlex.join(["measure", str(options["measure"]), str(options["model"]), *shlex.split(str(options["options"]))])
SETUP = f"{options['setup'].rstrip('; ')}; " if options["setup"].strip() else ""
RUN = f"{SETUP}OMP_NUM_THREADS={{threads}} {options['loopmdm']} {{params.command}} > {{log:q}} 2>&1"


localrules:
    merge,


rule merge:
    input:
        expand(f"{PARTS}/{{number}}.parquet", number=range(1, OF + 1)),
    output:
        OUT,
    params:
        command=lambda wildcards, input, output: shlex.join(["merge", *input, "--out", *output]),
    log:
        f"{PARTS}/merge.log",
    shell:
        RUN


rule part:
    output:
        f"{PARTS}/{{number}}.parquet",
    params:
        command=lambda wildcards, output: f"{ASKED} --shard {wildcards.number}/{OF} --out {shlex.quote(str(output))}",
    wildcard_constraints:
        number="[0-9]+",
    log:
        f"{PARTS}/{{number}}.log",
    shell:
        RUN
